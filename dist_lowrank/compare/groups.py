"""Runs that differ in the seed alone form a group; groups are compared, if they learned the same from the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dist_lowrank.compare.runs import Run
from dist_lowrank.config import ConfigError, by_dotted_key
from dist_lowrank.config.errors import show

COMPARABLE = ("data", "seed", "model", "evaluation")  # what has to be equal unless it is allowed to differ

# Keys that change neither what is learned nor how fast, or that each run has its own value of.
_IMMATERIAL = (
    "seed",
    "runs",
    "name",
    "telemetry",
    "checkpoint",
    "resume",
    "data.cache",
    "train.export",
    "train.sample_tokens",
    "launcher",
)
_LONGEST_LABEL = 80  # in characters; of others, the table of settings tells what differs
# Keys of the section `model` that say how the model is trained, not what it is.
_NOT_THE_MODEL = (
    "model.name",
    "model.attention",
    "model.activation_checkpointing",
    "model.compile",
    "model.low_rank",
    "model.dense",
)


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that are equal but for their seeds; often just one."""

    label: str
    runs: Sequence[Run]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def world_size(self) -> int:
        return len(self.first.ranks)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs, with labels that tell them apart.

    Runs with equal settings and an equal seed, which show whether a run repeats, stay by themselves.
    """
    by_settings: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        by_settings.setdefault(tuple(sorted(_settings(run).items())), []).append(run)
    members: list[list[Run]] = []
    for equal in by_settings.values():
        seeds = {run.seed for run in equal}
        members += [equal] if len(seeds) == len(equal) else [[run] for run in equal]
    return [Group(label, each) for label, each in zip(_labels(members), members, strict=True)]


def differing_settings(groups: Sequence[Group]) -> dict[str, list[str]]:
    """By key: its value in each group, where these are not equal."""
    settings = [_settings(group.first) for group in groups]
    keys = dict.fromkeys(key for each in settings for key in each)
    values = {key: [each.get(key, "") for each in settings] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def check_comparable(groups: Sequence[Group], allow: Collection[str]) -> list[str]:
    """Refuses groups that did not learn the same from the same.

    Args:
        groups: each is compared with the first.
        allow: of COMPARABLE, what may differ.

    Returns:
        What differs and was allowed to, one sentence each.

    Raises:
        ConfigError: naming each key that differs, and its values.
    """
    differences = {name: list(_differences(name, groups)) for name in COMPARABLE}
    refused = [
        f"{text}; allowed: equal ones, or --allow {name}"
        for name, texts in differences.items()
        if name not in allow
        for text in texts[:3]
    ]
    if refused:
        raise ConfigError("\n".join(refused))
    return [text for texts in differences.values() for text in texts]


def _differences(name: str, groups: Sequence[Group]) -> Iterator[str]:
    baseline = groups[0]
    for group in groups[1:]:
        if name == "seed":
            if sorted(group.seeds) != sorted(baseline.seeds):
                have, has = (", ".join(map(str, sorted(each.seeds))) for each in (baseline, group))
                yield f"seed: {have} in {baseline.label}, {has} in {group.label}"
            continue
        identity = _evaluation if name == "evaluation" else partial(_identity, name)
        here, there = (identity(each.first) for each in (baseline, group))
        for key in sorted(here.keys() | there.keys()):
            if here.get(key) != there.get(key):
                values = [show(each.get(key)) for each in (here, there)]
                yield f"{key}: {values[0]} in {baseline.label}, {values[1]} in {group.label}"


def _identity(section: str, run: Run) -> dict[str, Any]:
    left_out = ("data.cache", "data.workers") if section == "data" else _NOT_THE_MODEL
    return {key: v for key, v in by_dotted_key(run.config[section], f"{section}.") if key not in left_out}


def _evaluation(run: Run) -> dict[str, Any]:
    """How validation losses were measured: runs that measured otherwise have others, even of one model."""
    train = run.config["train"]
    found = {f"train.{key}": train.get(key) for key in ("eval_sequences", "eval_legacy_counter")}
    if train.get("eval_legacy_counter"):  # it counts batches per rank
        found |= {"train.micro_batch_size": train["micro_batch_size"], "ranks": len(run.ranks)}
    return found


def _settings(run: Run) -> dict[str, str]:
    """Everything that can make two runs differ, as text by dotted key."""
    settings = {
        key: show(value)
        for key, value in by_dotted_key(run.config)
        if not any(key == each or key.startswith(f"{each}.") for each in _IMMATERIAL)
    }
    return settings | {"ranks": str(len(run.ranks))}


def _labels(members: Sequence[Sequence[Run]]) -> list[str]:
    """`llama_tiny-adamw`; with the settings that differ, where this is not unique; else the name of the folder."""
    names = [_name(runs[0]) for runs in members]
    labels = []
    for name, runs in zip(names, members, strict=True):
        alike = [_settings(other[0]) for other, its in zip(members, names, strict=True) if its == name]
        labels.append(" ".join([name, *_differences_of(_settings(runs[0]), alike)]))
    repeated = {label for label, count in Counter(labels).items() if count > 1}
    for index, (label, name, runs) in enumerate(zip(labels, names, members, strict=True)):
        if len(label) > _LONGEST_LABEL or label in repeated:
            labels[index] = f"{name if len(label) > _LONGEST_LABEL else label} ({runs[0].folder.path.name})"
    if len(set(labels)) < len(labels):  # folders of one name in several places, or several attempts
        labels = [str(runs[0].given) for runs in members]
    return labels


def _differences_of(own: Mapping[str, str], alike: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """`rank=4`, `strategy=ddp`: keys of one strategy alone say no more than its name, and so with other sections."""
    for key, value in own.items():
        section, _, last = key.rpartition(".")
        name = f"{key.partition('.')[0]}.name"
        peers = alike if key == name else [each for each in alike if each.get(name) == own.get(name)]
        if len({each.get(key) for each in peers}) > 1:
            yield f"{section if key == name else last}={value}"


def _name(run: Run) -> str:
    return run.config["name"] or f"{run.config['model']['name']}-{run.config['optimizer']['name']}"
