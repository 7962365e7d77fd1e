"""Roles: matrices that play the same part in every layer, and share a learned dictionary.

A role is what reads the same space: all layers' q, k, v, gate and up read the residual stream; o reads the heads'
output, down the hidden units. It follows from a parameter's name, or is the group's option `role`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dist_lowrank.dictionaries import LearnedDictionary

# What reads the residual stream, in the spellings of transformers, torchtitan, Llama, GPT-2, GPT-NeoX, T5 and timm.
_SPELLINGS = """
    q k v q_proj k_proj v_proj wq wk wv query key value qkv qkv_proj query_key_value c_attn in_proj to_q to_k to_v
    gate up gate_proj up_proj gate_up_proj w1 w3 c_fc fc1 fc_in wi wi_0 wi_1 dense_h_to_4h
"""
_READERS = frozenset(_SPELLINGS.split())


def role_of(name: str) -> str:
    """The role of a matrix, from its canonical name: `residual`, after what comes before the layers, or the name.

    `model.layers.3.self_attn.q_proj.weight` has the role `model.layers.residual`, and
    `model.layers.3.mlp.down_proj.weight` the role `model.layers..mlp.down_proj.weight`: numbers are left out.
    """
    parts = re.sub(r"\[\d+\]", "", name).removesuffix(".weight").split(".")
    if parts[-1] not in _READERS:
        return re.sub(r"\d+", "", name)
    numbered = [position for position, part in enumerate(parts[:-1]) if re.search(r"\d", part)]
    return ".".join([*parts[: numbered[0] if numbered else 0], "residual"])


@dataclass(slots=True, eq=False)
class Role:
    """One dictionary, kept in the state of one parameter, the same on all ranks.

    State: `<prefix>dictionary`, (n, n), whose rows are the columns of the dictionary, and `<prefix>dictionary_step`,
    the number of steps in which any of the role's matrices was updated.
    """

    n: int
    parameter: Tensor  # with whose state it is kept
    prefix: str
    groups: tuple[dist.ProcessGroup, ...]  # over which Gram matrices are summed, one after the other
    channel: tuple[Any, ...]  # groups, dtype, device: roles that can share a collective
    # During a step:
    current: LearnedDictionary | None = None  # to choose from
    previous: LearnedDictionary | None = None  # to which stored choices belong, if it has just changed

    @property
    def key(self) -> str:
        return f"{self.prefix}dictionary"

    @property
    def step_key(self) -> str:
        return f"{self.prefix}dictionary_step"

    def is_kept_with(self, parameter: Tensor, prefix: str) -> bool:
        return self.parameter is parameter and self.prefix == prefix
