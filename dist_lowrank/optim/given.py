"""The parameters that an optimizer was given, to tell them from tensors that someone put in their place.

DeepSpeed replaces an optimizer's parameters by tensors of its own: under ZeRO by flat ones, in which no matrix can be
told from its neighbours. Trained as what they look like, they would silently be trained by plain AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

BIND = "dist_lowrank.strategies.deepspeed.bind(engine)"


class GivenParameters:
    """Names and groups of parameters, without keeping parameters alive."""

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()  # (name, group) by parameter

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._known

    def add(self, group: dict[str, Any], position: int) -> None:
        """Remembers the parameters of a group.

        Args:
            position: how many parameters the groups before it have; names those without a name.
        """
        parameters = group["params"]
        names = group.get("param_names") or []
        if len(names) != len(parameters):
            names = [f"parameter_{position + index}" for index in range(len(parameters))]
        for name, parameter in zip(names, parameters, strict=True):
            self._known[parameter] = (name, group)

    def remember(self, groups: Sequence[dict[str, Any]], *, only_known: bool) -> None:
        """Remembers the parameters of all groups, or of those alone whose parameters it knows."""
        position = 0
        for group in groups:
            if not only_known or all(parameter in self for parameter in group["params"]):
                self.add(group, position)
            position += len(group["params"])

    def replace(self, copies: Mapping[Tensor, Tensor]) -> None:
        """Takes each key for the parameter of its value: a copy of other precision."""
        for copy, original in copies.items():
            self._known[copy] = self._known[original]

    def name(self, parameter: Tensor) -> str | None:
        known = self._known.get(parameter)
        return None if known is None else known[0]

    def group(self, parameter: Tensor) -> dict[str, Any] | None:
        known = self._known.get(parameter)
        return None if known is None else known[1]

    def refuse_flat(self, parameter: Tensor) -> None:
        """Raises RuntimeError for a one-dimensional plain tensor that was not given. DTensors tell what they are."""
        if parameter.ndim == 1 and not isinstance(parameter, DTensor) and parameter not in self:
            raise RuntimeError(
                f"the optimizer finds a one-dimensional tensor of {parameter.numel()} elements among its parameters "
                "that it was not given; DeepSpeed's ZeRO puts such in the place of matrices. Call, after "
                f"deepspeed.initialize:\n    {BIND}\n(For parameters of your own: `add_param_group`.)"
            )

    def only_warms_up(self, parameters: Sequence[Tensor], without_state: Iterable[Tensor]) -> bool:
        """Whether a step is the one that DeepSpeed makes on zero gradients, to have state created, before training."""
        replaced = [p for p in without_state if not isinstance(p, DTensor) and p not in self]
        return bool(replaced) and not any(p.grad is not None and bool(p.grad.any()) for p in parameters)
