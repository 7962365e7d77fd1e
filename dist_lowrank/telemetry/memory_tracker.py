"""What a step holds, by cause and moment by moment: every storage of a device from its making to its end.

torch tells a dispatch mode of each operator with what goes in and comes out. From that this module keeps a list of
events, a storage that begins, ends or is resized, and what is known of each storage: in which phase it was made and
whether it outlived it, whether a collective took it, whether it was used as a parameter. The list is read after the
step, when it is also known which storages are weights, gradients and state, so a cause depends on all that became of
a storage and not on when it was made: state that the first step makes is state, and not workspace of the optimizer.

Not seen is what an operator makes and frees within itself. On a GPU the allocator's own count shows it as `residual`.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_lowrank.telemetry.causes import OF_STEP, RESIDUAL

Origin = Literal["found", "met", "made"]  # before the step; as what an operator takes; as what it returns
_COLLECTIVES = ("c10d", "_c10d_functional", "_dtensor")


@dataclass(frozen=True, slots=True)
class StepMemory:
    """The memory of one step on one rank, in bytes.

    `at_peak` is by cause, at the moment at which the rank held the most: with `residual` it adds up to `total_bytes`,
    which is the allocator's count on a GPU, and elsewhere what all storages that were found take. `most` has, of each
    cause that lives within a step, the most at any one moment.
    """

    total_bytes: int
    at_peak: Mapping[str, int]
    most: Mapping[str, int]


@dataclass(slots=True, eq=False)
class _Storage:
    """One storage, and what is known of it."""

    origin: Origin
    phase: int  # in which it was first seen: even between backward passes, odd within one
    for_backward: bool  # first seen while gradients were recorded
    of_optimizer: bool  # first seen in an optimizer's step
    first_event: int  # at which it was first seen
    size_bytes: int = 0
    communicated: bool = False
    as_parameter: bool = False
    cause: str | None = None
    last_phase: int | None = None
    reference: Any = None

    @property
    def was_there(self) -> bool:
        """Before the step. Of what was met that is not known, so it follows from what became of it.

        Buckets, which only DDP's and DeepSpeed's own code holds, are met when they are filled, and then sent. gloo
        makes copies unseen, which go as soon as they are met.
        """
        stayed = self.cause is not None or self.communicated or self.last_phase is None
        return self.origin == "found" or (self.origin == "met" and stayed)

    @property
    def found_cause(self) -> str:
        """The first that applies."""
        if self.cause is not None:
            return self.cause
        if self.as_parameter:
            return "gathered_parameters"
        if self.communicated:
            return "collective_buffers"
        if self.was_there:  # and nobody knows what for
            return RESIDUAL
        if self.of_optimizer:
            return "refresh_workspace"
        recomputed = self.phase % 2 == 1
        kept = recomputed or self.last_phase is None or self.last_phase > self.phase
        return "activations" if self.for_backward and self.origin == "made" and kept else "temporaries"


class MemoryTracker(TorchDispatchMode):
    """Follows one step, entered before its first forward pass and left after its update; `told` then tells.

    Args:
        model: what is called in training; its buffers and its tensor inputs are told by themselves.
        optimizer: whose `step` is the update, however it is called.
        held: all tensors by cause that stay from step to step, at the time of the call. Asked at the beginning, before
            the update, when gradients are there, and after it, when state is.
        device: whose memory is told.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        held: Callable[[], Mapping[str, Iterable[Tensor]]],
        device: torch.device,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = torch.empty(0, device=device).device  # with its number
        self._model, self._optimizer, self._held = model, optimizer, held
        self._live: dict[int, _Storage] = {}  # by the address of what torch knows of the storage
        self._events: list[tuple[_Storage, int, int | None]] = []  # by how much it grew; what the allocator then had
        self._phase, self._asked_in_phase, self._of_optimizer = 0, -1, False
        self._stack = ExitStack()

    # From the first forward pass to the update -------------------------------------------------------------------

    def __enter__(self) -> MemoryTracker:
        for tensor in (each for each in gc.get_objects() if issubclass(type(each), Tensor)):
            self._meet(tensor, "found")
        self._name({"buffers": self._model.buffers()})
        self._name(self._held())
        handles = [
            self._model.register_forward_pre_hook(self._note_inputs, with_kwargs=True),
            self._optimizer.register_step_pre_hook(lambda *_: self._enter_optimizer()),
            self._optimizer.register_step_post_hook(lambda *_: self._leave_optimizer()),
        ]
        for handle in handles:
            self._stack.callback(handle.remove)
        self._stack.enter_context(_told_of_resizes(self._resized))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()
        self._name(self._held())
        for storage in self._live.values():
            storage.reference = None
        self._live.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it comes again, with the local tensors
        kwargs = kwargs or {}
        within_backward = torch._C._current_graph_task_id() != -1
        if within_backward != self._phase % 2:
            self._phase += 1
        communicates = func.namespace in _COLLECTIVES
        if communicates and self._asked_in_phase != self._phase:  # for buckets that are there only now
            self._asked_in_phase = self._phase
            self._name({"collective_buffers": self._held().get("collective_buffers", ())})
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, Tensor):
                self._meet(each, "met", communicates=communicates, as_parameter=isinstance(each, nn.Parameter))
        result = func(*args, **kwargs)
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._meet(each, "made", communicates=communicates)
        return result

    def _meet(
        self, tensor: Tensor, origin: Origin, *, communicates: bool = False, as_parameter: bool = False
    ) -> _Storage | None:
        """What is known of a tensor's storage, `origin` if it is seen for the first time; None on other devices."""
        if tensor.device != self.device or isinstance(tensor, DTensor) or tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        known = self._live.get(storage._cdata)
        if known is None:
            recorded = torch.is_grad_enabled()
            known = _Storage(origin, self._phase, recorded, self._of_optimizer, len(self._events))
            known.reference = weakref.ref(storage, partial(self._end, storage._cdata))
            self._live[storage._cdata] = known
            self._resize(known, storage.nbytes())
        elif known.size_bytes != storage.nbytes():
            self._resize(known, storage.nbytes())
        known.communicated |= communicates
        known.as_parameter |= as_parameter
        return known

    def _resize(self, known: _Storage, size_bytes: int) -> None:
        allocated_bytes = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else None
        self._events.append((known, size_bytes - known.size_bytes, allocated_bytes))
        known.size_bytes = size_bytes

    def _end(self, address: int, reference: Any) -> None:
        known = self._live.get(address)
        if known is not None and known.reference is reference:
            del self._live[address]
            known.last_phase = self._phase
            self._resize(known, 0)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        known = self._live.get(storage._cdata)
        if known is not None:
            self._resize(known, storage.nbytes())

    def _name(self, by_cause: Mapping[str, Iterable[Tensor]]) -> None:
        """The first name that a storage gets is its cause."""
        for cause, tensors in by_cause.items():
            for tensor in tensors:
                known = self._meet(tensor.to_local() if isinstance(tensor, DTensor) else tensor, "met")
                if known is not None and known.cause is None:
                    known.cause = cause

    def _note_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._name({"inputs": [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]})

    def _enter_optimizer(self) -> None:
        self._name(self._held())
        self._of_optimizer = True

    def _leave_optimizer(self) -> None:
        self._of_optimizer = False
        self._name(self._held())

    # Afterwards --------------------------------------------------------------------------------------------------

    def told(self) -> StepMemory:
        """Goes through the step again, now that causes are known; to be called when it is over."""
        causes = {storage: storage.found_cause for storage, *_ in self._events}
        there = {storage for storage in causes if storage.was_there}
        now = dict.fromkeys((*OF_STEP, *causes.values(), RESIDUAL), 0)
        for storage in there:
            now[causes[storage]] += self._events[storage.first_event][1]
        now_bytes, peak_bytes = sum(now.values()), -1
        at_peak, most = dict(now), dict(now)
        for index, (storage, more_bytes, allocated_bytes) in enumerate(self._events):
            if storage not in there or index != storage.first_event:
                cause = causes[storage]
                now[cause] += more_bytes
                now_bytes += more_bytes
                most[cause] = max(most[cause], now[cause])
            measured_bytes = now_bytes if allocated_bytes is None else allocated_bytes
            if measured_bytes > peak_bytes:
                peak_bytes, at_peak = measured_bytes, dict(now)
        at_peak[RESIDUAL] += peak_bytes - sum(at_peak.values())
        return StepMemory(peak_bytes, at_peak, {cause: most[cause] for cause in OF_STEP})


@contextmanager
def _told_of_resizes(tell: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """FSDP2 frees and fills gathered weights by resizing their storages, of which no operator tells."""
    original = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = original(storage, size)
        tell(storage)
        return result

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]
