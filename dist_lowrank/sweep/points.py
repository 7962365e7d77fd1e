"""From overrides with several values to the points of a sweep, all checked before the first one starts."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from dist_lowrank.config import ConfigError, RunConfig, to_dict
from dist_lowrank.config.compose import refuse_credential
from dist_lowrank.config.run_folder import RunFolder, open_run

_EXAMPLE = "such as optimizer=adamw,galore or seed=0,1,2"


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a sweep."""

    name: str  # what tells it from the others: `optimizer=galore seed=1`
    overrides: tuple[str, ...]  # one value per key
    config: RunConfig
    folder: Path  # its `runs`: no other point shares it, whatever their digests

    @property
    def run(self) -> RunFolder | None:
        """Its finished run, if there is one."""
        finished = sorted(self.folder.glob("*/FINISHED"))
        return open_run(finished[-1].parent) if finished else None

    @property
    def train_overrides(self) -> list[str]:
        """What `dist-lowrank train` gets, its folder included."""
        runs = str(self.folder).replace('"', '\\"')
        return [*self.overrides, f'runs="{runs}"']

    @property
    def console(self) -> Path:
        """What the run printed."""
        return self.folder / "console.txt"


@dataclass(frozen=True, slots=True)
class Sweep:
    """The points of one command, in the order in which they start: the last key varies fastest."""

    folder: Path
    points: Sequence[Point]


def make_sweep(overrides: Sequence[str], check: Callable[[Sequence[str]], RunConfig]) -> Sweep:
    """Expands the overrides and checks every point; writes and starts nothing.

    Args:
        overrides: Hydra's; `key=a,b,c`, `key=range(3)` and `key=choice(a,b)` have several values.
        check: gives the configuration of one point, or raises ConfigError.

    Raises:
        ConfigError: if there is nothing to sweep, or with the errors of all points that could not run.
    """
    choices = [_choices(text) for text in overrides]
    swept = [index for index, values in enumerate(choices) if len(values) > 1]
    if not swept:
        raise ConfigError(f"sweep: no key has several values; allowed: {_EXAMPLE}")
    configs: list[tuple[str, tuple[str, ...], RunConfig]] = []
    problems: dict[str, str] = {}
    for values in itertools.product(*choices):
        name = " ".join(values[index] for index in swept)
        try:
            configs.append((name, values, check(values)))
        except ConfigError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, name)
    problems |= _equal_points(configs)
    if problems:
        raise ConfigError("\n".join(f"{line} (point {name})" for line, name in problems.items()))
    keys = [_short(overrides[index].partition("=")[0]) for index in swept]
    folder = Path(configs[0][2].runs) / f"sweep-{'-'.join(keys)}-{_digest(configs)}"
    points = [
        Point(name, values, config, folder / "points" / f"{number:03d}-{_file_name([values[i] for i in swept])}")
        for number, (name, values, config) in enumerate(configs, start=1)
    ]
    return Sweep(folder, points)


def _choices(text: str) -> list[str]:
    """The overrides that one override stands for."""
    refuse_credential(text)  # the names of points hold values
    key, _, values = text.partition("=")
    try:
        override = OverridesParser.create().parse_override(text)
        if not override.is_sweep_override():
            return [text]
        if override.is_discrete_sweep() and not getattr(override.value(), "shuffle", False):
            return [f"{key}={value}" for value in override.sweep_string_iterator()]
    except HydraException:
        if "(" not in values:
            return [text]  # is no override at all: `check` says so
    raise ConfigError(f"{key}: {values} is not allowed in a sweep; allowed: a,b,c or choice(a,b,c) or range(3)")


def _equal_points(configs: Sequence[tuple[str, tuple[str, ...], RunConfig]]) -> dict[str, str]:
    seen: dict[str, str] = {}
    problems = {}
    for name, _, config in configs:
        key = json.dumps(to_dict(config), sort_keys=True)
        if key in seen:
            problems[f"{name}: is the same run as {seen[key]}; allowed: each run once"] = name
        seen.setdefault(key, name)
    return problems


def _digest(configs: Sequence[tuple[str, tuple[str, ...], RunConfig]]) -> str:
    """Of what the points are, so that the same command finds its sweep again."""
    data = []
    for name, _, config in configs:
        settings = to_dict(config)
        for key in ("runs", "launcher", "telemetry", "checkpoint", "resume"):
            settings.pop(key, None)
        data.append([name, settings])
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def _short(key: str) -> str:
    return re.split(r"[./]", key.lstrip("+"))[-1]


def _file_name(choices: Sequence[str]) -> str:
    parts = [_short(key) + equals + value for key, equals, value in (each.partition("=") for each in choices)]
    return re.sub(r"[^A-Za-z0-9=._,-]+", "_", ",".join(parts))[:100]
