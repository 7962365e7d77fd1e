"""Fixed orthonormal dictionaries: the candidates among which column selection chooses.

A dictionary is an orthonormal `n x n` matrix `D`; its *columns* are the candidates. One dictionary serves both sides
of every matrix with the same `n`, every layer and every rank, so it is built once per `(name, n)` and never stored in
a checkpoint.

The cosine dictionaries follow `d_k[j] = c_k cos(pi k (2j + 1) / (2n))` with `c_0 = sqrt(1/n)`, `c_k = sqrt(2/n)`
(DCT-II; `A @ D` is the orthonormal DCT-II of every row). The angle has period `4n` in the integer `k (2j + 1)`, so the
entries come from a table of `4n` float64 cosines, exact at any `n`, where angles formed in float32 lose three digits
at n = 4096. The same table gives any few columns on the fly, so the matrix itself need not exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dist_lowrank.fast_transforms import FAST_TRANSFORMS, FastTransform, faster_transform, hadamard_block
from dist_lowrank.kernels import narrow_products, products

DICTIONARIES = ("dct2", "dct3", "hadamard", "random", "identity")
TRANSFORMS = ("gemm", "fft", "auto")
PRECISIONS = ("fp32", "bf16")  # of the operands of products

BLOCK_ELEMENTS = 2**20  # of columns made from the formula at once


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
        name: one of `DICTIONARIES`. `dct3` is the transpose of `dct2`; `hadamard` is Sylvester's, in natural order, in
            blocks along the diagonal of the largest power of two that divides n; `random` is the QR factor of a
            Gaussian matrix drawn from `seed` and `n` alone.
        n: size, at least 1; 1 or even for `hadamard`.
        dtype: of the result; entries are computed in float64 and rounded once.

    Returns:
        Tensor (n, n).

    Raises:
        ValueError: for an unknown name or a size that the dictionary does not have.
    """
    check_dictionary(name, n)
    if name == "random":
        return _random(n, seed).to(device=device, dtype=dtype)
    if name == "identity":
        return torch.eye(n, dtype=dtype, device=device)
    return _Formula(name, n, dtype, torch.device(device)).atoms(torch.arange(n, device=device)).t()


def check_dictionary(name: str, n: int | None = None) -> None:
    """Raises ValueError unless `name` is a dictionary and it exists at size `n`."""
    if name not in DICTIONARIES:
        raise ValueError(f"dictionary: {name!r} is not allowed; allowed: {', '.join(DICTIONARIES)}")
    if n is None:
        return
    if n < 1:
        raise ValueError(f"n: {n} is not allowed; allowed: an integer >= 1")
    if name == "hadamard" and n > 1 and n % 2:
        raise ValueError(
            f"dictionary: 'hadamard' has no matrix of size n={n} but the identity, since its blocks are of the largest "
            "power of two that divides n; allowed: n even (or 1), dictionary='identity'"
        )


def check_transform(name: str, transform: str, materialize: bool, precision: str = "fp32") -> None:
    """Raises ValueError unless products with dictionary `name` can be computed in this way."""
    if precision not in PRECISIONS:
        raise ValueError(f"transform_precision: {precision!r} is not allowed; allowed: {', '.join(PRECISIONS)}")
    if transform not in TRANSFORMS:
        raise ValueError(f"transform: {transform!r} is not allowed; allowed: {', '.join(TRANSFORMS)}")
    if materialize is not True and materialize is not False:
        raise ValueError(f"materialize: {materialize!r} is not allowed; allowed: True, False")
    if name == "identity":
        return  # there is nothing to multiply by
    if precision == "bf16" and name == "shared":
        raise ValueError(
            "transform_precision: 'bf16' is not allowed with dictionary='shared', whose matrix is state in fp32; "
            "allowed: fp32, or another dictionary"
        )
    if precision == "bf16" and transform != "gemm":
        raise ValueError(
            f"transform_precision: 'bf16' is not allowed with transform={transform!r}, as a fast transform is computed "
            "in fp32; allowed: fp32, or transform='gemm'"
        )
    if transform == "fft" and name not in FAST_TRANSFORMS:
        raise ValueError(
            f"transform: 'fft' is not allowed with dictionary={name!r}, which has no fast transform; allowed: gemm, "
            "auto (then gemm)"
        )
    if materialize:
        return
    if name not in FAST_TRANSFORMS:
        raise ValueError(
            f"materialize: False is not allowed with dictionary={name!r}: its entries follow no formula, so the n x n "
            f"matrix has to be kept; allowed: True, or dictionary={', '.join(FAST_TRANSFORMS)}"
        )
    if transform == "gemm":
        raise ValueError(
            "materialize: False is not allowed with transform='gemm', which multiplies by the n x n matrix; allowed: "
            "True, or transform=fft, auto"
        )


