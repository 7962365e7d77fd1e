"""Dion3: the rows of the momentum that are due, orthogonalised; without its last part, Dion2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_lowrank.optim.columns import ColumnBasis, DictionaryColumns
from dist_lowrank.optim.engine import LowRankOptimizer
from dist_lowrank.optim.options import check_number
from dist_lowrank.optim.orthogonalization import Orthogonalize, orthogonalizer
from dist_lowrank.optim.recipe import Recipe, Rounds, Update, Whole
from dist_lowrank.optim.rounding import RowNoise
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.storage import Floats, momentum_storage
from dist_lowrank.optim.subspace import Place
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.sharding.rule import OnOwner, Rule

_EPS = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Dion3Recipe(Recipe):
    """What is selected are columns of the tall form: columns of the identity dictionary."""

    momentum: float
    neuron_beta: float | None
    subspace: DictionaryColumns
    orthogonalize: Orthogonalize
    storage: Floats  # of the momentum

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        check_number("momentum", self.momentum, below=1)
        if self.neuron_beta is not None:
            check_number("neuron_beta", self.neuron_beta, below=1)

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        tensors = {**self.storage.state("momentum", form.n, dtype, "moments"), **self.subspace.state(form, dtype)}
        if self.neuron_beta is not None:
            tensors["neuron_square"] = StateTensor(form.n, dtype, "moments", sharded=False)
        return tensors

    def rounds(self, form: TallForm, refresh: bool) -> Rounds:
        of_neurons = [] if self.neuron_beta is None else [form.rank]
        return [*self.subspace.statistics(form), Whole(form.rank, self.orthogonalize.dtype), *of_neurons]

    def rule(self, rows: Tensor, state: Mapping[str, Tensor], step: int, place: Place, noise: RowNoise) -> Rule[Update]:
        momentum = self.storage.read("momentum", state, place.form.n, place.dtype).add_(rows)  # (l, n)
        del rows
        choice = yield from self.subspace.choose(momentum, state, place, step - 1, None)
        basis = choice.basis
        assert isinstance(basis, ColumnBasis)
        selected = basis.take(momentum)  # (l, k)
        basis.replace(momentum, selected, self.momentum)
        self.storage.write("momentum", momentum, state)
        self.subspace.store(basis, state)
        del momentum
        direction = yield OnOwner(selected.to(self.orthogonalize.dtype or place.dtype), self.orthogonalize)
        direction = direction.to(place.dtype)
        del selected
        if self.neuron_beta is not None:
            squares = yield direction[place.owned].square().sum(dim=0)  # (k,)
            direction = direction * self._equalizer(squares, state["neuron_square"], basis.indices, place.form.rows)
        return Update(direction, basis, choice)

    def _equalizer(self, squares: Tensor, mean_squares: Tensor, indices: Tensor, rows: int) -> Tensor:
        """Factors (k,) that divide each neuron by the root of its mean square over time and keep the whole norm.

        Args:
            squares: (k,), sums over the `rows` inputs of each selected neuron.
            mean_squares: (n,), of all neurons; those of the selected ones are updated.
        """
        assert self.neuron_beta is not None
        selected = mean_squares[indices].to(squares.dtype).lerp(squares / rows, 1 - self.neuron_beta)
        mean_squares[indices] = selected.to(mean_squares.dtype)
        factors = 1 / (selected.sqrt() + _EPS)
        norm = (squares * factors.square()).sum().sqrt()
        return factors * (squares.sum().sqrt() / norm.clamp(min=_EPS))


class Dion3(LowRankOptimizer):
    """Newton-Schulz on the part of the momentum that is largest (https://github.com/microsoft/dion, commit 0a059a4).

    There it is NorDion2 or Dion3: Dion2 (arXiv 2512.16928) with the normalisation of NorMuon (arXiv 2510.05491). For a
    matrix `W` (R x C), a row of which is a neuron:

        M <- M + G;   I <- the k rows of M of largest l1 norm
        U <- orthogonalised M[I];   M[I] <- mu M[I]                                     error feedback
        v[I] <- b v[I] + (1 - b) mean over columns of U^2;   U <- U / (sqrt(v[I]) + 1e-8), scaled back to its norm
        W <- (1 - lr wd) W;   W[I] <- W[I] - lr sqrt(R / C) U

    | | |
    |---|---|
    | side | left: neurons are selected. `right` selects inputs |
    | state per matrix | momentum, R C numbers; R mean squares, k integers |
    | sent per step and matrix | sums of R and k numbers; k C / ranks to the owner, and as many back |

    Rows are selected over the whole matrix, the authors' `selection_scope="global"`; their default selects on each
    shard, which makes another optimizer of every number of ranks. k is `round(rank R)`, theirs `ceil(rank R)`. They
    orthogonalise in bfloat16 (`newton_schulz_dtype`; `published("dion3")`).

    `neuron_beta=None` is Dion2, which selects along the shorter axis: `side="shorter_left"`. It is Trion's rule with
    `dictionary="identity"`, `ranking="l1"`, but for the way there: Trion sums a k x k Gram matrix over all ranks, on
    each of which the polynomials are then computed; an owner needs 2 k C / ranks numbers instead of k^2, less from a
    few ranks on, and each matrix is computed once.

    Args:
        rank: fraction of the rows (float) or their number k (int).
        momentum: mu, what is kept of the rows that were used.
        neuron_beta: b; None: no normalisation.
        orthogonalization, newton_schulz_steps, newton_schulz_dtype, scale, moment_dtype: as `Muon`'s.
        params, lr, weight_decay, side, dense_lr, dense_betas, dense_eps, state_dtype, weight_rounding, seed, engine: as
            `Trion`'s.

    Raises:
        ValueError: for an option that is not allowed, naming it, its value and what is.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        *,
        rank: int | float = 0.25,
        neuron_beta: float | None = 0.95,
        side: str = "left",
        scale: str = "fan_ratio",
        orthogonalization: str = "polar_express",
        newton_schulz_steps: int = 5,
        newton_schulz_dtype: torch.dtype | None = None,
        moment_dtype: torch.dtype | None = None,
        dense_lr: float = 3e-4,
        dense_betas: tuple[float, float] = (0.9, 0.95),
        dense_eps: float = 1e-8,
        state_dtype: str | None = None,
        weight_rounding: str = "nearest",
        seed: int = 0,
        **engine: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "rank": rank,
            "neuron_beta": neuron_beta,
            "side": side,
            "scale": scale,
            "orthogonalization": orthogonalization,
            "newton_schulz_steps": newton_schulz_steps,
            "newton_schulz_dtype": newton_schulz_dtype,
            "moment_dtype": moment_dtype,
            "dense_lr": dense_lr,
            "dense_betas": dense_betas,
            "dense_eps": dense_eps,
            "state_dtype": state_dtype,
            "weight_rounding": weight_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults, **engine)

    def recipe(self, group: dict[str, Any]) -> Dion3Recipe:
        same = ("lr", "weight_decay", "rank", "side", "scale", "weight_rounding", "seed", "momentum", "neuron_beta")
        return Dion3Recipe(
            **{key: group[key] for key in same},
            subspace=DictionaryColumns("identity", "l1"),
            orthogonalize=orthogonalizer(group),
            storage=momentum_storage(group),
        )
