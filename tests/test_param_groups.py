"""Which parameters take the low-rank path, by name: the defaults and the patterns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_lowrank.optim import DCTAdamW, Trion, param_groups


class Plain(nn.Module):
    """A module that knows nothing of transformers, with one of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.convolution = nn.Conv1d(8, 8, 3)
        self.mixer = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.convolution(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)
        return self.lm_head(self.norm(self.mixer(hidden)))


def llama(tied: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return AutoModelForCausalLM.from_config(config)


def gpt2() -> nn.Module:
    from transformers import AutoModelForCausalLM, GPT2Config

    return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8))


def names_of(groups: list[dict[str, Any]]) -> tuple[set[str], set[str]]:
    """Names of the low-rank and of the dense group."""
    assert len(groups) == 2
    low_rank, dense = groups
    assert low_rank.get("low_rank", True) is True
    assert dense["low_rank"] is False
    lists = [[name for name, _ in group["params"]] for group in groups]
    assert all(len(names) == len(set(names)) for names in lists)
    return set(lists[0]), set(lists[1])


def test_defaults_on_a_plain_module() -> None:
    low_rank, dense = names_of(param_groups(Plain()))
    assert low_rank == {"mixer.0.weight", "mixer.2.weight"}
    assert dense == {name for name, _ in Plain().named_parameters()} - low_rank


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_defaults_on_llama(tied: bool) -> None:
    model = llama(tied)
    low_rank, dense = names_of(param_groups(model))
    layers = [f"model.layers.{i}" for i in range(2)]
    attention = {f"{layer}.self_attn.{p}_proj.weight" for layer in layers for p in "qkvo"}
    mlp = {f"{layer}.mlp.{p}_proj.weight" for layer in layers for p in ("gate", "up", "down")}
    assert low_rank == attention | mlp
    assert dense == {name for name, _ in model.named_parameters()} - low_rank
    assert "model.embed_tokens.weight" in dense
    assert ("lm_head.weight" in dense) is not tied


def test_defaults_on_gpt2_whose_head_is_tied() -> None:
    model = gpt2()
    low_rank, dense = names_of(param_groups(model))
    blocks = [f"transformer.h.{i}" for i in range(2)]
    assert low_rank == {
        f"{block}.{part}.weight"
        for block in blocks
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= dense
    assert dense == {name for name, _ in model.named_parameters()} - low_rank


@pytest.mark.parametrize("make_model", [Plain, lambda: llama(True), gpt2], ids=["plain", "llama", "gpt2"])
def test_every_parameter_appears_once_as_itself(make_model: Any) -> None:
    model = make_model()
    named = dict(model.named_parameters())
    listed = [pair for group in param_groups(model) for pair in group["params"]]
    assert sorted(name for name, _ in listed) == sorted(named)
    for name, parameter in listed:
        assert parameter is named[name]


def test_low_rank_patterns_choose_and_everything_else_is_dense() -> None:
    model = llama(False)
    low_rank, dense = names_of(param_groups(model, low_rank=["*.q_proj.weight", "*layers.1.mlp.*"]))
    assert low_rank == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)} | {
        f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up", "down")
    }
    assert dense == {name for name, _ in model.named_parameters()} - low_rank


def test_dense_patterns_win() -> None:
    model = llama(False)
    default, _ = names_of(param_groups(model))
    low_rank, _ = names_of(param_groups(model, dense=["*.k_proj.*", "*.v_proj.*"]))
    assert low_rank == {name for name in default if "k_proj" not in name and "v_proj" not in name}
    low_rank, _ = names_of(param_groups(model, low_rank=["*self_attn*"], dense=["*.o_proj.weight"]))
    assert low_rank == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qkv"}


def test_an_embedding_can_be_made_low_rank_by_name() -> None:
    low_rank, _ = names_of(param_groups(Plain(), low_rank=["embedding.weight", "mixer.0.weight"]))
    assert low_rank == {"embedding.weight", "mixer.0.weight"}


@pytest.mark.parametrize("which", ["low_rank", "dense"])
def test_a_pattern_that_matches_nothing_is_refused(which: str) -> None:
    with pytest.raises(ValueError, match="q_prj") as caught:
        param_groups(Plain(), **{which: ["mixer.*", "*.q_prj.weight"]})
    assert which in str(caught.value)


