"""The fault matrix of docs/faults.md: what is to happen when a fault strikes a phase, and the table of what did.

`make fault-matrix` runs all of `test_fault_matrix.py` and writes the table; `make test` runs the cells of `QUICK`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import product

from faults import ACTIONS, PLACES
from worker_processes import KILLED

from dist_lowrank.exit_codes import ExitCode

BEGIN = "<!-- fault matrix: written by `make fault-matrix` from the tests; do not edit -->"
END = "<!-- end of the fault matrix -->"

CELLS = tuple(product(ACTIONS, PLACES))
# A third of the cells: each fault and each phase in two or three of them.
QUICK = (
    *(("exception", "forward"), ("exception", "save")),
    *(("SIGTERM", "backward"), ("SIGTERM", "save")),
    *(("SIGKILL", "step"), ("SIGKILL", "refresh"), ("SIGKILL", "save")),
    ("SIGSTOP", "refresh"),
    *(("NaN gradient", "backward"), ("NaN gradient", "step")),
    ("corrupted shard", "forward"),
    *(("full disk", "forward"), ("full disk", "save")),
    ("slow rank", "refresh"),
    ("wrong configuration", "step"),
)


@dataclass(frozen=True)
class Outcome:
    """What a cell promises.

    `codes`: of rank 0 and rank 1, which the fault strikes. `then`: of both ranks at the next start, if that is refused.
    `same`: at last the run ends as one that nothing happened to, to the bit.
    """

    codes: tuple[int, int]
    says: str
    cell: str
    then: ExitCode | None = None
    same: bool = True

    @property
    def ends_at_once(self) -> bool:
        return self.codes == (0, 0)


def outcome_of(kind: str, place: str) -> Outcome:
    """The documented outcome of a cell."""
    failed, dead = ExitCode.FAILED, (ExitCode.FAILED, KILLED)
    if kind == "exception" and place == "save":
        return Outcome((0, 0), "no checkpoint was saved: ", "0, told; the next save succeeds")
    if kind == "NaN gradient" and place in ("forward", "backward"):
        return Outcome((0, 0), "loss or gradient is not finite; update skipped", "0, update skipped", same=False)
    return {
        "exception": Outcome((failed, failed), "a fault of the test", "1, continues"),
        "SIGTERM": Outcome((ExitCode.REQUEUE,) * 2, "stopped after step", "75, continues"),
        "SIGKILL": Outcome(dead, "", "1, continues"),
        "SIGSTOP": Outcome((ExitCode.HANG, KILLED), "rank 1 (process ", "76, continues"),
        "NaN gradient": Outcome((ExitCode.NOT_FINITE,) * 2, "not finite 2 times in a row", "67, continues"),
        "corrupted shard": Outcome(dead, "", "69, file named; falls back, continues", ExitCode.CHECKPOINT),
        "full disk": Outcome((failed, failed), "No space left on device", "1, continues"),
        "slow rank": Outcome((0, 0), "", "0"),
        "wrong configuration": Outcome(dead, "", "66, rank named; continues", ExitCode.RANKS_DIFFER),
    }[kind]


def render(broken: Collection[tuple[str, str]] = ()) -> str:
    """The table in Markdown. `broken`: cells whose tests did not pass."""
    lines = ["| fault | " + " | ".join(f"during {place}" for place in PLACES) + " |", "|---" * (len(PLACES) + 1) + "|"]
    for kind in ACTIONS:
        cells = ["FAILING" if (kind, place) in broken else outcome_of(kind, place).cell for place in PLACES]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_in(text: str) -> str:
    """What stands between the two comments of the page."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def with_table(text: str, table: str) -> str:
    """The page with another table between its two comments."""
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n\n{table}\n\n{END}{text.partition(END)[2]}"
