"""DeepSpeed's ZeRO, stages 0 to 3, with exact low-rank state: tells an optimizer what DeepSpeed's flat tensors hold.

    import dist_lowrank.strategies.deepspeed                       # before deepspeed.initialize
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=DCTAdamW(...), config=...)
    dist_lowrank.strategies.deepspeed.bind(engine)

Importing this module switches off the operator that DeepSpeed compiles on a CPU within `init_distributed`, which takes
minutes and serves inference alone.

What is read of DeepSpeed, here alone, are private attributes, as they are in 0.19.8. Nothing is believed: offsets come
from where the model's weights lie in DeepSpeed's buffers, which has to be the order of their gradients; every element
of this rank's part has to be claimed once; and what the flat tensors hold has to equal the model's weights. What
differs, is not covered or is not known is refused, on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from torch import Tensor

from dist_lowrank.optim.binding import canonical_name
from dist_lowrank.optim.engine import LowRankOptimizer
from dist_lowrank.sharding.flat_slices import FlatSlice
from dist_lowrank.sharding.layouts import LayoutError
from dist_lowrank.sharding.pieces import FlatPart
from dist_lowrank.strategies.flat_claims import FlatTensor, Run, check_claims, check_weights, read_buffer

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_ALIGNMENT_BYTES = 16  # of parameters, with `parameter_alignment`


def bind(engine: Any) -> None:
    """Tells the engine's optimizer, one of `dist_lowrank.optim`, what it has to know. Collective; no other effects.

    Call it once, after `deepspeed.initialize` and before the first step. Gradients need no agreement from then on:
    DeepSpeed has one of every parameter on all ranks.

    Raises:
        LayoutError: on every rank, if something is not covered or not as expected, saying what.
    """
    optimizer = _client(engine)
    refused = _not_covered(engine)
    if refused is not None:
        raise LayoutError(f"DeepSpeed: {refused}")
    wrapper = engine.optimizer
    if wrapper is optimizer:
        _check_given(optimizer)
    elif type(wrapper).__name__ == "FP16_UnfusedOptimizer":
        _bind_copies(engine, optimizer)
    else:
        _bind_flat(engine, optimizer)
    optimizer.agree_on_gradients = False


def held_tensors(engine: Any) -> dict[str, list[Tensor]]:
    """Parameters, `master_weights`, gradients and buckets that this rank holds now.

    Of gradients, those that are kept between backward and step, summed or not, without DeepSpeed's buckets.
    """
    wrapper = engine.optimizer
    weights = list(engine.module.parameters())
    lists = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
    masters = [tensor for name in lists for tensor in getattr(wrapper, name, ())]
    masters += [tensor for group in getattr(wrapper, "fp32_groups", ()) for tensor in group]
    gradients = [tensor.grad for tensor in (*weights, *masters) if tensor.grad is not None]
    gradients += [each for each in (getattr(weight, "grad_accum", None) for weight in weights) if each is not None]
    gradients += getattr(wrapper, "fp32_groups_gradients_flat", ())  # BF16_Optimizer
    kept = getattr(wrapper, "grad_partitions_flat_buffer", None)  # stage 3
    gradients += [kept] if kept is not None else []
    averaged = getattr(wrapper, "averaged_gradients", {})
    gradients += [each for parts in averaged.values() for each in parts or () if isinstance(each, Tensor)]
    parameters = [*weights, *(weight.ds_tensor for weight in weights if hasattr(weight, "ds_tensor"))]
    return {
        "parameters": parameters,
        "master_weights": masters,
        "gradients": gradients,
        **({"collective_buffers": buckets} if (buckets := _buckets(wrapper)) else {}),
    }


def _buckets(wrapper: Any) -> list[Tensor]:
    """In which gradients are sent: stage 3 keeps one, stages 1 and 2 have up to two while gradients are summed."""
    buffers = [bucket.buffer for bucket in getattr(wrapper, "ipg_buckets", {}).values()]
    buffers = [each for buffer in buffers for each in (buffer if isinstance(buffer, list) else [buffer])]
    return [buffer for buffer in buffers if buffer is not None]


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """The model's state dict on the CPU, of which rank 0 gets all; one weight is gathered at a time. Collective."""
    found = {}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        with _whole(tensor) as whole:
            if dist.get_rank() == 0:
                found[name] = whole.cpu().clone()
    return found


