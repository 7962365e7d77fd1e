"""The type of an update rule: a generator that yields partial sums and is sent totals."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

from torch import Tensor

Result = TypeVar("Result")
Rule = Generator[Tensor, Tensor, Result]
