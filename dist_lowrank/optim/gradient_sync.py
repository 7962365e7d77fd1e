"""DistributedDataParallel sums the coefficients of gradients over ranks, not the gradients, where directions are known.

A recipe that drops what lies outside its subspace needs of the mean gradient only `mean(G) Q`, L x r, and projecting is
linear. So each rank projects its own gradient on the directions of the coming update, the ranks sum the coefficients,
and what is lifted again stands in for the mean gradient: the optimizer projects it to the same coefficients, to
rounding. Gradients of all else, and of matrices that choose directions at this step, are summed whole.

With `selection="previous"` (DCT-AdamW) the columns are always known beforehand, but the scores that choose the next
ones would need the mean gradient: they are means of the scores of the ranks' own gradients instead. That is another
algorithm, whose trajectory depends on the number of ranks.

What is left in `p.grad` is the mean gradient's part in the subspace, so its norm is smaller than that of the gradient.
"""

# Without `from __future__ import annotations`: DistributedDataParallel reads the annotations of its hook.

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from dist_lowrank.optim.binding import BoundMatrix
from dist_lowrank.optim.columns import DictionaryColumns, PreviousColumns
from dist_lowrank.optim.engine import LowRankOptimizer
from dist_lowrank.optim.low_rank import LowRank
from dist_lowrank.optim.options import refuse
from dist_lowrank.optim.projections import RandomProjection
from dist_lowrank.optim.recipe import Recipe
from dist_lowrank.optim.rounding import RandomBits
from dist_lowrank.optim.shared_dictionary import shares_dictionary
from dist_lowrank.optim.subspace import Basis, Place
from dist_lowrank.optim.wave import no_autocast, place_of
from dist_lowrank.subspaces import column_scores


def sum_coefficients(model: DistributedDataParallel, optimizer: LowRankOptimizer) -> WeakTensorKeyDictionary:
    """Lets a model sum coefficients of gradients. Once, before the first backward pass.

    Exact where what lies outside the subspace is dropped and directions are kept for several steps: GaLore, GoLore,
    Grass, and DCT-AdamW and others with `refresh_interval` above 1, without residual or error feedback. With
    `selection="previous"` see above.

    A gradient that is not finite outside a subspace of single coordinates (`identity`, Grass) is not seen.

    Args:
        model: whose communication hook this becomes.
        optimizer: of its parameters. Between a backward pass and the step its state must stay as it is.

    Returns:
        As keys, the buckets that the model holds now: they are never sent, so that nothing else tells of their memory.

    Raises:
        ValueError: for an optimizer that needs the whole gradient, naming the option that says so.
    """
    for group in optimizer.param_groups:
        _check_drops_the_rest(optimizer.recipe(group))
    buckets = WeakTensorKeyDictionary()
    model.register_comm_hook((optimizer, buckets), _mean_of_bucket)
    return buckets


def _check_drops_the_rest(recipe: Recipe) -> None:
    if not isinstance(recipe, LowRank):
        raise refuse("low_rank_gradients", True, f"False with a recipe of whole matrices ({type(recipe).__name__})")
    if recipe.residual.needs_coordinates or recipe.full_rows:
        raise refuse("low_rank_gradients", True, "False with a residual or error feedback")
    if isinstance(recipe.subspace, RandomProjection) and recipe.subspace.kind == "gaussian":
        raise refuse("low_rank_gradients", True, "False with subspace='gaussian', whose vectors are not orthonormal")
    if isinstance(recipe.subspace, DictionaryColumns) and recipe.subspace.precision == "bf16":
        raise refuse("low_rank_gradients", True, "False with transform_precision='bf16', which would round twice")
    if shares_dictionary(recipe):
        raise refuse("low_rank_gradients", True, "False with a shared dictionary, which changes at steps of its own")
    if recipe.refresh_interval == 1 and not isinstance(recipe.subspace, PreviousColumns):
        raise refuse("low_rank_gradients", True, "False with refresh_interval=1, when every step needs the gradient")