def flat_tensors(engine: Any, given: Any) -> list[FlatTensor]:
    """What the flat master weights of stages 1 to 3 hold of which parameters.

    Args:
        given: has the names of parameters as `given`, and `param_groups`; an optimizer of `dist_lowrank.optim`.

    Raises:
        LayoutError: a wrapper that is not known, or a layout that is not as expected.
    """
    wrapper = engine.optimizer
    if type(wrapper).__name__ not in _READERS:
        raise LayoutError(
            f"DeepSpeed: the wrapper {type(wrapper).__name__} is not known; allowed: {', '.join(_READERS)}"
        )
    return _READERS[type(wrapper).__name__](wrapper, given)


def _client(engine: Any) -> LowRankOptimizer:
    section = engine._config.optimizer_name
    if section is not None:
        raise LayoutError(
            f"DeepSpeed: its configuration has a section `optimizer` ({section}); allowed: none, and an optimizer of "
            "dist_lowrank.optim, as deepspeed.initialize(optimizer=...)"
        )
    client = getattr(engine, "basic_optimizer", None)
    if not isinstance(client, LowRankOptimizer):
        raise LayoutError(
            f"DeepSpeed: the engine's optimizer is {type(client).__name__}, which needs no bind(); allowed: an "
            "optimizer of dist_lowrank.optim, as deepspeed.initialize(optimizer=...)"
        )
    return client


def _not_covered(engine: Any) -> str | None:
    """Why this engine cannot be followed, if it cannot."""
    wrapper = engine.optimizer
    name, known = type(wrapper).__name__, (*_READERS, "FP16_UnfusedOptimizer")
    modes = {
        f"the engine {type(engine).__name__} is not known; allowed: DeepSpeedEngine": (
            type(engine) is not deepspeed.DeepSpeedEngine
        ),
        f"the wrapper {name} is not known; allowed: {', '.join(known)}, or none (stage 0 in fp32)": (
            wrapper is not engine.basic_optimizer
            and (name not in known or not type(wrapper).__module__.startswith("deepspeed.runtime."))
        ),
        "expert parallelism is not covered; allowed: models without MoE layers of DeepSpeed": engine.has_moe_layers,
        "tensor parallelism is not covered; allowed: data parallelism alone": (
            engine.mp_world_size > 1 or engine.autotp_size() > 1
        ),
        "sequence parallelism is not covered; allowed: data parallelism alone": engine.sequence_parallel_size > 1,
        "zenflow is not covered; allowed: without": engine.zenflow,
        "zero_hpz_partition_size is not covered; allowed: 1": engine.zero_hpz_partition_size() > 1,
        "quantized weights or gradients are not covered; allowed: zero_quantized_* false": (
            engine.zero_quantized_weights() or engine.zero_quantized_gradients()
        ),
        "DeepCompile is not covered; allowed: compile.deepcompile false": engine.is_deepcompile_enabled(),
        "low-precision master weights are not covered; allowed: fp32 master weights": (
            engine.fp16_master_weights_and_gradients() or engine.bf16_master_weights_and_gradients()
        ),
        "offload_optimizer to NVMe is not covered, its master weights exist only around a step; allowed: cpu, none": (
            getattr(wrapper, "swap_optimizer", False)
        ),
        "offload_optimizer with a ratio below 1 is not covered, a second optimizer works on the rest; allowed: 1.0": (
            getattr(wrapper, "offload_optimizer", False) and getattr(wrapper, "partial_offload", 1.0) != 1.0
        ),
        "offload_param is not covered; allowed: none": getattr(wrapper, "offload_param", False),
    }
    return next((reason for reason, applies in modes.items() if applies), None)


