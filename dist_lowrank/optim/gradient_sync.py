"""Between refreshes, DistributedDataParallel sums the coefficients of gradients over ranks, not the gradients.

A recipe that drops what lies outside its subspace needs of the mean gradient only `mean(G) Q`, L x r, and projecting is
linear. So each rank projects its own gradient on the directions that the optimizer holds, the ranks sum the
coefficients, and what is lifted again stands in for the mean gradient: the optimizer projects it to the same
coefficients, to rounding. Gradients of all else, and of matrices that choose directions at this step, are summed whole.

What is left in `p.grad` is the mean gradient's part in the subspace, so its norm is smaller than that of the gradient.
"""

# Without `from __future__ import annotations`: DistributedDataParallel reads the annotations of its hook.

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dist_lowrank.optim.engine import LowRankOptimizer
from dist_lowrank.optim.low_rank import LowRank
from dist_lowrank.optim.options import refuse
from dist_lowrank.optim.recipe import Recipe
from dist_lowrank.optim.rounding import RandomBits
from dist_lowrank.optim.shared_dictionary import shares_dictionary
from dist_lowrank.optim.subspace import Basis
from dist_lowrank.optim.wave import no_autocast, place_of
from dist_lowrank.sharding.layouts import TallForm


def sum_coefficients(model: DistributedDataParallel, optimizer: LowRankOptimizer) -> None:
    """Lets a model sum coefficients of gradients where that changes no update. Once, before the first backward pass.

    Exact where what lies outside the subspace is dropped and directions are kept for several steps: GaLore, GoLore,
    Grass, and DCT-AdamW and others with `refresh_interval` above 1, without residual or error feedback.

    A gradient that is not finite outside a subspace of single coordinates (`identity`, Grass) is not seen.

    Args:
        model: whose communication hook this becomes.
        optimizer: of its parameters. Between a backward pass and the step its state must stay as it is.

    Raises:
        ValueError: for an optimizer that needs the whole gradient, naming the option that says so.
    """
    for group in optimizer.param_groups:
        check_drops_the_rest(optimizer.recipe(group))
    model.register_comm_hook(_Hook(optimizer), _Hook.run)


def check_drops_the_rest(recipe: Recipe) -> None:
    """Raises ValueError for a recipe that needs more than coefficients between refreshes, or that has no between."""
    if not isinstance(recipe, LowRank):
        raise refuse("low_rank_gradients", True, f"False with a recipe of whole matrices ({type(recipe).__name__})")
    if recipe.residual.needs_coordinates or recipe.full_rows:
        raise refuse("low_rank_gradients", True, "False with a residual or error feedback")
    if recipe.refresh_interval == 1:
        raise refuse("low_rank_gradients", True, "False with refresh_interval=1, when every step needs the gradient")
    if shares_dictionary(recipe):
        raise refuse("low_rank_gradients", True, "False with a shared dictionary, which changes at steps of its own")


class _Hook:
    """The state of a communication hook of DistributedDataParallel."""

    def __init__(self, optimizer: LowRankOptimizer) -> None:
        self.optimizer = optimizer

    @torch.no_grad()
    def run(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """Replaces the gradients of a bucket by their means over ranks, or those by their part in the subspace."""
        gradients = bucket.gradients()
        device = bucket.buffer().device
        with no_autocast({device.type}):
            bases = self._bases(bucket.parameters())
            parts = [
                gradient if found is None else found[1].project(found[0].view(gradient).to(found[2]))
                for gradient, found in zip(gradients, bases, strict=True)
            ]
            packed = torch.cat([part.reshape(-1).to(bucket.buffer().dtype) for part in parts])
        group = self.optimizer.process_group
        packed.div_(dist.get_world_size(group))
        sizes = [part.shape for part in parts]
        del parts
        work = dist.all_reduce(packed, group=group, async_op=True)
        assert work is not None

        def unpack(_: Any) -> Tensor:
            position = 0
            with torch.no_grad(), no_autocast({device.type}):
                for gradient, found, size in zip(gradients, bases, sizes, strict=True):
                    mean = packed[position : position + size.numel()].view(size)
                    position += size.numel()
                    if found is None:
                        gradient.copy_(mean)
                        continue
                    form, basis, dtype = found
                    lifted = gradient.new_zeros(form.rows, form.n, dtype=dtype)
                    basis.add_lifted(lifted, mean.to(dtype), decay=1.0, scale=1.0)
                    form.view(gradient).copy_(lifted)
            return bucket.buffer()  # type: ignore[no-any-return]

        return work.get_future().then(unpack)  # type: ignore[no-any-return]

    def _bases(self, parameters: list[Tensor]) -> list[tuple[TallForm, Basis, torch.dtype] | None]:
        """Of each parameter: the directions that its next update uses; None if that needs the whole gradient."""
        wanted = set(parameters)
        found: dict[Tensor, tuple[TallForm, Basis, torch.dtype]] = {}
        optimizer = self.optimizer
        for group, members in zip(optimizer.param_groups, optimizer.bind(), strict=True):
            recipe = optimizer.recipe(group)
            for bound in members:
                if bound.parameter not in wanted or len(bound.matrices) != 1 or bound.dense:
                    continue
                ((matrix, own_recipe),) = optimizer.jobs(recipe, bound)
                assert isinstance(own_recipe, LowRank)
                own = matrix.state(optimizer.state[bound.parameter])
                step, form = int(own["step"]) + 1, matrix.layout.form
                if own_recipe.refreshes(step) or tuple(bound.parameter.shape) != form.shape:
                    continue
                bits = RandomBits(own_recipe.seed, matrix.name, step)
                place = place_of(matrix, bound.parameter.device, optimizer._dictionaries, bits)
                found[bound.parameter] = form, own_recipe.subspace.stored(own, place), matrix.dtype
        return [found.get(parameter) for parameter in parameters]
