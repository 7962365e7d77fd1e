"""Learned dictionaries, each shared by all matrices that play one role.

At steps 1, T, 2 T, ... (the recipe's schedule, with `dictionary_interval` for T), before matrices are updated:

    C_role <- sum over its matrices and all ranks of B^T B / trace(B^T B)      B: gradient, and what the residual stored
    D_role <- eigenvectors of C_role, in descending order, the largest-magnitude entry of each positive
    E <- E D_old^T D_new                                                       what the residual stores in coordinates

and the rules, which all choose anew at such a step, take their moments along by `D_old[:, I_old]^T D_new[:, I_new]`.

What is sent is a number per matrix, their traces, and then one n x n matrix per role, all roles in one all-reduce per
process group as far as the workspace goes: half of it for Gram matrices, and a wave of roles has one at least.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dist_lowrank.dictionaries import DictionaryCache, LearnedDictionary
from dist_lowrank.optim.binding import BoundMatrix
from dist_lowrank.optim.dense import local_gradients
from dist_lowrank.optim.low_rank import LowRank
from dist_lowrank.optim.projections import with_fixed_signs
from dist_lowrank.optim.recipe import Recipe
from dist_lowrank.optim.roles import Role, role_of
from dist_lowrank.optim.rounding import RandomBits, RowNoise
from dist_lowrank.optim.shared_columns import SharedBasis, SharedColumns
from dist_lowrank.optim.wave import Job, cut_waves, place_of
from dist_lowrank.sharding.layouts import local
from dist_lowrank.sharding.rounds import Task, run_rounds, sum_in_place
from dist_lowrank.sharding.rule import Rule
from dist_lowrank.sharding.transport import fetch_rows
from dist_lowrank.sharding.turns import finish
from dist_lowrank.subspaces import top_columns

State = Mapping[Tensor, dict[str, Tensor]]


def shares_dictionary(recipe: Recipe) -> bool:
    return isinstance(recipe, LowRank) and isinstance(recipe.subspace, SharedColumns)


def role_key(name: str, option: str | None, n: int, side: str) -> tuple[Any, ...]:
    """What two matrices of one group have in common that share a dictionary, as far as it follows from them."""
    return (option or role_of(name), n, side)


def join_roles(matrices: Sequence[BoundMatrix], option: str | None, state: State) -> None:
    """Gives each matrix of a parameter group its role, and each role the state that it lacks.

    Roles are told apart by name, or the group's option `role`; by n, side, dtype and device; and by the ranks that hold
    the rows. Also by flat tensor, since DeepSpeed may step with one at a time.
    """
    for matrix in matrices:
        if matrix.role is not None and matrix.role.parameter not in state:
            matrix.role = None  # a wrapper has replaced the parameter
    known = {_key(matrix, option): matrix.role for matrix in matrices if matrix.role is not None}
    joining: dict[tuple[Any, ...], list[BoundMatrix]] = {}
    for matrix in matrices:
        if matrix.role is None:
            joining.setdefault(_key(matrix, option), []).append(matrix)
    for key, members in joining.items():
        role = known.get(key) or _make_role(members, state)
        for matrix in members:
            matrix.role = role


def _key(matrix: BoundMatrix, option: str | None) -> tuple[Any, ...]:
    form, flat = matrix.layout.form, matrix.parameter if matrix.parameter.ndim == 1 else None
    return (*role_key(matrix.name, option, form.n, form.side), flat, *_channel(matrix))


def _channel(matrix: BoundMatrix) -> tuple[Any, ...]:
    return _groups(matrix), matrix.dtype, local(matrix.parameter).device


def _groups(matrix: BoundMatrix) -> tuple[Any, ...]:
    """Of the ranks that have a part of the role: the rows of the matrix, other matrices of its stack."""
    groups, stack = [matrix.layout.group], matrix.piece.stack
    if stack is not None and stack.mesh_axis is not None:
        groups.append(matrix.parameter.device_mesh.get_group(stack.mesh_axis))  # type: ignore[attr-defined]
    return tuple(group for group in groups if group is not None)


def _make_role(members: Sequence[BoundMatrix], state: State) -> Role:
    """Kept with the matrix that has the dictionary already, which may not be the first, or else with the first."""
    kept = (each for each in members if f"{each.piece.prefix}dictionary" in state[each.parameter])
    keeper = next(kept, members[0])
    n, dtype, device = keeper.layout.form.n, keeper.dtype, local(keeper.parameter).device
    role = Role(n, keeper.parameter, keeper.piece.prefix, _groups(keeper), _channel(keeper))
    own = state[keeper.parameter]
    if role.key not in own:
        own[role.key] = torch.zeros(n, n, dtype=dtype, device=device)
        own[role.step_key] = torch.zeros((), dtype=torch.float32, device="cpu")
    return role


def with_keepers(
    matrices: Iterable[BoundMatrix], incoming: dict[str, Any], index_of: Mapping[Tensor, int]
) -> dict[str, Any]:
    """A state dict whose dictionaries are where this optimizer keeps them.

    It was another matrix of the role that kept it, if the one that does now was frozen when state was made.

    Args:
        index_of: of parameters, in the state dict.
    """
    state = dict(incoming["state"])
    for matrix in matrices:
        role, prefix = matrix.role, matrix.piece.prefix
        if role is None or role.is_kept_with(matrix.parameter, prefix):
            continue
        index, keeper = index_of.get(matrix.parameter), index_of.get(role.parameter)
        moved = {prefix + key.removeprefix(role.prefix): key for key in (role.key, role.step_key)}
        found = state.get(index, {})
        if keeper in state and role.key not in state[keeper] and found.keys() >= moved.keys():
            state[index] = {key: value for key, value in found.items() if key not in moved}
            state[keeper] = {**state[keeper], **{here: found[there] for there, here in moved.items()}}
    return {**incoming, "state": state}


@contextmanager
def dictionaries_of_step(
    jobs: Sequence[Job], matrices: Sequence[BoundMatrix], state: State, cache: DictionaryCache, workspace_bytes: int
) -> Iterator[int]:
    """The step within which the roles of the jobs have their dictionaries, new ones where they are due. Collective.

    Args:
        matrices: all of which this rank has a share, also those without a gradient at this step.

    Yields:
        The bytes of dictionaries that are kept until the step is over, for what is still stored by them.
    """
    due: list[Job] = []
    counted: dict[Role, bool] = {}
    for matrix, recipe in jobs:
        role = matrix.role
        if role is None:
            continue
        if role not in counted:
            own = state[role.parameter]
            role.current = LearnedDictionary(own[role.key])
            counted[role] = _is_due(recipe, int(own[role.step_key].add_(1)))
        if counted[role]:
            due.append((matrix, recipe))
    changing = {role for role, is_due in counted.items() if is_due and int(state[role.parameter][role.step_key]) > 1}
    kept = kept_bytes(matrix for matrix, _ in due if matrix.role in changing)
    try:
        for roles, waves in learning_waves(due, workspace_bytes - kept):
            _learn(roles, waves, changing, state)
        updated = {id(matrix) for matrix, _ in jobs}
        recipes = {matrix.role: recipe for matrix, recipe in due}
        for matrix in matrices:
            if matrix.role in changing:
                _follow(matrix, recipes[matrix.role], state, cache, id(matrix) in updated)
        yield kept
    finally:
        for role in counted:
            role.current = role.previous = None


def _is_due(recipe: Recipe, step: int) -> bool:
    assert isinstance(recipe, LowRank)
    assert isinstance(recipe.subspace, SharedColumns)
    interval = recipe.subspace.dictionary_interval
    return replace(recipe, refresh_interval=interval, refresh_stagger=False, refresh_offset=0).refreshes(step)


def kept_bytes(matrices: Iterable[BoundMatrix]) -> int:
    """Of the dictionaries that matrices have before a change, which are kept until the step is over."""
    return sum(map(_dictionary_bytes, {matrix.role for matrix in matrices if matrix.role is not None}))


def _dictionary_bytes(role: Role) -> int:
    return role.n**2 * role.channel[1].itemsize  # type: ignore[no-any-return]


def learning_waves(jobs: Sequence[Job], workspace_bytes: int) -> Iterator[tuple[list[Role], list[list[Job]]]]:
    """Cuts the work into waves of roles, whose Gram matrices exist at once; and theirs into waves of matrices.

    Decided from what all ranks know, so all cut alike.
    """
    by_role: dict[Role, list[Job]] = {}
    for matrix, recipe in jobs:
        assert matrix.role is not None
        by_role.setdefault(matrix.role, []).append((matrix, recipe))
    cuts: list[list[Role]] = []
    used_bytes = 0
    for role in by_role:
        if not cuts or used_bytes + _dictionary_bytes(role) > workspace_bytes // 2:
            cuts.append([])
            used_bytes = 0
        cuts[-1].append(role)
        used_bytes += _dictionary_bytes(role)
    for roles in cuts:
        left_bytes = workspace_bytes - sum(map(_dictionary_bytes, roles))
        yield roles, list(cut_waves([job for role in roles for job in by_role[role]], left_bytes))


def _learn(roles: Sequence[Role], waves: Sequence[Sequence[Job]], changing: Set[Role], state: State) -> None:
    """New dictionaries for some roles."""
    buffers, grams = gram_buffers(roles)
    for wave in waves:
        _add_gram_matrices(wave, grams, state)
    for (groups, _, _), buffer in buffers.items():
        sum_in_place(buffer, groups)
    for role in roles:
        atoms = state[role.parameter][role.key]
        if role in changing:
            role.previous = LearnedDictionary(atoms.clone())
        vectors = torch.linalg.eigh(grams[role].double())[1].flip(1)
        atoms.copy_(with_fixed_signs(vectors).t())


def gram_buffers(roles: Sequence[Role]) -> tuple[dict[tuple[Any, ...], Tensor], dict[Role, Tensor]]:
    """Zeros for the Gram matrices of roles: one buffer per channel, and by role its part, (n, n)."""
    channels: dict[tuple[Any, ...], list[Role]] = {}
    for role in roles:
        channels.setdefault(role.channel, []).append(role)
    buffers, grams = {}, {}
    for channel, members in channels.items():
        _, dtype, device = channel
        sizes = [role.n**2 for role in members]
        buffers[channel] = torch.zeros(sum(sizes), dtype=dtype, device=device)
        for role, part in zip(members, torch.split(buffers[channel], sizes), strict=True):
            grams[role] = part.view(role.n, role.n)
    return buffers, grams


def _add_gram_matrices(wave: Sequence[Job], grams: Mapping[Role, Tensor], state: State) -> None:
    parts = local_gradients([(matrix.parameter, matrix.piece) for matrix, _ in wave])
    gradients = [matrix.piece.view(part) for (matrix, _), part in zip(wave, parts, strict=True) if matrix.present]
    wave = [(matrix, recipe) for matrix, recipe in wave if matrix.present]
    layouts = [matrix.layout for matrix, _ in wave]
    rows = finish(fetch_rows(layouts, gradients, [matrix.dtype for matrix, _ in wave]))
    rules = [
        _add_gram_matrix(block, matrix, recipe, grams, matrix.state(state[matrix.parameter]))
        for block, (matrix, recipe) in zip(rows, wave, strict=True)
    ]
    del parts, gradients, rows
    finish(run_rounds([Task(rule, layout) for rule, layout in zip(rules, layouts, strict=True)]))


def _add_gram_matrix(
    rows: Tensor, matrix: BoundMatrix, recipe: Recipe, grams: Mapping[Role, Tensor], own: Mapping[str, Tensor]
) -> Rule[None]:
    """Adds `B^T B / trace` of this rank's rows (l, n) to the role's matrix."""
    assert isinstance(recipe, LowRank)
    assert matrix.role is not None
    assert matrix.role.current is not None
    rows, owned = rows[matrix.layout.owned], matrix.layout.owned
    stored = recipe.residual.stored(own, matrix.role.n, matrix.dtype)
    if stored is not None:
        rows = torch.addmm(rows, stored[owned], matrix.role.current.atoms)
    trace = yield rows.square().sum()
    rows = rows * torch.where(trace > 0, trace.rsqrt(), 0)
    grams[matrix.role].addmm_(rows.t(), rows)


def _follow(matrix: BoundMatrix, recipe: Recipe, state: State, cache: DictionaryCache, updated: bool) -> None:
    """What a matrix has stored follows its role to a new dictionary; moments that an update is to move wait for it."""
    assert isinstance(recipe, LowRank)
    role, own, layout = matrix.role, matrix.state(state[matrix.parameter]), matrix.layout
    assert role is not None
    assert role.current is not None
    assert role.previous is not None
    recipe.residual.turn(role.previous.atoms @ role.current.atoms.t(), own)
    step = int(own["step"])
    if updated or step == 0:
        return
    # Nothing says what it would choose; so it takes the columns that hold the most of those that it had.
    bits = RandomBits(recipe.seed, matrix.name, step)
    before = recipe.subspace.stored(own, place_of(matrix, local(matrix.parameter).device, cache, bits))
    assert isinstance(before, SharedBasis)
    shares = role.current.transform(before.vectors.t()).square().sum(dim=0)
    after = SharedBasis(role.current, top_columns(shares, layout.form.rank))
    moments = recipe.moments.read(own, layout.form.rank, matrix.dtype)
    recipe.moments.carry(moments, after.change_from(before), recipe.transition, step + 1)
    recipe.moments.write(moments, own, RowNoise(bits, layout.start))
    recipe.subspace.store(after, own)