def _check_given(optimizer: LowRankOptimizer) -> None:
    """Stage 0 in fp32: the optimizer keeps its parameters, and needs to be told nothing."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in optimizer.given:
                raise LayoutError(
                    f"DeepSpeed: a parameter of shape {tuple(parameter.shape)} was put in the place of another; "
                    "allowed: the parameters that the optimizer was given"
                )


def _bind_copies(engine: Any, optimizer: LowRankOptimizer) -> None:
    """Stage 0 in 16 bits: the optimizer has a copy in fp32 of each parameter."""
    wrapper, copies, problem = engine.optimizer, {}, None
    for group, masters, weights in zip(optimizer.param_groups, wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
        for held, master, weight in zip(group["params"], masters, weights, strict=True):
            copies[master] = weight
            if held is not master or not torch.equal(master.detach().to(weight.dtype), weight.detach()):
                problem = problem or _differs(optimizer, weight)
    _raise_together(problem, engine.seq_data_parallel_group)
    optimizer.given.replace(copies)


def _differs(optimizer: LowRankOptimizer, weight: Any) -> str:
    return f"the master copy of parameter {optimizer.given.name(weight)!r} is not equal to the model's weight"


def _bind_flat(engine: Any, optimizer: LowRankOptimizer) -> None:
    """Stages 1 to 3: the optimizer has flat tensors, each with this rank's parts of many parameters."""
    flat_tensors: list[FlatTensor] = []
    try:
        flat_tensors = _READERS[type(engine.optimizer).__name__](engine.optimizer, optimizer)
        problem = None
    except LayoutError as error:
        problem = str(error)
    group = engine.seq_data_parallel_group
    _raise_together(problem, group)
    for flat in flat_tensors:
        problem = problem or _no_transport(flat) or check_claims(flat)
    _raise_together(problem, group)
    for flat in flat_tensors:  # gathers: all ranks go through all of it
        problem = check_weights(flat) or problem
    _raise_together(problem, group)
    for flat in flat_tensors:
        optimizer.declare_flat_parts({flat.tensor: [run.part for run in flat.runs]}, flat.group)
    stage_3 = type(engine.optimizer).__name__ == "DeepSpeedZeroOptimizer_Stage3"
    if stage_3:  # which empties the groups but for its steps
        engine.optimizer._set_fp32_optimizer_param_groups()
    optimizer.bind()
    if stage_3:
        engine.optimizer._clear_fp32_optimizer_param_groups()


def _no_transport(flat: FlatTensor) -> str | None:
    """The optimizer exchanges what lies where the flat tensors are."""
    try:
        flat.group._get_backend(flat.tensor.device)
    except RuntimeError:
        return (
            f"its flat tensors lie on {flat.tensor.device.type}, for which the process group has no backend; allowed "
            "with offload_optimizer: torch.distributed.init_process_group('cpu:gloo,cuda:nccl') before "
            "deepspeed.initialize"
        )
    return None


def _raise_together(problem: str | None, group: dist.ProcessGroup) -> None:
    """Raises on every rank if any has a problem. Collective."""
    texts: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(texts, problem, group=group)
    for rank, text in enumerate(texts):
        if text is not None:
            raise LayoutError(
                f"DeepSpeed {deepspeed.__version__}, rank {rank}: {text}. Its layout is not what this version of "
                "dist_lowrank knows (made with DeepSpeed 0.19.8), or something changed it; nothing was trained"
            )


# What DeepSpeed's wrappers say ---------------------------------------------------------------------------------------


def _read_stages_1_and_2(wrapper: Any, optimizer: Any) -> list[FlatTensor]:
    weights = wrapper.round_robin_bit16_groups  # in the order of gradients, also without round robin
    masters = wrapper.single_partition_of_fp32_groups
    return _read_buffers(wrapper, optimizer, weights, wrapper.bit16_groups_flat, masters)


def _read_bf16_optimizer(wrapper: Any, optimizer: Any) -> list[FlatTensor]:
    return _read_buffers(
        wrapper, optimizer, wrapper.bf16_groups, wrapper.bf16_groups_flat, wrapper.fp32_groups_flat_partition
    )


