"""Measures what a function allocates on the CPU: every allocation and release of torch's allocator, in order.

Temporaries inside of torch's kernels count too. What numpy, scipy, MKL or gloo allocate by themselves does not.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # no line for each start


@dataclass(frozen=True, slots=True)
class Allocations:
    peak_bytes: int  # most that was live at once, beside what was before
    remaining_bytes: int  # still live at the end
    count: int


def allocations_of(function: Callable[[], Any]) -> Allocations:
    """Of one call; its result is dropped. What is garbage before goes before; what becomes garbage stays."""
    gc.collect()
    gc.disable()
    try:
        return _profiled(function)
    finally:
        gc.enable()


def peaks_within(profiler: profile, prefix: str) -> dict[str, int]:
    """The most that torch had given out since the profiler began, within each `record_function` named so.

    Only this thread's allocations are told. What another thread frees, as gloo's does, counts until its address is
    given out again.
    """
    allocations, spans = [], {}
    nodes = list(profiler.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        if node.tag.name == "Allocation":
            allocations.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
        elif node.name.startswith(prefix):
            spans[node.name] = node.start_time_ns, node.end_time_ns
        nodes += node.children
    held: dict[int, int] = {}
    live, peaks = 0, dict.fromkeys(spans, 0)
    for time_ns, address, size in sorted(allocations):
        live -= held.pop(address, 0)
        if size > 0:
            held[address] = size
            live += size
        for name, (start_ns, stop_ns) in spans.items():
            if start_ns <= time_ns <= stop_ns:
                peaks[name] = max(peaks[name], live)
    return peaks


def _profiled(function: Callable[[], Any]) -> Allocations:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    live = peak = count = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
            count += event.nbytes() > 0
    return Allocations(peak, live, count)
