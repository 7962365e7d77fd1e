"""What the published C4 protocol does otherwise: a document per block, and a counter that begins at one."""

from __future__ import annotations

import json
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import write_c4
from processes import run_on_ranks
from small_runs import TINY, folder_of, losses, run_loop
from torch import Tensor, nn

from dist_lowrank.telemetry.console import Console
from dist_lowrank.telemetry.metrics import MetricsWriter
from dist_lowrank.training.data import load_data
from dist_lowrank.training.data.packing import IGNORED
from dist_lowrank.training.data.tokenizer import train_tokenizer
from dist_lowrank.training.evaluate import evaluate, next_token_loss
from dist_lowrank.training.run import Trainer

LENGTH = 16
DOCUMENTS = [f"The {'very ' * (number % 12)}old captain, number {number}, stood by the river." for number in range(150)]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run on unpacked documents, without a network."""
    root = tmp_path_factory.mktemp("hub")
    c4 = write_c4(root, [DOCUMENTS[:80], DOCUMENTS[80:]], [*DOCUMENTS[:30], ""])
    train_tokenizer(DOCUMENTS, 320).save_pretrained(root / "tokenizer")
    own = ["data=c4", f"data.dataset={c4}", f"data.tokenizer={root / 'tokenizer'}", "data.packing=false"]
    shared = [option for option in TINY if not option.startswith("data.")]
    return [*own, f"data.sequence_length={LENGTH}", *shared, f"runs={root / 'runs'}", "strategy=ddp", "precision=fp64"]


def test_a_block_is_one_document_cut_before_its_end_mark_or_filled_up(overrides: list[str]) -> None:
    config = folder_of(overrides).config()
    data = load_data(config.data, seed=0, rank=0, world_size=1, global_batch_size=8, micro_batch_size=8)
    end = data.tokenizer.eos_token_id
    state = data.train.state_dict()
    batch = torch.cat([part for _ in range(10) for part in data.train.next_batch()])
    assert batch.shape == (80, LENGTH)
    lengths = (batch != IGNORED).sum(dim=1)
    assert lengths.min() < LENGTH
    assert (lengths == LENGTH).any()
    for row, length in zip(batch, lengths, strict=True):
        assert row[length - 1] == end
        assert (row[:length] == end).sum() == 1
        assert (row[length:] == IGNORED).all()
        whole = [text for text in DOCUMENTS if text.startswith(data.tokenizer.decode(row[: length - 1]))]
        assert whole
        assert (length == LENGTH) or data.tokenizer.decode(row[: length - 1]) in whole
    data.train.load_state_dict(state)
    again = torch.cat([part for _ in range(10) for part in data.train.next_batch()])
    assert torch.equal(again, batch)
    assert len(data.validation) == 30  # the empty document has nothing to predict


class Bigrams(nn.Module):
    """Logits that depend on the last token alone."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(11, 11, generator=generator, dtype=torch.float64))

    def forward(self, input_ids: Tensor) -> Any:
        self.logits = self.table[input_ids]
        return self


def _blocks() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    blocks = []
    for number in range(13):
        block = torch.randint(0, 11, (9,), generator=generator)
        block[2 + number % 7 :] = IGNORED
        blocks.append(block)
    return blocks


def _losses(blocks: list[Tensor]) -> list[float]:
    """Of every target."""
    rows = Bigrams().table.detach().log_softmax(-1)
    return [-float(rows[a, b]) for block in blocks for a, b in pairwise(block) if b != IGNORED]


def test_the_loss_is_the_mean_over_tokens_that_are_there() -> None:
    found = next_token_loss(Bigrams(), torch.stack(_blocks()))
    assert float(found.detach()) == pytest.approx(torch.tensor(_losses(_blocks())).mean().item())


def _evaluated(rank: int, legacy: bool) -> float:
    return evaluate(
        Bigrams(),
        _blocks(),  # type: ignore[arg-type]
        limit=100,
        micro_batch_size=2,
        device=torch.device("cpu"),
        context=nullcontext,
        legacy_counter=legacy,
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_evaluator_weighs_tokens_alike_and_the_published_one_counts_a_batch_too_many(world_size: int) -> None:
    """13 samples in batches of 2 are 7 batches on one rank; on two, 4 and 3 of them."""
    blocks = _blocks()
    exact = torch.tensor(_losses(blocks)).mean().item()
    parts = [blocks[first : first + 2] for first in range(0, 13, 2)]
    means = [torch.tensor(_losses(part)).mean().item() for part in parts]
    by_rank = [means[rank::world_size] for rank in range(world_size)]
    legacy = sum(sum(own) / (len(own) + 1) for own in by_rank) / world_size
    assert run_on_ranks(world_size, _evaluated, False) == pytest.approx([exact] * world_size)
    assert run_on_ranks(world_size, _evaluated, True) == pytest.approx([legacy] * world_size)
    assert legacy < exact


def test_tokens_of_unequal_documents_count_alike_whatever_the_micro_batches(overrides: list[str]) -> None:
    runs = [
        run_on_ranks(1, run_loop, folder_of([*overrides, "train.steps=3", f"train.micro_batch_size={size}"]))[0]
        for size in (2, 8)
    ]
    torch.testing.assert_close(losses(runs[0]), losses(runs[1]), atol=1e-10, rtol=0)
    for name, weight in runs[0]["weights"].items():
        torch.testing.assert_close(weight, runs[1]["weights"][name], atol=1e-10, rtol=0)


def _step_on(rank: int, folder: Any, batches: list[list[Tensor]]) -> tuple[float, dict[str, Tensor]]:
    """The first step on given batches by rank: its loss, and the weights after it."""
    with MetricsWriter(folder.metrics(rank), None) as metrics:
        trainer = Trainer(folder.config(), folder, torch.device("cpu"), Console(enabled=False), metrics)
        trainer.data.train.next_batch = lambda: batches[rank]  # type: ignore[method-assign]
        trainer._step(1, [])
        return losses_of(folder.metrics(rank)), trainer.strategy.whole_weights()


def losses_of(lines: Path) -> float:
    return next(entry["loss/train"] for entry in map(json.loads, lines.read_text().splitlines()))


def test_two_ranks_with_documents_of_unequal_length_take_the_step_of_one(overrides: list[str]) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(3, 300, (8, LENGTH), generator=generator)
    for index, row in enumerate(rows):
        row[2 + 2 * index :] = IGNORED  # the first four are short
    alone = run_on_ranks(1, _step_on, folder_of([*overrides, "train.steps=2"]), [[rows]])[0]
    folder = folder_of([*overrides, "train.steps=2", "train.micro_batch_size=4"])
    for loss, weights in run_on_ranks(2, _step_on, folder, [[rows[:4]], [rows[4:]]]):
        assert loss == pytest.approx(alone[0], abs=1e-10)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, alone[1][name], atol=1e-10, rtol=0)
