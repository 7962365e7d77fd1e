"""What a checkpoint says of itself, checked before anything of it is believed.

The two JSON files are read as data: strictly typed, of bounded size. Names in the manifest are names of plain files in
the checkpoint's own folder; a path, a link or anything else there is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass as plain_dataclass
from itertools import combinations, pairwise
from math import prod
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open

from dist_lowrank.checkpoint.errors import refused

MANIFEST, SIDECAR, SUFFIX = "manifest.json", "checkpoint.json", ".safetensors"
FORMAT = 1
_LARGEST_JSON_BYTES = 2**28
_READ_BYTES = 2**22
_STRICT = ConfigDict(extra="forbid", strict=True)

Count = Annotated[int, Field(ge=0)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,200}$")]
Block = tuple[tuple[int, ...], tuple[int, ...]]  # offset and sizes


@dataclass(frozen=True, config=_STRICT)
class FileEntry:
    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, config=_STRICT)
class Manifest:
    files: dict[FileName, FileEntry]


@dataclass(frozen=True, config=_STRICT)
class TensorEntry:
    dtype: Annotated[str, Field(pattern=r"^[A-Z0-9_]{1,16}$")]  # in the words of safetensors: F32, BF16, I32, ...
    shape: list[Count]  # global


@dataclass(frozen=True, config=_STRICT)
class Sidecar:
    """Everything that is not a tensor. `config` is what the run was configured with, as data."""

    format: int
    step: Count
    world_size: Annotated[int, Field(gt=0)]
    data: list[dict[str, Any]]  # position, by rank
    schedule: dict[str, Any]
    progress: dict[str, Any]
    config: dict[str, Any]
    digest: str
    versions: dict[str, Any]
    tensors: dict[str, TensorEntry] = Field(default_factory=dict)


@plain_dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    files: dict[str, FileEntry]
    sidecar: Sidecar


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads what a checkpoint says of itself, and compares the sizes of its files. Reads no tensor.

    Raises:
        CheckpointError: naming the file.
    """
    manifest: Manifest = _parse(path / MANIFEST, Manifest, _read(path / MANIFEST, _LARGEST_JSON_BYTES))
    for name, entry in manifest.files.items():
        size = _size(path / name)
        if size != entry.bytes:
            raise refused(path / name, f"{size} bytes, where the manifest says {entry.bytes}")
    for file in sorted(path.glob(f"*{SUFFIX}")):
        if file.name not in manifest.files:
            raise refused(file, "is not in the manifest", "the files that were saved")
    if SIDECAR not in manifest.files:
        raise refused(path / MANIFEST, f"does not list {SIDECAR}")
    text = _read(path / SIDECAR, _LARGEST_JSON_BYTES)
    if hashlib.sha256(text).hexdigest() != manifest.files[SIDECAR].sha256:
        raise refused(path / SIDECAR, "its SHA-256 is not that of the manifest")
    sidecar: Sidecar = _parse(path / SIDECAR, Sidecar, text)
    if sidecar.format != FORMAT:
        raise refused(path / SIDECAR, f"format {sidecar.format}", f"{FORMAT}, which this version reads")
    return Checkpoint(path, manifest.files, sidecar)


def verify_files(checkpoint: Checkpoint, rank: int = 0, ranks: int = 1) -> None:
    """Compares the content of files with the manifest, and what they hold with the sidecar.

    Args:
        rank, ranks: how files are divided; the first rank also compares the headers of all.

    Raises:
        CheckpointError: naming the file or the tensor.
    """
    names = sorted(name for name in checkpoint.files if name.endswith(SUFFIX))
    if rank == 0:
        _verify_blocks(checkpoint, names)
    for name in names[rank::ranks]:
        if file_sha256(checkpoint.path / name) != checkpoint.files[name].sha256:
            raise refused(checkpoint.path / name, "its SHA-256 is not that of the manifest")


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with os.fdopen(_open(path), "rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def to_json(value: Manifest | Sidecar) -> bytes:
    """As JSON.

    Raises:
        ValueError: for what JSON cannot hold, such as infinity.
    """
    plain = TypeAdapter(type(value)).dump_python(value, mode="json")
    return (json.dumps(plain, indent=1, allow_nan=False) + "\n").encode()


def _verify_blocks(checkpoint: Checkpoint, names: list[str]) -> None:
    """Every element of every tensor is stored once."""
    tensors = checkpoint.sidecar.tensors
    blocks: dict[str, list[Block]] = {name: [] for name in tensors}
    for name in names:
        path = checkpoint.path / name
        for key, dtype, block in stored_blocks(path):
            entry = tensors.get(key)
            if entry is None or entry.dtype != dtype or len(entry.shape) != len(block[0]):
                raise refused(path, f"holds {key!r} as {dtype} {list(block[1])}, where {SIDECAR} says {entry}")
            blocks[key].append(block)
    for key, entry in tensors.items():
        if not _tiles(blocks[key], tuple(entry.shape)):
            raise refused(checkpoint.path, f"the files do not hold every element of {key!r} once")


def stored_blocks(path: Path) -> list[tuple[str, str, Block]]:
    """Name, dtype, offset and sizes of what a file holds.

    Raises:
        CheckpointError: it is no safetensors file of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            offsets = json.loads((file.metadata() or {})["DCP_SHARDING_INFO"])
            found = []
            for key in file.keys():  # noqa: SIM118 (it is no dictionary)
                tensor = file.get_slice(key)
                offset = tuple(int(each) for each in offsets[key]["saved_offsets"])
                found.append((key, str(tensor.get_dtype()), (offset, tuple(tensor.get_shape()))))
            return found
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise refused(path, f"its header cannot be read ({error})") from error


def _tiles(blocks: list[Block], shape: tuple[int, ...]) -> bool:
    if any(len(offset) != len(shape) for offset, _ in blocks) or sum(prod(sizes) for _, sizes in blocks) != prod(shape):
        return False
    for offset, sizes in blocks:
        if any(o < 0 or o + s > total for o, s, total in zip(offset, sizes, shape, strict=True)):
            return False
    cut = [d for d in range(len(shape)) if any(sizes[d] != shape[d] for _, sizes in blocks)]
    if len(cut) == 1:  # the usual case, without comparing every block with every other
        intervals = sorted((offset[cut[0]], offset[cut[0]] + sizes[cut[0]]) for offset, sizes in blocks)
        return all(first[1] <= second[0] for first, second in pairwise(intervals))
    return not any(_overlap(a, b) for a, b in combinations(blocks, 2))


def _overlap(a: Block, b: Block) -> bool:
    return all(max(p, q) < min(p + m, q + n) for p, m, q, n in zip(a[0], a[1], b[0], b[1], strict=True))


def _parse(path: Path, kind: type, text: bytes) -> Any:
    try:
        return TypeAdapter(kind).validate_json(text)
    except (ValidationError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"]))
        raise refused(path, f"{where + ': ' if where else ''}{first['msg']}") from error


def _read(path: Path, largest_bytes: int) -> bytes:
    with os.fdopen(_open(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > largest_bytes:
            raise refused(path, "is too large for a description of a checkpoint", f"at most {largest_bytes} bytes")
        return file.read(largest_bytes)


def _size(path: Path) -> int:
    descriptor = _open(path)
    try:
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """A descriptor of a plain file. Links and everything else are refused, and not opened."""
    try:
        kind = os.lstat(path).st_mode
        if not stat.S_ISREG(kind):
            raise refused(path, "is a link" if stat.S_ISLNK(kind) else "is no plain file", "a plain file")
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise refused(path, "is missing") from error
    except OSError as error:
        raise refused(path, error.strerror or str(error)) from error