@dataclass(frozen=True, slots=True)
class _Known:
    """A matrix whose directions at the coming step are known."""

    matrix: BoundMatrix
    recipe: LowRank
    basis: Basis
    place: Place

    def part(self, gradient: Tensor) -> Tensor:
        """What this rank contributes of its gradient (R, C): L x r coefficients, and n scores where they are due."""
        rows = self.place.form.view(gradient).to(self.matrix.dtype)
        subspace = self.recipe.subspace
        if not isinstance(subspace, PreviousColumns):
            return self.basis.project(rows).flatten()
        coordinates = subspace.coordinates(rows, self.place)
        return torch.cat([self.basis.take(coordinates).flatten(), column_scores(coordinates, subspace.ranking)])

    def put(self, mean: Tensor, gradient: Tensor) -> None:
        """Replaces the gradient by what the mean of the parts spans."""
        form = self.place.form
        mean, size = mean.to(self.matrix.dtype), form.rows * form.rank
        lifted = mean.new_zeros(form.rows, form.n)
        self.basis.add_lifted(lifted, mean[:size].view(form.rows, form.rank), decay=1.0, scale=1.0)
        form.view(gradient).copy_(lifted)
        if len(mean) > size:
            self.matrix.scores = mean[size:]


@torch.no_grad()
def _mean_of_bucket(
    state: tuple[LowRankOptimizer, WeakTensorKeyDictionary],
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """The communication hook: replaces the gradients of a bucket by their means over ranks."""
    optimizer, buckets = state
    buckets[bucket.buffer()] = None
    gradients, dtype, device = bucket.gradients(), bucket.buffer().dtype, bucket.buffer().device
    known = _known(optimizer, set(bucket.parameters()))
    with no_autocast({device.type}):
        matrices = [known.get(parameter) for parameter in bucket.parameters()]
        pairs = list(zip(gradients, matrices, strict=True))
        parts = [grad.flatten() if found is None else found.part(grad).to(dtype) for grad, found in pairs]
        packed = torch.cat(parts)
    sizes = [part.numel() for part in parts]
    del parts
    packed.div_(dist.get_world_size(optimizer.process_group))
    work = dist.all_reduce(packed, group=optimizer.process_group, async_op=True)
    assert work is not None

    def unpack(_: Any) -> Tensor:
        with torch.no_grad(), no_autocast({device.type}):
            for (gradient, found), mean in zip(pairs, torch.split(packed, sizes), strict=True):
                if found is None:
                    gradient.copy_(mean.view_as(gradient))
                else:
                    found.put(mean, gradient)
        return bucket.buffer()  # type: ignore[no-any-return]

    return work.get_future().then(unpack)  # type: ignore[no-any-return]


def _known(optimizer: LowRankOptimizer, parameters: set[Tensor]) -> dict[Tensor, _Known]:
    """Of some parameters: the matrices that they are, where the coming step does not need the whole gradient."""
    found = {}
    for group, members in zip(optimizer.param_groups, optimizer.bind(), strict=True):
        recipe = optimizer.recipe(group)
        for bound in members:
            if bound.parameter not in parameters or len(bound.matrices) != 1 or bound.dense:
                continue  # parameters of several pieces are summed whole
            ((matrix, own_recipe),) = optimizer.jobs(recipe, bound)
            assert isinstance(own_recipe, LowRank)
            own = matrix.state(optimizer.state[bound.parameter])
            step, subspace = int(own["step"]) + 1, own_recipe.subspace
            if tuple(bound.parameter.shape) != matrix.layout.form.shape or step == 1:
                continue
            bits = RandomBits(own_recipe.seed, matrix.name, step)
            place = place_of(matrix, bound.parameter.device, optimizer._dictionaries, bits)
            if isinstance(subspace, PreviousColumns):
                basis: Basis = subspace.basis(place, subspace.foreseen(own, place))
            elif own_recipe.refreshes(step):
                continue
            else:
                basis = subspace.stored(own, place)
            found[bound.parameter] = _Known(matrix, own_recipe, basis, place)
    return found
