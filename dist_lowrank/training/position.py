"""Where a rank is: told by the training loop, read by the watchdog and by whoever reports an error."""

from __future__ import annotations


class Position:
    """The step and the phase that this rank is in, and how many phases it has been through."""

    def __init__(self) -> None:
        self.step = 0
        self.phase = "start"
        self.entered = 0

    def enter(self, phase: str, step: int | None = None) -> None:
        """Says that a phase begins: forward, backward, step, evaluate, save. `step` None: the same as before."""
        if step is not None:
            self.step = step
        self.phase = phase
        self.entered += 1

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step}"