def operand_dtype(name: str, dtype: torch.dtype, precision: str) -> torch.dtype:
    """Of products with dictionary `name` in `dtype`."""
    return torch.bfloat16 if precision == "bf16" and name != "identity" else dtype


class _Formula:
    """Any columns of `dct2`, `dct3` or `hadamard`, from integers: a table of 4n cosines, or parities of bits."""

    def __init__(self, name: str, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self.n = name, n
        if name == "hadamard":
            self.block = hadamard_block(n)
            signs = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64, device="cpu") * math.sqrt(1 / self.block)
            self.table = signs.to(device=device, dtype=dtype)  # of even parity, odd parity, outside the block
        else:
            angles = torch.arange(4 * n, dtype=torch.float64, device="cpu") * (math.pi / (2 * n))
            self.table = (torch.cos(angles) * math.sqrt(2 / n)).to(device=device, dtype=dtype)  # (4n,)

    def atoms(self, indices: Tensor) -> Tensor:
        """The columns at `indices` (r,), int64, as rows: `D[:, indices]^T`, (r, n)."""
        k = indices.unsqueeze(1)
        j = torch.arange(self.n, device=indices.device).unsqueeze(0)
        if self.name == "hadamard":
            return self.table[_parity(k & j & (self.block - 1)).masked_fill_(k // self.block != j // self.block, 2)]
        if self.name == "dct2":
            atoms = self.table[(k * (2 * j + 1)).remainder_(4 * self.n)]
            return atoms.masked_fill_(k == 0, math.sqrt(1 / self.n))
        atoms = self.table[(j * (2 * k + 1)).remainder_(4 * self.n)]
        atoms[:, 0] = math.sqrt(1 / self.n)
        return atoms


def _parity(values: Tensor) -> Tensor:
    """Whether the number of one bits of each non-negative int64 is odd: 0 or 1. In place."""
    for shift in (32, 16, 8, 4, 2, 1):
        values ^= values >> shift
    return values.bitwise_and_(1)


def _random(n: int, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed((seed * 0x9E3779B97F4A7C15 + n) % 2**63)
    gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)  # the unique factor: positive diagonal of r
    return torch.mul(q, signs)


class Dictionary:
    """One dictionary at one size, ready for products on one device.

    Holds `D^T` (its rows are the candidates), so that taking r candidates copies r contiguous rows. With
    `materialize=False` it holds O(n) numbers instead: the transform is fast, and chosen columns are made from the
    formula at each use, never more than half of the matrix or `BLOCK_ELEMENTS` entries at once. The identity holds
    nothing.

    Args:
        dtype: of the products, float32 or float64; rows of another are converted.
        precision: of operands. `bf16`: rows, coefficients and the matrix, which is kept so, are rounded to bfloat16;
            sums and results stay in `dtype`. `fp32`: they are of `dtype`.
        transform: how `transform` multiplies: `gemm` by the matrix, `fft` by the fast transform, `auto` by the faster
            of the two (see `faster_transform`). All agree to rounding.

    Raises:
        ValueError: for a name, size or combination that is not allowed.
    """

    def __init__(
        self,
        name: str,
        n: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
        transform: str = "gemm",
        materialize: bool = True,
        precision: str = "fp32",
    ) -> None:
        check_dictionary(name, n)
        check_transform(name, transform, materialize, precision)
        self.name, self.n, self.dtype = name, n, dtype
        self.operands = operand_dtype(name, dtype, precision)
        self._atoms: Tensor | None = None  # (n, n) = D^T
        self._formula: _Formula | None = None
        self._fast: FastTransform | None = None
        if name == "identity":
            return
        if materialize:
            self._atoms = columns(name, n, dtype=self.operands, device=device, seed=seed).t().contiguous()
        else:
            self._formula = _Formula(name, n, dtype, device)
        if name in FAST_TRANSFORMS and transform != "gemm":
            self._fast = FastTransform(name, n, dtype=dtype, device=device)
        if transform == "auto" and self._fast is not None and self._atoms is not None:
            matrix = self._atoms.t()
            if (
                faster_transform(name, n, dtype, device, lambda rows: products.product(rows, matrix), self._fast)
                == "gemm"
            ):
                self._fast = None

    @property
    def atoms(self) -> Tensor:
        """`D^T`, (n, n), of the operands' dtype, where it is kept: its rows are the candidates."""
        assert self._atoms is not None
        return self._atoms

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        of_formula = self._formula.table if self._formula else None
        of_transform = self._fast.twiddle if self._fast else None
        return [table for table in (self._atoms, of_formula, of_transform) if table is not None]

    @property
    def storage_bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors())

    def transform(self, rows: Tensor) -> Tensor:
        """Coordinates of each row: `rows @ D`, (L, n) -> (L, n). May return `rows` itself."""
        rows = rows.to(self.operands)
        if self.name == "identity":
            return rows
        if self._fast is not None:
            return self._fast(rows)
        return self._times(rows, self.atoms.t())

    def chosen(self, indices: Tensor) -> Tensor | None:
        """`D[:, indices]^T`, (r, n), for `project` and `add_lifted` to share; None where no matrix is kept."""
        return None if self._atoms is None else self._atoms.index_select(0, indices)

    def project(self, rows: Tensor, indices: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Coordinates on the chosen candidates alone: `rows @ D[:, indices]`, (L, n) -> (L, r).

        Args:
            chosen: what `chosen` returned for these indices, if it was asked.
        """
        rows = rows.to(self.operands)
        if self.name == "identity":
            return rows.index_select(1, indices)
        parts = [self._times(rows, atoms.t()) for _, atoms in self._atoms_in_blocks(indices, chosen)]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)

    def _times(self, rows: Tensor, matrix: Tensor) -> Tensor:
        """`rows @ matrix`, both of the operands' dtype."""
        if self.operands == self.dtype:
            return products.product(rows, matrix)
        return narrow_products.product(rows, matrix, self.dtype)

    def add_lifted(
        self,
        target: Tensor,
        coefficients: Tensor,
        indices: Tensor,
        *,
        decay: float,
        scale: float,
        columns: slice = slice(None),
        chosen: Tensor | None = None,
    ) -> None:
        """In place: `target = decay * target + scale * (coefficients @ D[:, indices]^T)[:, columns]`.

        Args:
            target: (L, width of `columns`), of the products' dtype, or of a narrower one of the operands.
            chosen: as for `project`.
        """
        if self.name == "identity":
            start, stop, _ = columns.indices(self.n)
            if (start, stop) != (0, self.n):
                inside = (indices >= start) & (indices < stop)
                coefficients, indices = coefficients[:, inside], indices[inside] - start
            target.mul_(decay).index_add_(1, indices, coefficients, alpha=scale)
            return
        for part, atoms in self._atoms_in_blocks(indices, chosen):
            beta = decay if part.start == 0 else 1
            factors = coefficients if atoms.shape[0] == coefficients.shape[1] else coefficients[:, part]
            atoms = atoms if target.shape[1] == self.n else atoms[:, columns]
            if self.operands == self.dtype:
                products.add_product(target, factors, atoms, beta=beta, alpha=scale)
            else:
                narrow_products.add_product(target, factors.to(self.operands), atoms, beta=beta, alpha=scale)

    def _atoms_in_blocks(self, indices: Tensor, chosen: Tensor | None = None) -> Iterable[tuple[slice, Tensor]]:
        """`D[:, indices[part]]^T` for the parts that make up the indices; one part if the matrix is there."""
        if self._formula is None:
            return [(slice(0, len(indices)), self.atoms.index_select(0, indices) if chosen is None else chosen)]
        return self._atoms_by_formula(self._formula, indices)

    def _atoms_by_formula(self, formula: _Formula, indices: Tensor) -> Iterator[tuple[slice, Tensor]]:
        width = max(1, min(BLOCK_ELEMENTS // self.n, self.n // 2))
        for start in range(0, len(indices), width):
            part = slice(start, start + width)
            yield part, formula.atoms(indices[part])


class LearnedDictionary(Dictionary):
    """A dictionary that follows no formula.

    Args:
        atoms: `D^T`, (n, n): its rows are the candidates. Not copied.
    """

    def __init__(self, atoms: Tensor) -> None:
        self.name, self.n, self.dtype, self.operands = "shared", len(atoms), atoms.dtype, atoms.dtype
        self._atoms, self._formula, self._fast = atoms, None, None


class DictionaryCache:
    """The dictionaries that one optimizer uses: one per distinct set of options, shared by all matrices."""

    def __init__(self) -> None:
        self._dictionaries: dict[tuple[object, ...], Dictionary] = {}

    def get(
        self,
        name: str,
        n: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        transform: str = "gemm",
        materialize: bool = True,
        precision: str = "fp32",
    ) -> Dictionary:
        seed = seed if name == "random" else 0
        key = (name, n, dtype, device, seed, transform, materialize, precision)
        found = self._dictionaries.get(key)
        if found is None:
            found = self._dictionaries[key] = Dictionary(
                name,
                n,
                dtype=dtype,
                device=device,
                seed=seed,
                transform=transform,
                materialize=materialize,
                precision=precision,
            )
        return found

    def tensors(self) -> list[Tensor]:
        """All that the dictionaries hold."""
        return [tensor for dictionary in self._dictionaries.values() for tensor in dictionary.tensors()]
