"""A data set of the Hugging Face hub as streams: what is held out, and each rank's part of the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from dist_lowrank.config.schema import HubData

if TYPE_CHECKING:
    import datasets  # imported where it is used: `check_hub` answers before that takes its second

_HUB_TIMEOUT_SECONDS = 4.0


@dataclass(frozen=True)
class HubStreams:
    held_out: tuple[str, ...]  # documents
    open_stream: Callable[[], datasets.IterableDataset]  # this rank's training rows, from the beginning


def check_hub(config: HubData) -> None:
    """Raise what `reach_hub` raises unless the data set is there, on the hub or as a folder with a copy."""
    if not Path(config.dataset).is_dir():
        reach_hub("data.dataset", config.dataset, "dataset")


def reach_hub(key: str, name: str, kind: Literal["dataset", "model"]) -> None:
    """Find out within seconds whether the hub has something; the libraries retry for half a minute and more.

    Args:
        key: of the configuration, for messages.
        name: of the repository on the hub, the value of `key`.
        kind: of the repository.

    Raises:
        ConnectionError: the hub cannot be reached; says what needs no network.
        ValueError: the hub has no such repository, or not for this user.
    """
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_HUB_TIMEOUT_SECONDS)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{key}={name!r}: must be a folder, or a {kind} on the Hugging Face hub that you may read ({error})"
        ) from error
    except Exception as error:  # which class depends on the HTTP library that huggingface_hub was built on
        raise _unreachable(key, name, error) from error


def open_hub(config: HubData, *, rank: int, world_size: int) -> HubStreams:
    """Hold out the documents for validation and split the others among the ranks.

    Held out is the first `validation_documents` of `validation_split` or, without one, of the first shard of `split`.
    The ranks' parts are disjoint, hold all the rest, and keep the order of the shards.

    Raises:
        ConnectionError, ValueError: as `reach_hub`, and for a subset, split or text column that is not there.
    """
    from datasets.distributed import split_dataset_by_node

    stream = _load(config, "split", config.split)
    if config.validation_split is not None:
        held_out_from = _load(config, "validation_split", config.validation_split)
    else:
        held_out_from = stream.shard(num_shards=stream.num_shards, index=0)
    held_out = tuple(text_of_row(row, config.text_column) for row in held_out_from.take(config.validation_documents))
    skipped = len(held_out) if config.validation_split is None else 0

    def open_stream() -> datasets.IterableDataset:
        if stream.num_shards % world_size:  # each rank reads all shards and keeps one row of `world_size`
            return split_dataset_by_node(stream.skip(skipped), rank, world_size)
        # Each rank has whole shards, the first one rank 0. `skip` before the split would be shared out among the
        # ranks: each would skip rows of its own, and train on some that are held out.
        part = split_dataset_by_node(stream, rank, world_size)
        return part.skip(skipped) if rank == 0 and skipped else part

    return HubStreams(held_out, open_stream)


def text_of_row(row: dict[str, Any], column: str) -> str:
    """The text of a row of a data set.

    Raises:
        ValueError: there is no such column, or it holds no text; names `data.text_column`.
    """
    text = row.get(column)
    if not isinstance(text, str):
        columns = ", ".join(name for name, value in row.items() if isinstance(value, str))
        raise ValueError(f"data.text_column={column!r}: must be a column of text; this data set has {columns}")
    return text


def _load(config: HubData, key: str, split: str) -> datasets.IterableDataset:
    import datasets

    try:
        return datasets.load_dataset(config.dataset, config.subset, split=split, streaming=True)
    except ConnectionError as error:
        raise _unreachable("data.dataset", config.dataset, error) from error
    except (ValueError, FileNotFoundError) as error:  # its message lists the subsets or splits that there are
        raise ValueError(
            f"data.dataset={config.dataset!r} with data.subset={config.subset!r} and data.{key}={split!r}: {error}"
        ) from error


def _unreachable(key: str, name: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"{key}={name!r}: the Hugging Face hub cannot be reached ({error}). Without a network train on data=corpus, or "
        "on your own files with data=text data.path=...; both make their own tokenizer"
    )
