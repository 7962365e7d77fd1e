"""The console of rank 0: a live bar in a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import math
import os
import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

_REDRAW_SECONDS = 0.1


class Console:
    """Shows how a run goes.

    In a terminal, a bar and a line of figures are redrawn in place and other lines scroll above them. Elsewhere (a
    file, a pipe, `TERM=dumb`) each entry is a plain line that `grep` can rely on. `NO_COLOR` is honoured.

    Use it as a context manager. No thread runs, no key is read, the terminal's settings are not touched and its cursor
    is never left hidden, so that even a killed process leaves a sane terminal behind.

    Args:
        enabled: False on every rank but 0: nothing is ever printed.
        interval: Steps between plain lines. The first and the last step are printed too.
        stream: Where to print; None means `sys.stdout`.
    """

    def __init__(self, *, enabled: bool = True, interval: int = 10, stream: TextIO | None = None) -> None:
        self._enabled = enabled
        self._interval = interval
        self._stream = stream if stream is not None else sys.stdout
        # Not rich's own test: FORCE_COLOR, which many build servers set, would draw bars into their log files.
        in_terminal = enabled and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._terminal = _Terminal(self._stream) if in_terminal else None
        self._total_steps = 0
        self._printed_step: int | None = None

    def start(self, total_steps: int, completed_steps: int = 0) -> None:
        """Says how many optimizer steps the run has, and how many were done before this process; draws the bar."""
        self._total_steps = total_steps
        if self._terminal:
            self._terminal.start(total_steps, completed_steps)

    def step(
        self,
        step: int,
        *,
        loss: float,
        learning_rate: float,
        tokens_per_second: float | None = None,
        flops_per_second: float | None = None,
        mfu: float | None = None,
        optimizer_share: float | None = None,
        eta_seconds: float | None = None,
    ) -> None:
        """Shows the figures after a step. Call it as often as there are figures; plain lines keep to the interval.

        Args:
            step: Optimizer steps done.
            loss: Nats per token.
            learning_rate: Of this step.
            tokens_per_second: Of the whole job.
            flops_per_second: The model's floating-point operations per second, of the whole job.
            mfu: Fraction of the GPUs' peak, 0 to 1.
            optimizer_share: Fraction of the step's time that the optimizer took, 0 to 1.
            eta_seconds: Until the last step.
        """
        if not self._enabled or not (self._terminal or self._is_due(step)):
            return
        figures = [f"loss {loss:.4f}", f"lr {learning_rate:.2e}"]
        if tokens_per_second is not None:
            figures.append(f"{quantity(tokens_per_second)} tokens/s")
        if flops_per_second is not None:
            figures.append(f"{quantity(flops_per_second, separator=' ')}FLOP/s")
        if mfu is not None:
            figures.append(f"MFU {mfu:.1%}")
        if optimizer_share is not None:
            figures.append(f"optimizer {optimizer_share:.0%}")
        eta = "" if eta_seconds is None else f"ETA {duration(eta_seconds)}"
        if self._terminal:
            self._terminal.update(step, "  ".join(figures), eta, at_once=step == self._total_steps)
        else:
            self._printed_step = step
            self.line("  ".join([f"step {step}/{self._total_steps}", *figures, *([eta] if eta else [])]))

    def _is_due(self, step: int) -> bool:
        """Whether a multiple of the interval lies between the last printed step and this one."""
        if self._printed_step is None or step == self._total_steps:
            return True
        return step // self._interval > self._printed_step // self._interval

    def validation(self, step: int, loss: float, perplexity: float) -> None:
        """Prints the result of an evaluation, in nats per token."""
        self.line(f"step {step}/{self._total_steps}  validation loss {loss:.4f}  perplexity {perplexity:.2f}")

    def line(self, text: str) -> None:
        """Prints text as it is, above the bar if there is one. Long lines are not broken."""
        if self._terminal:
            self._terminal.line(text)
        elif self._enabled:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the last state of the bar behind and ends it. `line` still works. Closing again does nothing."""
        if self._terminal:
            self._terminal.close()

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Terminal:
    """The bar, with one line of figures under it."""

    def __init__(self, stream: TextIO) -> None:
        self._rich = RichConsole(file=stream, force_terminal=True, highlight=False)
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[eta]}"),
            console=self._rich,
            expand=True,
        )
        self._figures = Text(no_wrap=True, overflow="ellipsis")
        # What other code prints scrolls above the bar, unless the user sent it elsewhere.
        self._live = Live(
            Group(self._progress.get_renderable(), self._figures),
            console=self._rich,
            auto_refresh=False,
            redirect_stdout=stream is sys.stdout,
            redirect_stderr=sys.stderr.isatty(),
        )
        self._drawn_seconds = -math.inf

    def start(self, total_steps: int, completed_steps: int) -> None:
        self._task = self._progress.add_task("", total=total_steps, completed=completed_steps, eta="")
        self._live.start()
        self._rich.show_cursor(True)  # rich hides it, and a process that is killed could not bring it back
        self._draw()

    def update(self, step: int, figures: str, eta: str, *, at_once: bool) -> None:
        self._progress.update(self._task, completed=step, eta=eta)
        self._figures.plain = figures
        if at_once or time.monotonic() - self._drawn_seconds >= _REDRAW_SECONDS:
            self._draw()

    def _draw(self) -> None:
        self._drawn_seconds = time.monotonic()
        self._live.update(Group(self._progress.get_renderable(), self._figures), refresh=True)

    def line(self, text: str) -> None:
        if self._live.is_started:
            self._draw()  # printing draws the last bar again, which may be of an earlier step
        self._rich.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        if self._live.is_started:
            self._draw()
            self._live.stop()


def quantity(value: float, *, separator: str = "") -> str:
    """A number with a metric prefix: `3.2k`; with a separator `12.3 G`, for a unit to follow."""
    if not math.isfinite(value):
        return f"{value}{separator}"
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 999.5:
            return f"{value:.3g}{separator}{prefix}"
        value /= 1000
    return f"{value:.3g}{separator}E"


def duration(seconds: float) -> str:
    """A time as `1:02` (minutes and seconds) or `1:00:02` (hours too)."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, seconds_left = divmod(max(0, round(seconds)), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours}:{minutes_left:02}:{seconds_left:02}" if hours else f"{minutes}:{seconds_left:02}"
