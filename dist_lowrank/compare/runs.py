"""What a run folder tells about its run: the configuration, the curves, memory and speed of each rank."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lowrank.config import ConfigError, RunFolder, open_run
from dist_lowrank.telemetry import tags
from dist_lowrank.telemetry.causes import is_cause, is_state

_MEMORY = tags.memory_bytes("")
_AT_PEAK = tags.memory_at_peak_bytes("")
_ENERGY = tags.captured_energy("")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of rank 0's metrics, on both axes that runs are aligned by."""

    step: int
    tokens: int  # of all ranks, since the run's first step
    seconds: float  # of training since the first step; without evaluations, interruptions and start-up
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank of a run."""

    memory_bytes: Mapping[str, int]  # by cause, the most at any logged step; also figures that are no causes
    state_bytes: int  # all that the optimizer holds, its dictionary included; the most at any logged step
    total_bytes: int  # all that it held from step to step, the most at any logged step
    at_peak: Mapping[str, int]  # by cause, `residual` and `total` included, at that peak; empty if no step was tracked
    optimizer_milliseconds: float | None  # per step; the first logged one, in which everything warms up, left out
    optimizer_share: float | None  # of the time of a step, 0 to 1

    @property
    def peak_bytes(self) -> int | None:
        """All that it held at the peak of a tracked step; None if no step was tracked."""
        return self.at_peak.get("total")


@dataclass(frozen=True, slots=True)
class Run:
    """One run, of which all attempts count: a later one replaces what an earlier one logged from its first step on."""

    given: str  # the path as the user wrote it
    folder: RunFolder  # the latest attempt that logged a step
    config: Mapping[str, Any]  # as it was stored; it may hold keys that this version does not know
    is_finished: bool
    entries: Sequence[Entry]
    ranks: Sequence[Rank]
    environment: Mapping[str, str | None]  # hostname, platform, versions of packages

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def tokens_per_step(self) -> int:
        return int(self.config["train"]["global_batch_size"]) * int(self.config["data"]["sequence_length"])

    def curve(self, tag: str) -> list[tuple[int, float, float]]:
        """(tokens, seconds, value) of each entry that has the tag."""
        return [(each.tokens, each.seconds, each.values[tag]) for each in self.entries if tag in each.values]

    def families(self) -> list[str]:
        """The families of matrices whose captured energy was logged."""
        found = dict.fromkeys(tag for each in self.entries for tag in each.values if tag.startswith(_ENERGY))
        return [tag.removeprefix(_ENERGY) for tag in found]

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens by seconds of all logged steps but the first."""
        rates = _without_warm_up([value for *_, value in self.curve(tags.TOKENS_PER_SECOND)])
        return len(rates) / sum(1 / rate for rate in rates) if rates and min(rates) > 0 else None


def read_run(given: str) -> Run:
    """Reads the run, finished or not, at a folder of a run or of an attempt.

    Raises:
        ConfigError: if no run is there, if it has logged no step, or if a file is damaged; it names the folder or file.
    """
    folder = open_run(given)
    merged: list[dict[str, Any]] = []
    latest = None
    for attempt in range(1, folder.attempt + 1):
        candidate = RunFolder(folder.path, attempt)
        lines = list(_lines(candidate.metrics(0)))
        if any(tags.LOSS_TRAIN in line for line in lines):
            latest = candidate
        if lines:
            merged = [line for line in merged if line["step"] < lines[0]["step"]] + lines
    if latest is None:
        raise ConfigError(f"{given}: the run has logged no step; allowed: runs with at least one logged step")
    record = _json(latest.attempt_path / "run.json")
    provenance = _json(latest.attempt_path / "provenance.json")
    config = record["config"]
    tokens_per_step = config["train"]["global_batch_size"] * config["data"]["sequence_length"]
    return Run(
        given=given,
        folder=latest,
        config=config,
        is_finished=folder.is_finished and _json(folder.path / "FINISHED").get("attempt") == latest.attempt,
        entries=_entries(merged, tokens_per_step),
        ranks=[_rank(list(_lines(path)), tokens_per_step) for path in _rank_files(latest)],
        environment={key: provenance.get(key) for key in ("hostname", "platform")} | record["versions"],
    )


def _entries(lines: Sequence[dict[str, Any]], tokens_per_step: int) -> list[Entry]:
    entries: list[Entry] = []
    tokens_before, seconds = 0, 0.0
    for line in lines:
        values = {tag: float(value) for tag, value in line.items() if tag not in ("step", "time")}
        tokens = line["step"] * tokens_per_step
        rate = values.get(tags.TOKENS_PER_SECOND)
        if rate:
            seconds += (tokens - tokens_before) / rate
            tokens_before = tokens
        entries.append(Entry(line["step"], tokens, seconds, values))
    return entries


def _rank_files(folder: RunFolder) -> list[Path]:
    files = sorted(folder.metrics(0).parent.glob("rank_*.jsonl"))
    missing = [folder.metrics(rank) for rank in range(len(files)) if folder.metrics(rank) not in files]
    if missing:
        raise ConfigError(f"{missing[0]}: is missing; allowed: a folder with the metrics of every rank")
    return files


def _rank(lines: Sequence[dict[str, Any]], tokens_per_step: int) -> Rank:
    memory: dict[str, int] = {}
    at_peak: dict[str, int] = {}
    state_bytes = total_bytes = 0
    for line in lines:
        held = {tag.removeprefix(_MEMORY): int(n) for tag, n in line.items() if tag.startswith(_MEMORY)}
        for cause, number in held.items():
            memory[cause] = max(number, memory.get(cause, number))
        state_bytes = max(state_bytes, sum(number for cause, number in held.items() if is_state(cause)))
        held_through = [number for cause, number in held.items() if is_cause(cause)]
        peak = {tag.removeprefix(_AT_PEAK): int(n) for tag, n in line.items() if tag.startswith(_AT_PEAK)}
        if peak.get("total", 0) > at_peak.get("total", 0):
            at_peak = peak
        total_bytes = max(total_bytes, sum(held_through))
    timed = _without_warm_up([line for line in lines if line.get(tags.TOKENS_PER_SECOND)])
    milliseconds = [line[tags.OPTIMIZER_MILLISECONDS] for line in timed]
    step_milliseconds = [1000 * tokens_per_step / line[tags.TOKENS_PER_SECOND] for line in timed]
    return Rank(
        memory_bytes=memory,
        state_bytes=state_bytes,
        total_bytes=total_bytes,
        at_peak=at_peak,
        optimizer_milliseconds=math.fsum(milliseconds) / len(timed) if timed else None,
        optimizer_share=math.fsum(milliseconds) / math.fsum(step_milliseconds) if timed else None,
    )


def _without_warm_up(logged: list[Any]) -> list[Any]:
    return logged[1:] if len(logged) > 1 else logged


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a metrics file; without a last line that a killed process has not finished."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if number == len(lines):  # after the last line break
            return
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}: line {number} is not JSON; allowed: one JSON object per line") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); allowed: the JSON file that a run writes") from error
    return data