def _read_buffers(
    wrapper: Any,
    optimizer: LowRankOptimizer,
    weights: Sequence[Sequence[Tensor]],
    buffers: Sequence[Tensor],
    masters: Sequence[Tensor],
) -> list[FlatTensor]:
    """A buffer for each parameter group: weights one after the other, cut in equal parts."""
    # DeepSpeed steps its group i with the options of the optimizer's group i.
    held = [group["params"] for group in optimizer.param_groups]
    if len(held) != len(masters) or any(
        len(own) != 1 or own[0] is not flat for own, flat in zip(held, masters, strict=False)
    ):
        raise LayoutError(
            "the optimizer's parameter groups are not DeepSpeed's, in number or order: leave `param_groups` alone "
            "after deepspeed.initialize"
        )
    return [
        read_buffer(
            [(_name(optimizer, each), each) for each in parameters],
            buffer,
            master,
            group,
            largest_gap=_ALIGNMENT_BYTES // buffer.element_size() - 1,
            largest_end=wrapper.nccl_start_alignment_factor * dist.get_world_size(group) - 1,
        )
        for parameters, buffer, master, group in zip(
            weights, buffers, masters, wrapper.real_dp_process_group, strict=True
        )
    ]


def _read_stage_3(wrapper: Any, optimizer: Any) -> list[FlatTensor]:
    """A flat tensor for each sub-group: each parameter is cut by itself, its last part padded."""
    flat_tensors = []
    for number, parameters in enumerate(wrapper.fp16_groups):
        options = optimizer.param_groups[wrapper.sub_group_to_group_id[number]]
        buffer, group = wrapper.fp16_partitioned_groups_flat[number], wrapper.sub_group_process_groups[number]
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        runs, padding = [], []
        for parameter in parameters:
            name = _name(optimizer, parameter)
            if optimizer.given.group(parameter) is not options:
                raise LayoutError(
                    f"parameter {name!r} is not in the group that DeepSpeed takes for its own: leave `param_groups` "
                    "alone after deepspeed.initialize"
                )
            sub_group, offset, length = wrapper.grad_position[wrapper.get_param_id(parameter)]
            stored_bytes = parameter.ds_tensor.data_ptr() - buffer.data_ptr()
            if (sub_group, offset * buffer.element_size()) != (number, stored_bytes):
                raise LayoutError(
                    f"the part of parameter {name!r} is said to begin at element {offset} of sub-group {sub_group}, "
                    f"but lies {stored_bytes} bytes from the beginning of sub-group {number}"
                )
            cuts = [min(k * length, parameter.ds_numel) for k in range(world_size + 1)]
            slices = tuple(FlatSlice(tuple(parameter.ds_shape), cuts[k], cuts[k + 1]) for k in range(world_size))
            if cuts[-1] != parameter.ds_numel:
                raise LayoutError(f"{world_size} parts of {length} elements do not make parameter {name!r}")
            own = slices[rank]
            runs.append(Run(FlatPart(name, offset, slices), own, partial(_whole, parameter)))
            padding.append((offset + own.stop - own.start, offset + length))
        master = wrapper.fp32_partitioned_groups_flat[number]
        flat_tensors.append(FlatTensor(master, group, tuple(runs), tuple((a, b) for a, b in padding if a < b)))
    return flat_tensors


def _name(optimizer: LowRankOptimizer, parameter: Tensor) -> str:
    name = optimizer.given.name(parameter)
    if name is None:
        raise LayoutError(
            f"a parameter of shape {tuple(getattr(parameter, 'ds_shape', parameter.shape))} was not given to the "
            "optimizer"
        )
    return canonical_name(name)


@contextmanager
def _whole(weight: Tensor) -> Iterator[Tensor]:
    """A weight, gathered where stage 3 has cut it."""
    if hasattr(weight, "ds_id"):
        with deepspeed.zero.GatheredParameters([weight]):
            yield weight.detach()
    else:
        yield weight.detach()


_READERS: dict[str, Callable[[Any, LowRankOptimizer], list[FlatTensor]]] = {
    "DeepSpeedZeroOptimizer": _read_stages_1_and_2,
    "BF16_Optimizer": _read_bf16_optimizer,
    "DeepSpeedZeroOptimizer_Stage3": _read_stage_3,
}
