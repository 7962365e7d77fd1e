"""Names of everything that is logged, the same in the event files and in the JSON lines.

The names are stable: scripts that read runs depend on them.
"""

from __future__ import annotations

LOSS_TRAIN = "loss/train"  # nats per token, mean over the step's tokens of all ranks
LOSS_SPIKE = "loss/spike"  # the train loss, only at steps where it lies far above the last steps' median
LOSS_VALIDATION = "loss/validation"  # nats per token, weighted by tokens, over the held-out part
PERPLEXITY_VALIDATION = "perplexity/validation"  # exp(loss/validation)
LEARNING_RATE = "learning_rate"  # of the first parameter group, in this step
GRADIENT_NORM = "gradient_norm"  # global l2 norm of the raw gradient, before clipping
GRADIENT_NORM_PROJECTED = "gradient_norm/projected"  # the same of what `strategy.low_rank_gradients` leaves of it

TOKENS_PER_SECOND = "throughput/tokens_per_second"  # all ranks together
MODEL_FLOPS_PER_SECOND = "throughput/model_flops_per_second"  # all ranks together, recomputation not counted
MFU = "throughput/mfu"  # fraction of the GPUs' dense peak, 0 to 1; logged on known GPUs only

OPTIMIZER_MILLISECONDS = "optimizer/milliseconds"  # per step, on this rank
OPTIMIZER_SHARE = "optimizer/share_of_step"  # fraction of the step's wall time, 0 to 1, on this rank


def captured_energy(family: str) -> str:
    """Tag of the fraction (0 to 1) of the gradient's energy that lies in the subspace, for one family of matrices."""
    return f"captured_energy/{family}"


def memory_bytes(cause: str) -> str:
    """Tag of the bytes that this rank holds for one cause (see `dist_lowrank.telemetry.causes`).

    Of what only lives within a step the most at any one moment of it, at the steps that are tracked.
    """
    return f"memory_bytes/{cause}"


def memory_at_peak_bytes(cause: str) -> str:
    """Tag of the bytes that this rank held for one cause at the moment of a tracked step at which it held the most.

    All causes and `residual` add up to the cause `total`.
    """
    return f"memory_at_peak_bytes/{cause}"


def memory_of_rank(rank: int, cause: str) -> str:
    """Tag of the same bytes again, in event files alone: a chart of all causes of a rank tells ranks by the tag."""
    return f"memory_of_rank/{rank:05d}/{cause}"


def over_ranks(tag: str, statistic: str) -> str:
    """Tag of the `min`, `median` or `max` over ranks of what `tag` is on each; of `worst_rank`, who has the max."""
    return f"over_ranks/{tag}/{statistic}"


def final(figure: str) -> str:
    """Tag of a figure of a whole run, which TensorBoard's HParams tab sorts by."""
    return f"final/{figure}"
