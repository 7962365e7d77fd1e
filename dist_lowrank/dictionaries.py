"""Fixed orthonormal dictionaries: the candidates among which column selection chooses.

A dictionary is an orthonormal `n x n` matrix `D`; its *columns* are the candidates. One dictionary serves both sides
of every matrix with the same `n`, every layer and every rank, so it is built once per `(name, n)` and never stored in
a checkpoint.

The cosine dictionaries follow `d_k[j] = c_k cos(pi k (2j + 1) / (2n))` with `c_0 = sqrt(1/n)`, `c_k = sqrt(2/n)`
(DCT-II; `A @ D` is the orthonormal DCT-II of every row). The angle has period `4n` in the integer `k (2j + 1)`, so the
entries come from a table of `4n` float64 cosines, exact at any `n`, where angles formed in float32 lose three digits
at n = 4096.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DICTIONARIES = ("dct2", "dct3", "hadamard", "random", "identity")


def columns(
    name: str,
    n: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """The orthonormal matrix whose columns are the dictionary.

    Args:
        name: one of `DICTIONARIES`. `dct3` is the transpose of `dct2`; `hadamard` is Sylvester's, in natural order;
            `random` is the QR factor of a Gaussian matrix drawn from `seed` and `n` alone.
        n: size, at least 1; a power of two for `hadamard`.
        dtype: of the result; entries are computed in float64 and rounded once.

    Returns:
        Tensor (n, n).

    Raises:
        ValueError: for an unknown name or a size that the dictionary does not have.
    """
    check_dictionary(name, n)
    build = {"dct2": _dct2, "dct3": _dct3, "hadamard": _hadamard, "identity": _identity}
    matrix = _random(n, seed) if name == "random" else build[name](n)
    return matrix.to(device=device, dtype=dtype)


def check_dictionary(name: str, n: int | None = None) -> None:
    """Raises ValueError unless `name` is a dictionary and it exists at size `n`."""
    if name not in DICTIONARIES:
        raise ValueError(f"dictionary: {name!r} is not allowed; allowed: {', '.join(DICTIONARIES)}")
    if n is None:
        return
    if n < 1:
        raise ValueError(f"n: {n} is not allowed; allowed: an integer >= 1")
    if name == "hadamard" and n & (n - 1):
        raise ValueError(f"dictionary: 'hadamard' has no matrix of size n={n}; allowed: n a power of two")


def _dct2(n: int) -> Tensor:
    table = torch.cos(torch.arange(4 * n, dtype=torch.float64, device="cpu") * (math.pi / (2 * n)))  # (4n,)
    k = torch.arange(n, device="cpu")
    angles = (2 * k + 1).unsqueeze(1) * k.unsqueeze(0)  # (n, n) int64: j down, k across
    matrix = table[angles.remainder_(4 * n)].mul_(math.sqrt(2 / n))
    matrix[:, 0] = math.sqrt(1 / n)
    return matrix


def _dct3(n: int) -> Tensor:
    return _dct2(n).t().contiguous()


def _hadamard(n: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / math.sqrt(n)


def _random(n: int, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed((seed * 0x9E3779B97F4A7C15 + n) % 2**63)
    gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)  # the unique factor: positive diagonal of r
    return torch.mul(q, signs)


def _identity(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64, device="cpu")


class Dictionary:
    """One dictionary at one size, ready for products on one device.

    Holds `D^T` (its rows are the candidates), so that taking r candidates copies r contiguous rows. The identity
    holds nothing.
    """

    def __init__(self, name: str, n: int, *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.n = n
        self._atoms: Tensor | None = None  # (n, n) = D^T
        if name == "identity":
            check_dictionary(name, n)
        else:
            self._atoms = columns(name, n, dtype=dtype, device=device, seed=seed).t().contiguous()

    @property
    def storage_bytes(self) -> int:
        return 0 if self._atoms is None else self._atoms.untyped_storage().nbytes()

    def transform(self, rows: Tensor) -> Tensor:
        """Coordinates of each row: `rows @ D`, (L, n) -> (L, n). May return `rows` itself."""
        return rows if self._atoms is None else rows @ self._atoms.t()

    def project(self, rows: Tensor, indices: Tensor) -> Tensor:
        """Coordinates on the chosen candidates alone: `rows @ D[:, indices]`, (L, n) -> (L, r)."""
        if self._atoms is None:
            return rows.index_select(1, indices)
        return rows @ self._atoms.index_select(0, indices).t()

    def add_lifted(
        self,
        target: Tensor,
        coefficients: Tensor,
        indices: Tensor,
        *,
        decay: float,
        scale: float,
        columns: slice = slice(None),
    ) -> None:
        """In place: `target = decay * target + scale * (coefficients @ D[:, indices]^T)[:, columns]`.

        Args:
            target: (L, width of `columns`).
        """
        if self._atoms is not None:
            target.addmm_(coefficients, self._atoms.index_select(0, indices)[:, columns], beta=decay, alpha=scale)
            return
        start, stop, _ = columns.indices(self.n)
        inside = (indices >= start) & (indices < stop)
        if (start, stop) != (0, self.n):
            coefficients, indices = coefficients[:, inside], indices[inside] - start
        target.mul_(decay).index_add_(1, indices, coefficients, alpha=scale)


class DictionaryCache:
    """The dictionaries that one optimizer uses: one per distinct (name, n, dtype, device), shared by all matrices."""

    def __init__(self) -> None:
        self._dictionaries: dict[tuple[str, int, torch.dtype, torch.device, int], Dictionary] = {}

    def get(self, name: str, n: int, *, dtype: torch.dtype, device: torch.device, seed: int) -> Dictionary:
        key = (name, n, dtype, device, seed if name == "random" else 0)
        if key not in self._dictionaries:
            self._dictionaries[key] = Dictionary(name, n, dtype=dtype, device=device, seed=seed)
        return self._dictionaries[key]

    @property
    def storage_bytes(self) -> int:
        return sum(dictionary.storage_bytes for dictionary in self._dictionaries.values())