@pytest.mark.parametrize("optimizer_class", [DCTAdamW, Trion])
def test_the_groups_train_a_model_with_their_options(optimizer_class: type) -> None:
    torch.manual_seed(0)
    model = Plain()
    groups = param_groups(model)
    groups[0]["rank"] = 2
    optimizer = optimizer_class(groups, lr=0.02, rank=0.5, **({"dense_lr": 0.02} if optimizer_class is Trion else {}))
    tokens = torch.randint(0, 11, (4, 10))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens[:, 1:-1].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert optimizer.state[model.mixer[0].weight]["indices"].shape == (2,)
    assert "indices" not in optimizer.state[model.embedding.weight]


def test_patterns_may_send_everything_to_one_path() -> None:
    model = Plain()
    groups = param_groups(model, dense=["*"])
    assert all(group["low_rank"] is False for group in groups)  # an empty group is left out
    assert {name for group in groups for name, _ in group["params"]} == {name for name, _ in model.named_parameters()}
    optimizer = DCTAdamW(groups)
    model(torch.randint(0, 11, (2, 5))).sum().backward()
    optimizer.step()


def test_frozen_parameters_are_in_no_group() -> None:
    model = Plain()
    model.mixer[0].requires_grad_(False)
    low_rank, dense = names_of(param_groups(model))
    assert low_rank == {"mixer.2.weight"}
    assert dense == {n for n, p in model.named_parameters() if p.requires_grad} - low_rank


def test_a_string_is_refused_where_a_list_of_patterns_belongs() -> None:
    with pytest.raises(ValueError, match="low_rank"):
        param_groups(Plain(), low_rank="mixer.*")


def test_names_do_not_depend_on_wrappers() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    expected = names_of(param_groups(Plain()))
    wrapped = Plain()
    wrapped.mixer = checkpoint_wrapper(wrapped.mixer)
    assert any("_checkpoint_wrapped_module" in name for name, _ in wrapped.named_parameters())
    assert names_of(param_groups(wrapped)) == expected
    assert names_of(param_groups(torch.compile(Plain()))) == expected


# Embeddings and output heads as matrices


def roles_of(groups: list[dict[str, Any]]) -> dict[str, str]:
    """By name: `low-rank`, `dense`, or what a matrix of the vocabulary is."""
    kinds = [group.get("vocabulary") or ("low-rank" if group.get("low_rank", True) else "dense") for group in groups]
    return {name: kind for kind, group in zip(kinds, groups, strict=True) for name, _ in group["params"]}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_matrices_of_the_vocabulary_have_groups_that_say_which_they_are(tied: bool) -> None:
    model = llama(tied)
    before, roles = roles_of(param_groups(model)), roles_of(param_groups(model, vocabulary="matrices"))
    changed = {name: role for name, role in roles.items() if role != before[name]}
    assert roles.keys() == before.keys()
    assert changed == (
        {"model.embed_tokens.weight": "tied"}
        if tied
        else {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}
    )


def test_heads_are_known_by_name_where_the_model_does_not_say_and_tied_ones_by_any_of_their_names() -> None:
    model = Plain()
    roles = roles_of(param_groups(model, vocabulary="matrices"))
    assert {name: role for name, role in roles.items() if role not in ("low-rank", "dense")} == {
        "embedding.weight": "embedding",
        "lm_head.weight": "head",
    }
    assert roles["lm_head.bias"] == "dense"
    model.lm_head.weight = model.embedding.weight
    assert roles_of(param_groups(model, vocabulary="matrices"))["embedding.weight"] == "tied"
    gpt = roles_of(param_groups(gpt2(), vocabulary="matrices"))
    assert (gpt["transformer.wte.weight"], gpt["transformer.wpe.weight"]) == ("tied", "embedding")


def test_patterns_come_before_the_vocabulary_only_where_they_say_dense() -> None:
    roles = roles_of(param_groups(Plain(), low_rank=["lm_head*"], dense=["embedding*"], vocabulary="matrices"))
    assert roles["lm_head.weight"] == "head"
    assert roles["embedding.weight"] == "dense"
    assert roles["mixer.0.weight"] == "dense"
    with pytest.raises(ValueError, match="vocabulary: 'rows' is not allowed; allowed: dense, matrices"):
        param_groups(Plain(), vocabulary="rows")
