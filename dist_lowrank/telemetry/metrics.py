"""One writer per rank: every entry goes to a JSON-lines file and to TensorBoard, from the same numbers."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from dist_lowrank.telemetry.charts import Layout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch.utils.tensorboard import SummaryWriter

# Some versions of TensorBoard's writer rewrite other characters, and the two files would then disagree on the name.
_TAG = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)
_RESERVED = ("step", "time")


class MetricsWriter:
    """Writes scalars under the same names to a JSON-lines file and to TensorBoard event files.

    Each line is `{"step": 20, "time": 1760000000.0, "loss/train": 6.1, ...}`: `time` is in seconds since the epoch
    and equals the event's wall time. JSON holds Python's full precision, events hold the nearest float32, which is
    what a TensorBoard scalar is. JSON has no number for values that are not finite, so they are written as the strings
    `"NaN"`, `"Infinity"` and `"-Infinity"`, which `float()` reads back; events hold the value itself. Both files are
    flushed at each entry, so that a process that dies loses nothing that it logged. A file that can no longer be
    written, as on a full disk, is told of once; the run goes on without it.

    Args:
        jsonl_path: The JSON-lines file. Lines are appended, so a restarted run continues it. Its folder is made.
        tensorboard_path: Folder of this rank's event files; None writes none.
    """

    def __init__(self, jsonl_path: Path, tensorboard_path: Path | None) -> None:
        jsonl_path.parent.mkdir(parents=True, exist_ok=True)
        self._path = jsonl_path
        self._lines: TextIO | None = jsonl_path.open("a", encoding="utf-8")
        self._events: SummaryWriter | None = None
        self._closed = False
        if tensorboard_path is not None:
            from torch.utils.tensorboard import SummaryWriter  # runs without TensorBoard do not need it installed

            self._events = SummaryWriter(str(tensorboard_path))

    @property
    def shows_events(self) -> bool:
        """Whether event files are written."""
        return self._events is not None

    def log(self, step: int, values: Mapping[str, float], only_events: Mapping[str, float] | None = None) -> None:
        """Writes one entry: one JSON line, and one TensorBoard scalar per value.

        Args:
            step: Optimizer steps done.
            values: Value by tag (see `dist_lowrank.telemetry.tags`). Integers stay integers in JSON.
            only_events: The same numbers again, under further tags that only a chart needs.

        Raises:
            ValueError: A tag is `step` or `time`, or has characters that TensorBoard would change; or the writer is
                closed.
        """
        scalars = {**values, **(only_events or {})}
        for tag in scalars:
            if tag in _RESERVED or not _TAG.fullmatch(tag):
                raise ValueError(
                    f"metric tag {tag!r}: must be letters, digits, '_', '-' and '.' in parts separated by '/', "
                    f"and not one of {', '.join(_RESERVED)}"
                )
        if self._closed:
            raise ValueError(f"{self._path}: is closed")
        now_seconds = time.time()
        entry = {"step": step, "time": now_seconds, **{tag: _json_number(value) for tag, value in values.items()}}
        if self._lines is not None:
            try:
                self._lines.write(json.dumps(entry, allow_nan=False) + "\n")
                self._lines.flush()
            except OSError as error:
                self._give_up_lines(error)

        def add(events: SummaryWriter) -> None:
            for tag, value in scalars.items():
                events.add_scalar(tag, float(value), step, walltime=now_seconds)

        self._add(add)

    def text(self, tag: str, text: str) -> None:
        """Shows Markdown text, such as the resolved configuration, in TensorBoard. JSON lines hold numbers only."""
        self._add(lambda events: events.add_text(tag, text))

    def image(self, tag: str, step: int, rgb: NDArray[np.uint8]) -> None:
        """Shows a picture, (height, width, 3), in TensorBoard."""
        self._add(lambda events: events.add_image(tag, rgb, step, dataformats="HWC"))

    def charts(self, layout: Layout) -> None:
        """Says what TensorBoard's custom-scalars tab shows, in place of what was said before."""
        self._add(lambda events: events.add_custom_scalars(layout))

    def _add(self, to: Callable[[SummaryWriter], None]) -> None:
        if self._events is not None:
            try:
                to(self._events)
                self._events.flush()
            except OSError as error:
                self._give_up_events(error)

    def close(self) -> None:
        """Closes both files. Closing again does nothing."""
        self._closed = True
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        if self._events is not None:
            try:
                self._events.close()
                self._events = None
            except OSError as error:
                self._give_up_events(error)

    def _give_up_lines(self, error: OSError) -> None:
        print(f"{self._path}: {error.strerror}; the run goes on without these lines", file=sys.stderr, flush=True)
        assert self._lines is not None
        lines, self._lines = self._lines, None
        with contextlib.suppress(OSError):
            lines.close()  # tries again to write what is left

    def _give_up_events(self, error: OSError) -> None:
        print(f"TensorBoard events: {error.strerror}; the run goes on without them", file=sys.stderr, flush=True)
        self._events = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _json_number(value: float) -> int | float | str:
    """A value that strict JSON can hold; numpy scalars become Python's."""
    if isinstance(value, int):
        return value
    number = float(value)
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return number
