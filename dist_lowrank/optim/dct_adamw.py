"""DCT-AdamW: AdamW on the gradient columns of most energy in a fixed orthonormal dictionary (arXiv 2505.17967)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist

from dist_lowrank.optim.columns import PreviousColumns
from dist_lowrank.optim.engine import VERIFY_EVERY, WORKSPACE_BYTES, LowRankOptimizer
from dist_lowrank.optim.low_rank import LowRank, column_options
from dist_lowrank.optim.moments import Adam
from dist_lowrank.optim.options import check_choice, refuse
from dist_lowrank.optim.residuals import Accumulate, Drop, Residual
from dist_lowrank.optim.storage import Floats, Levels, Storage
from dist_lowrank.optim.triton_columns import TritonColumns, TritonLowRank, check_options

_STORAGES: dict[str, Storage] = {
    "fp32": Floats(torch.float32),
    "bf16": Floats(torch.bfloat16),
    "int8": Levels(8),
    "int4": Levels(4),
}
_RESIDUALS: Mapping[str, Residual] = {"none": Drop()} | {
    name: Accumulate("error_feedback", "error_feedback", storage=storage) for name, storage in _STORAGES.items()
}


class DCTAdamW(LowRankOptimizer):
    """AdamW in the subspace of the r dictionary columns that hold most of the gradient's energy.

    For a matrix in tall form, `A` (L x n), with dictionary `D`:

        A <- A + E                                     E = 0 unless error feedback is on
        I <- the r columns of A D of most energy       at step 1 and at multiples of refresh_interval
        m, v <- moved with their columns               a fresh column starts at zero
        a <- (A D)[:, I];   E <- A - a D_I^T
        m <- b1 m + (1 - b1) a;   v <- b2 v + (1 - b2) a^2
        W <- (1 - lr wd) W - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) D_I^T

    State per matrix: r integers and two L x r moments, sharded like the rows of the matrix. Two-dimensional
    parameters take this path unless their group says `low_rank=False`; all others are AdamW with the same options.

    Args:
        params: tensors, named tensors or groups, as for any torch optimizer (see also `param_groups`). Every option
            can differ per group. Plain tensors or DTensors; the sharding is read from them at the first step.
        lr, betas, eps, weight_decay: as AdamW's. `betas` default to (0.9, 0.99): with 0.999 a fresh column's first
            step is 3.2 times the learning rate.
        rank: number of columns (int) or fraction of n (float).
        refresh_interval: steps between choices of columns.
        refresh_stagger: matrix number i of the optimizer chooses i steps later (modulo the interval), but all at step
            1: a step holds and sends less of what choosing needs.
        dictionary: `dct2`, `dct3`, `hadamard` (n even; blocks of the largest power of two that divides n), `random`,
            `identity`; `shared`, learned together by all matrices of one role (`dist_lowrank.optim.roles`): the
            eigenvectors of their summed Gram matrices, an n x n matrix of state per role.
        dictionary_interval: with `dictionary="shared"`, steps between changes of dictionaries; a multiple of
            refresh_interval.
        transform: how gradients are multiplied by the whole dictionary: `gemm`, by its matrix; `fft`, in O(n log n)
            (scipy's on a CPU where it is installed, else torch's; butterflies for `hadamard`; not for `random`);
            `auto`, by the faster of the two, measured once per (dictionary, n, dtype, device) and process. All agree
            to rounding. The default is `gemm` because a run should repeat to the bit, which what a clock decides does
            not, nor what is installed. `auto` stays with `gemm` where several ranks repeat the same work (HSDP,
            replicated DTensors), since they must round alike.
        materialize: keep the n x n matrix of each dictionary. False keeps O(n) numbers, makes the chosen columns from
            the formula at each use, and needs `transform` `fft` or `auto` (then `fft`); not for `random`.
        transform_precision: of the operands of products with the dictionary: `fp32` (fp64 for float64 parameters), or
            `bf16`: gradients, directions and the dictionary's matrix, which then takes half the memory, are rounded to
            bfloat16, while sums, scores and moments stay as they are. bfloat16 gradients are then read, and bfloat16
            weights rounded to nearest written, without copies in float32. Needs `transform="gemm"` and a fixed
            dictionary; no effect on `identity`.
        kernels: `torch`, its operators; or `triton`, kernels of our own that make a step in three launches without
            coordinates in memory, for float32 and bfloat16 parameters on a GPU. Those cover `transform="gemm"` with a
            dictionary that is fixed and not the identity, `ranking="l2"`, and no error feedback, no
            `column_bias_correction`, no int8 moments, no `selection="previous"`. Unmeasured, see docs/speed.md.
        ranking: `l2`, by energy, or `l1`, by sum of absolute values.
        selection: by whose score columns are chosen: `current`, of this step's gradient, or `previous`, of the last
            step's, another algorithm, which needs `refresh_interval=1` and a fixed dictionary; n numbers of state per
            matrix. Columns are then known before the gradient is, for `sum_coefficients`.
        side: `shorter` compresses the shorter axis (square: right), `longer` the other, `right` axis 1, `left` axis 0,
            `unsharded` the axis that is not sharded (axis 1 of plain tensors), so that rows are never exchanged.
            Decided from the global shape.
        transition: of the moments at a refresh: `move`, `reset`, `keep`.
        error_feedback: `none`, or how to keep what was not selected, which returns with the next gradient: `fp32`,
            `bf16`, or `int8`, `int4`, 256 or 16 levels between the least and the largest number of each row.
        error_feedback_momentum: the momentum of a column that is no longer selected, `b1 / (1 - b1) m`, goes to the
            error feedback instead of being dropped, so that every gradient is applied in full. Needs `error_feedback`
            and `transition="move"`.
        column_bias_correction: bias-correct each column by its age instead of by the step.
        moment_dtype: of the low-rank moments: `torch.float32`; `torch.bfloat16`, rounded to nearest, in which a second
            moment stands still for betas near 1; `torch.int8`, 8-bit codes that are rounded such that the mean is
            exact, and a float32 scale per row and 256 columns; or None for the dtype of the arithmetic, which is
            float32, or float64 for float64 parameters.
        state_dtype: of all other state that is floating-point, the moments of the dense path too: None for the dtype of
            the arithmetic; `weights` for that of the weights, rounded to nearest, which is what published code keeps
            of bfloat16 weights.
        weight_rounding: of bfloat16 weights: `nearest`, which loses updates below 1/512 of the weight, or
            `stochastic`, up or down at random such that the mean is exact, from a hash of seed, parameter name, step
            and position, so the same under every sharding. No effect on float32 and float64 weights.
        capturable: step counters are on the device, and a learning rate may be a tensor there, so that a step can be
            captured in a CUDA graph, which then repeats it. Needs `refresh_interval=1`, `verify_every=0`,
            `agree_on_gradients=False`, nothing that is rounded at random, torch's kernels and a fixed dictionary.
        seed: of the `random` dictionary and of rounding at random.
        process_group: ranks that hold replicas of plain-tensor parameters; default: the default group, if initialised.
            They divide the rows among them. No effect on DTensors.
        workspace_bytes: bound on the transient memory of a step; a single matrix may exceed it.
        verify_every: steps between comparisons of the chosen columns over ranks (a few bytes each); 0: never.
        agree_on_gradients: ask the ranks that share a parameter, before each step, whether any of them has a gradient
            of it: an all-reduce of one byte per parameter, which the host waits for. False takes this rank's word
            for it, and is right where ranks always have gradients of the same parameters (FSDP2 and DDP of a model
            without conditional layers).

    Raises:
        ValueError: for an option that is not allowed, naming it, its value and what is.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float = 0.25,
        refresh_interval: int = 1,
        refresh_stagger: bool = False,
        dictionary: str = "dct2",
        dictionary_interval: int = 500,
        transform: str = "gemm",
        materialize: bool = True,
        transform_precision: str = "fp32",
        kernels: str = "torch",
        ranking: str = "l2",
        selection: str = "current",
        side: str = "shorter",
        transition: str = "move",
        error_feedback: str = "none",
        error_feedback_momentum: bool = False,
        column_bias_correction: bool = False,
        moment_dtype: torch.dtype | None = None,
        state_dtype: str | None = None,
        weight_rounding: str = "nearest",
        capturable: bool = False,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        workspace_bytes: int = WORKSPACE_BYTES,
        verify_every: int = VERIFY_EVERY,
        agree_on_gradients: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "refresh_interval": refresh_interval,
            "refresh_stagger": refresh_stagger,
            "dictionary": dictionary,
            "dictionary_interval": dictionary_interval,
            "transform": transform,
            "materialize": materialize,
            "transform_precision": transform_precision,
            "kernels": kernels,
            "ranking": ranking,
            "selection": selection,
            "side": side,
            "transition": transition,
            "error_feedback": error_feedback,
            "error_feedback_momentum": error_feedback_momentum,
            "column_bias_correction": column_bias_correction,
            "moment_dtype": moment_dtype,
            "state_dtype": state_dtype,
            "weight_rounding": weight_rounding,
            "capturable": capturable,
            "seed": seed,
        }
        super().__init__(
            params,
            defaults,
            process_group=process_group,
            workspace_bytes=workspace_bytes,
            verify_every=verify_every,
            agree_on_gradients=agree_on_gradients,
        )

    def recipe(self, group: dict[str, Any]) -> LowRank:
        check_choice("error_feedback", group["error_feedback"], tuple(_RESIDUALS))
        check_choice("error_feedback_momentum", group["error_feedback_momentum"], (False, True))
        check_choice("selection", group["selection"], ("current", "previous"))
        check_choice("kernels", group["kernels"], ("torch", "triton"))
        options = column_options(group)
        if group["selection"] == "previous":
            if group["refresh_interval"] != 1 or group["dictionary"] == "shared":
                raise refuse("selection", "previous", "'current', or a fixed dictionary with refresh_interval=1")
            columns = options["subspace"]
            options["subspace"] = PreviousColumns(
                **{each.name: getattr(columns, each.name) for each in fields(columns)}
            )
        recipe: type[LowRank] = LowRank
        if group["kernels"] == "triton":
            check_options(group)
            recipe, columns = TritonLowRank, options["subspace"]
            options["subspace"] = TritonColumns(**{each.name: getattr(columns, each.name) for each in fields(columns)})
        return recipe(
            **options,
            refresh_interval=group["refresh_interval"],
            refresh_stagger=group["refresh_stagger"],
            moments=Adam(group["betas"], group["eps"], group["column_bias_correction"], group["moment_dtype"]),
            residual=_RESIDUALS[group["error_feedback"]],
            transition=group["transition"],
            return_momentum=group["error_feedback_momentum"],
        )
