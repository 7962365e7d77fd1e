"""The loss, and its mean over held-out tokens, whatever the number of ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_lowrank.training.data import HeldOut
from dist_lowrank.training.data.packing import IGNORED


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy of predicting each token but the first, in nats.

    Args:
        batch: (b, sequence_length) int64; `IGNORED` behind the end of a padded document. At least one target.

    Returns:
        Tensor (), float32, or float64 for a float64 model, which `transformers`' own loss would round to float32.
    """
    # What stands behind a document is never seen from within it: any token will do.
    logits = model(input_ids=batch.clamp(min=0)).logits  # (b, sequence_length, vocabulary)
    wide = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(wide, batch[:, 1:].flatten(), ignore_index=IGNORED)


def target_count(batch: Tensor) -> int:
    """Tokens that `next_token_loss` is the mean of."""
    return int((batch[:, 1:] != IGNORED).sum())


@torch.no_grad()
def evaluate(
    model: nn.Module,
    samples: HeldOut,
    *,
    limit: int,
    micro_batch_size: int,
    device: torch.device,
    context: Any,
    legacy_counter: bool = False,
) -> float:
    """Mean loss in nats per predicted token over the first `limit` samples. Collective.

    Every rank runs the same number of forward passes, as sharded models need; a rank that has run out repeats a sample
    with weight zero.

    Args:
        samples: blocks (sequence_length,) int64, the same on all ranks.
        context: makes the context of a forward pass.
        legacy_counter: the figure that published low-rank code reports: each rank's mean over batches, of a counter
            that begins at one, N / (N + 1) of the true one for N batches per rank; then the mean over ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    count = min(limit, len(samples))
    if count == 0:
        raise ValueError("there are no held-out samples; allowed: at least one block of data.sequence_length tokens")
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens; or batches
    was_training = model.training
    model.eval()
    for first in range(0, count, world_size * micro_batch_size):
        start = first + rank * micro_batch_size
        chosen = range(start, min(start + micro_batch_size, count))
        batch = torch.stack([samples[index] for index in chosen or (0,)])
        with context():
            loss = next_token_loss(model, batch.to(device))
        weight = 0 if not chosen else 1 if legacy_counter else target_count(batch)
        totals += torch.stack([loss.double() * weight, torch.tensor(float(weight), device=device)]).to(totals)
    model.train(was_training)
    if legacy_counter:
        totals = torch.stack([totals[0] / (totals[1] + 1), torch.ones_like(totals[1])])
    dist.all_reduce(totals)
    return float(totals[0] / totals[1])
