"""What the loop makes of numbers that go wrong: updates skipped too often, and losses that jump."""

from __future__ import annotations

import math
import statistics
from collections import deque
from itertools import pairwise

from dist_lowrank.exit_codes import NotFinite


class SkippedInARow:
    """Counts updates skipped one after the other because loss or gradient was not finite.

    Args:
        limit: how many end the run.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0

    def note(self, step: int, skipped: bool) -> None:
        """Notes a step.

        Raises:
            NotFinite: the limit is reached.
        """
        self.count = self.count + 1 if skipped else 0
        if self.count >= self.limit:
            raise NotFinite(
                f"step {step}: loss or gradient was not finite {self.count} times in a row "
                f"(train.max_skipped_steps: {self.limit})"
            )


def check_not_mostly_skipped(skipped_steps: int, steps: int) -> None:
    """Refuses to call a run complete that is not.

    Raises:
        NotFinite: more than half of the updates were skipped.
    """
    if 2 * skipped_steps > steps:
        raise NotFinite(f"{skipped_steps} of {steps} updates were skipped: loss or gradient was not finite")


class LossSpikes:
    """Tells losses far above those of the last steps; it only tells.

    A spike lies above their median by more than six standard deviations of the noise and by more than 1 % of the
    median. The noise is estimated from the median of the changes from step to step, so that neither a falling loss nor
    earlier spikes hide a spike.

    Args:
        window_steps: how many losses it remembers; it is silent until half of that is there.
    """

    def __init__(self, window_steps: int = 64) -> None:
        self._recent: deque[float] = deque(maxlen=window_steps)

    def median_if_spike(self, loss: float) -> float | None:
        """Notes a loss; returns the median of the last ones if this one is a spike. Ignores what is not finite."""
        if not math.isfinite(loss):
            return None
        found = None
        if len(self._recent) * 2 >= (self._recent.maxlen or 0):
            median = statistics.median(self._recent)
            changes = [abs(after - before) for before, after in pairwise(self._recent)]
            noise = 1.4826 / math.sqrt(2) * statistics.median(changes)
            if loss - median > max(6 * noise, 0.01 * abs(median)):
                found = median
        self._recent.append(loss)
        return found
