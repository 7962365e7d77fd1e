"""Runs put side by side: the one value that tables, plots and files are made from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from dist_lowrank.compare.assertions import Assertion, Outcome, evaluate
from dist_lowrank.compare.groups import Group, check_comparable, differing_settings, group_runs
from dist_lowrank.compare.quantities import LossRow, Mean, Quantities, causes, loss_rows, quantities
from dist_lowrank.compare.runs import read_run
from dist_lowrank.compare.traffic import Traffic, forecast
from dist_lowrank.config import ConfigError
from dist_lowrank.telemetry.causes import OF_STEP


@dataclass(frozen=True, slots=True)
class Comparison:
    """Groups of runs and all that was found out about them; sequences are by group, the baseline first."""

    groups: Sequence[Group]
    notes: Sequence[str]  # what a reader has to know before trusting the numbers
    settings: Mapping[str, Sequence[str]]  # those that differ
    loss: Sequence[LossRow]
    quantities: Sequence[Mapping[str, Mean | None]]
    traffic: Sequence[Traffic | str]  # or why it is not known; nothing if it was not asked for
    outcomes: Sequence[Outcome]  # of the assertions

    @property
    def holds(self) -> bool:
        """Whether all assertions hold."""
        return all(outcome.holds for outcome in self.outcomes)


def compare(
    paths: Sequence[str],
    *,
    allow: Collection[str] = (),
    assertions: Sequence[Assertion] = (),
    with_traffic: bool = True,
    notes: Sequence[str] = (),
) -> Comparison:
    """Reads runs and compares each with the first.

    Args:
        paths: folders of runs or of attempts, finished or not.
        allow: of `groups.COMPARABLE`, what may differ.
        assertions: about each group but the first; about the first if there are no others.
        with_traffic: forecast what the optimizers sent, which takes some seconds.
        notes: to put above those that come of the runs.

    Raises:
        ConfigError: for what is no run, is not comparable, or an assertion without a meaning.
    """
    paths = list(dict.fromkeys(path.rstrip("/") or path for path in paths))
    if not paths:
        raise ConfigError("compare: no run was given; allowed: one or more folders of runs")
    groups = group_runs([read_run(path) for path in paths])
    notes = [*notes, *(f"Not the same for all: {text}." for text in check_comparable(groups, allow))]
    loss = loss_rows(groups)
    notes += [*_unfinished(groups), *_interpolated(groups, loss), *_different_ranks(groups), *_different_places(groups)]
    traffic = [forecast(group.first) if with_traffic else "" for group in groups]
    numbers = [
        quantities(group, loss[-1], index, sent if isinstance(sent, Traffic) else None)
        for index, (group, sent) in enumerate(zip(groups, traffic, strict=True))
    ]
    means = [{name: value.mean if value else None for name, value in each.items()} for each in numbers]
    outcomes = [
        _marked(evaluate(assertion, groups[index].label, means[index], means[0]), numbers[index], numbers[0])
        for assertion in assertions
        for index in (range(1, len(groups)) if len(groups) > 1 else [0])
    ]
    return Comparison(groups, notes, differing_settings(groups), loss, numbers, traffic, outcomes)


def _marked(outcome: Outcome, values: Quantities, baseline: Quantities) -> Outcome:
    by_name = dict(values) | {f"baseline.{name}": value for name, value in baseline.items()}
    return replace(outcome, interpolated=[n for n in outcome.numbers if (value := by_name[n]) and value.interpolated])


def _interpolated(groups: Sequence[Group], rows: Sequence[LossRow]) -> list[str]:
    labels = [
        group.label
        for index, group in enumerate(groups)
        if any((value := row.validation[index]) and value.interpolated for row in rows)
    ]
    if not labels:
        return []
    return [
        f"Not evaluated at the same numbers of tokens: validation losses of {', '.join(labels)} that are marked ~ are "
        "not measured, they lie on the line between two evaluations. Assertions use them too."
    ]


def _unfinished(groups: Sequence[Group]) -> list[str]:
    return [
        f"Unfinished: {run.given}, {run.entries[-1].step:,} of {run.config['train']['steps']:,} steps."
        for group in groups
        for run in group.runs
        if not run.is_finished
    ]


def _different_ranks(groups: Sequence[Group]) -> list[str]:
    """Where numbers per rank do not compare."""
    notes = []
    sizes = list(dict.fromkeys(group.world_size for group in groups))
    if len(sizes) > 1:
        notes.append(
            f"Not the same number of ranks for all ({', '.join(map(str, sizes))}): bytes per rank, times and bytes "
            "sent are not like for like."
        )
    logged = [causes([group]) for group in groups]
    partly = [cause for cause in OF_STEP if 0 < sum(cause in each for each in logged) < len(groups)]
    if partly:
        notes.append(f"Not logged by all: memory of {', '.join(partly)}.")
    return notes


def _different_places(groups: Sequence[Group]) -> list[str]:
    """Where times do not compare, and where numbers may differ by more than what was changed."""
    notes = []
    environments = [run.environment for group in groups for run in group.runs]
    for key in dict.fromkeys(key for each in environments for key in each):
        values = dict.fromkeys(str(each.get(key)) for each in environments)
        if len(values) > 1:
            consequence = "times do not compare" if key in ("hostname", "platform") else "numbers may differ by it"
            notes.append(f"Not the same {key} for all ({', '.join(values)}): {consequence}.")
    return notes
