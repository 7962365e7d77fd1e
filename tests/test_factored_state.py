"""What SCALE, Adafactor, CAME, SMMF and AdamW8bit keep, send and refuse."""

from __future__ import annotations

import inspect
import io
import math
from functools import cache
from typing import Any

import pytest
import torch
from collectives import CountCollectives
from factored_references import dynamic_code
from processes import run_on_ranks
from test_factored import ROLES, SHAPES, SHARDED, STEPS, expected, feed, start, whole
from test_traffic import NAMES
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dist_lowrank.config import compose
from dist_lowrank.optim import CAME, SCALE, SMMF, Adafactor, AdamW8bit, full_state_dict
from dist_lowrank.optim.quantization import dynamic_values, from_dynamic, pack_signs, to_dynamic, unpack_signs
from dist_lowrank.optim.smmf import closest_factors
from dist_lowrank.optim.traffic import Collective, collectives_of_step

CLASSES: dict[str, Any] = {
    "scale": SCALE,
    "adafactor": Adafactor,
    "came": CAME,
    "smmf": SMMF,
    "adamw8bit": AdamW8bit,
}
MATRICES = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}

# What is sent


def _traffic(rank: int, strategy: str, world_size: int) -> dict[str, list[tuple[list[Collective], list[Any]]]]:
    """By optimizer, and with one wave and many: what was predicted, and what was sent."""
    found: dict[str, list[tuple[list[Collective], list[Any]]]] = {}
    for method in SHARDED:
        named, updater = start(rank, method, strategy, world_size, torch.float32)
        for step, workspace_bytes in enumerate((2**29, 2**29, 1)):
            updater.workspace_bytes = workspace_bytes
            feed(named, step, rank, strategy, world_size)
            predicted = collectives_of_step(updater)
            with CountCollectives() as counter:
                updater.step()
            sent = [
                (NAMES[name], elements, size)
                for (name, elements), size in zip(counter.calls, counter.sent_bytes, strict=True)
            ]
            if step:  # the first also compares replicas
                found.setdefault(method, []).append((predicted, sent))
    return found


@cache
def traffic(strategy: str, world_size: int) -> list[dict[str, list[tuple[list[Collective], list[Any]]]]]:
    return run_on_ranks(world_size, _traffic, strategy, world_size)


@pytest.mark.parametrize(
    ("strategy", "world_size"),
    [
        ("ddp", 2),
        ("fsdp", 2),
        ("flat", 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("fsdp_last", 2), ("hsdp", 4), ("fsdp", 4)]),
    ],
)
def test_predicted_collectives_are_those_that_a_step_sends(strategy: str, world_size: int) -> None:
    for found in traffic(strategy, world_size):
        for method, steps in found.items():
            for predicted, sent in steps:
                assert [(each.operation, each.elements, each.bytes) for each in predicted] == sent, method
            one_wave, many = (len(sent) for _, sent in steps)
            assert one_wave < many or method in ("scale", "adamw8bit"), method


FACTORS = sum(columns + 1 for _, columns in MATRICES.values())
SUMS = {  # per step
    "scale": [sum(MATRICES[name][1] for name, role in ROLES.items() if role == "embedding")],
    "adafactor": [FACTORS, len(MATRICES)],
    "adafactor_momentum": [FACTORS, len(MATRICES)],
    "came": [FACTORS, len(MATRICES), FACTORS],
    "smmf": [2 * sum(sum(closest_factors(math.prod(shape))) for shape in MATRICES.values())],
    "adamw8bit": [],
}


@pytest.mark.parametrize("method", SHARDED)
def test_shards_of_rows_send_small_sums_alone_and_replicas_numbers_of_rows_or_rows(method: str) -> None:
    predicted = traffic("fsdp", 2)[0][method][0][0]
    assert [(each.purpose, each.elements) for each in predicted if each.purpose != "agreement"] == [
        ("sums", size) for size in SUMS[method]
    ]
    predicted = traffic("ddp", 2)[0][method][0][0]
    per_row = {name: 1 if method in ("scale", "adafactor") else n for name, (_, n) in MATRICES.items()}
    if method == "scale":  # has momentum
        per_row |= {name: MATRICES[name][1] for name, role in ROLES.items() if role in ("head", "tied")}
    delivered = sum(-(-rows // 2) * per_row[name] for name, (rows, _) in MATRICES.items())
    assert [(each.purpose, each.elements) for each in predicted if each.purpose != "agreement"] == [
        *(("sums", size) for size in SUMS[method]),
        ("coefficients", delivered),
    ]


# State


def _half(rank: int, strategy: str, world_size: int) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """Weights and state in the middle of the way."""
    found = {}
    for method in SHARDED:
        named, updater = start(rank, method, strategy, world_size, torch.float64)
        for step in range(STEPS // 2):
            feed(named, step, rank, strategy, world_size)
            updater.step()
        found[method] = whole(named, strategy), full_state_dict(updater)
    return found


def _rest(rank: int, strategy: str, world_size: int, halves: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for method, (weights, state) in halves.items():
        named, updater = start(rank, method, strategy, world_size, torch.float64)
        updater.load_state_dict(state)
        with torch.no_grad():
            for name, p in named.items():
                if isinstance(p, DTensor):
                    p.copy_(distribute_tensor(weights[name], p.device_mesh, p.placements, src_data_rank=None))
                elif strategy == "flat":
                    begin = sum(part.numel() for part in _parts(p)[:rank])
                    p.copy_(weights[name].flatten()[begin : begin + p.numel()])
                else:
                    p.copy_(weights[name])
        for step in range(STEPS // 2, STEPS):
            feed(named, step, rank, strategy, world_size)
            updater.step()
        found[method] = whole(named, strategy)
    return found


def _parts(p: Tensor) -> list[Tensor]:
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, p.detach())
    return parts


@pytest.mark.parametrize(
    ("first", "second"),
    [(("fsdp", 3), ("ddp", 2)), pytest.param(("flat", 3), ("flat", 2), marks=pytest.mark.slow)],
)
def test_state_that_is_saved_half_way_continues_under_another_sharding(
    first: tuple[str, int], second: tuple[str, int]
) -> None:
    halves = run_on_ranks(first[1], _half, *first)[0]
    if first[0] != "flat":  # whose keys say which parameter they are of
        for method, (_, alone) in _half(0, "one", 1).items():
            for index, tensors in alone["state"].items():
                for key, tensor in tensors.items():
                    found = halves[method][1]["state"][index][key]
                    torch.testing.assert_close(found, tensor, rtol=1e-9, atol=1e-9, msg=f"{method} {key}")
    for resumed in run_on_ranks(second[1], _rest, *second, halves):
        for method, weights in resumed.items():
            for name, weight in weights.items():
                torch.testing.assert_close(
                    weight, expected(method)[name][-1], rtol=0, atol=1e-9, msg=f"{method} {name}"
                )


@pytest.mark.parametrize("name", CLASSES)
def test_state_keeps_its_bits_through_a_file_though_weights_are_of_low_precision(name: str) -> None:
    def make() -> tuple[list[nn.Parameter], Any]:
        parameters = [nn.Parameter(torch.ones(12, 400, dtype=torch.bfloat16)), nn.Parameter(torch.ones(5).bfloat16())]
        role = {"vocabulary": "head"} if name == "scale" else {}
        return parameters, CLASSES[name]([{"params": parameters, **role}])

    parameters, updater = make()
    for seed in range(2):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
        updater.step()
    file = io.BytesIO()
    torch.save(updater.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    others, fresh = make()
    fresh.load_state_dict(loaded)
    for p, q in zip(parameters, others, strict=True):
        assert updater.state[p].keys() == fresh.state[q].keys()
        for key, tensor in updater.state[p].items():
            assert fresh.state[q][key].dtype == tensor.dtype
            assert tensor.dtype in (torch.float32, torch.uint8)
            assert torch.equal(fresh.state[q][key], tensor)


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (12, 12), (13, 1), (12, 400)], ids=str)
def test_state_is_as_large_as_the_formula_says(shape: tuple[int, int]) -> None:
    m, n = shape
    a, b = closest_factors(m * n)
    codes = 2 * m * n + 8 * m * math.ceil(n / 256) if m * n >= 4096 else 8 * m * n
    sizes = {
        "scale": 0,
        "adafactor": 4 * (m + n),
        "came": 4 * m * n + 8 * (m + n),
        "smmf": 8 * (a + b) + m * math.ceil(n / 8),
        "adamw8bit": codes,
    }
    for name, size in sizes.items():
        held = CLASSES[name]([nn.Parameter(torch.zeros(shape))]).memory_bytes()
        assert held["moments"] == sum(held.values()) - 4 == size, name  # beside the step counter
    for dtype, size in ((None, 4 * m * n), (torch.bfloat16, 2 * m * n)):
        head = [{"params": [nn.Parameter(torch.zeros(shape))], "vocabulary": "head"}]
        assert SCALE(head, moment_dtype=dtype).memory_bytes()["moments"] == size
    assert Adafactor([nn.Parameter(torch.zeros(shape))], beta1=0.9).memory_bytes()["moments"] == 4 * (m * n + m + n)


# Numbers


def test_elements_are_laid_out_as_square_as_they_go() -> None:
    shapes = {(1376, 512): (1024, 688), (5461, 2048): (4064, 2752), (32000, 2048): (8192, 8000), (1, 13): (13, 1)}
    assert {shape: closest_factors(math.prod(shape)) for shape in shapes} == shapes


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_code_rounds_to_the_nearest_of_its_numbers(signed: bool) -> None:
    known = dynamic_values(signed, torch.device("cpu"))
    torch.testing.assert_close(known.double(), torch.from_numpy(dynamic_code(signed)), rtol=1e-7, atol=0)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 600, generator=generator).double() * 10.0 ** torch.randint(
        -6, 3, (7, 600), generator=generator
    )
    values = values if signed else values.abs()
    codes, scales = to_dynamic(values, signed=signed)
    assert (codes.shape, codes.dtype, scales.shape, scales.dtype) == ((7, 600), torch.uint8, (7, 3), torch.float32)
    found = from_dynamic(codes, scales, signed, torch.float64)
    spread = scales.double().repeat_interleave(256, dim=1)[:, :600]
    nearest = ((values / spread).unsqueeze(2) - known).abs().amin(dim=2) * spread
    torch.testing.assert_close((found - values).abs(), nearest, rtol=1e-9, atol=1e-12)
    for block in torch.split((values - found).abs() < 1e-7 * spread, 256, dim=1):  # the largest comes back
        assert block.any(dim=1).all()
    nothing = from_dynamic(torch.zeros_like(codes), torch.zeros_like(scales), signed, torch.float32)
    assert (nothing == 0).all()
    assert from_dynamic(*to_dynamic(torch.full((1, 3), math.nan), signed=signed), signed, torch.float32).isnan().all()


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 400])
def test_signs_come_back_from_one_bit_each(columns: int) -> None:
    positive = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns)) > 0
    packed = pack_signs(positive)
    assert (packed.shape, packed.dtype) == ((5, math.ceil(columns / 8)), torch.uint8)
    assert torch.equal(unpack_signs(packed, columns, torch.float32), torch.where(positive, 1.0, -1.0))


@pytest.mark.parametrize("name", CLASSES)
def test_a_zero_gradient_only_decays_the_weights_and_the_next_one_moves_them(name: str) -> None:
    p = nn.Parameter(torch.ones(12, 400))
    updater = CLASSES[name]([p], lr=0.1, weight_decay=0.5)
    p.grad = torch.zeros_like(p)
    updater.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, 0.95))
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    updater.step()
    assert p.isfinite().all()
    assert ((0.95**2 - p.detach()).sign() == p.grad.sign()).float().mean() > 0.99


@pytest.mark.parametrize("name", CLASSES)
def test_half_precision_gradients_are_not_modified(name: str) -> None:
    p = nn.Parameter(torch.ones(12, 400, dtype=torch.bfloat16))
    p.grad = torch.randn(12, 400).bfloat16()
    before = p.grad.clone()
    CLASSES[name]([p]).step()
    assert torch.equal(p.grad, before)


def test_the_learning_rate_of_what_is_dense_follows_that_of_the_matrices() -> None:
    matrix, gain = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5))
    updater = SCALE([matrix, gain], lr=0.01, dense_lr=0.2)
    updater.param_groups[0]["lr"] = 0.005
    gain.grad = torch.ones(5)
    updater.step()
    torch.testing.assert_close(gain.detach(), torch.full((5,), 0.9))


# Options


@pytest.mark.parametrize("name", CLASSES)
def test_the_configuration_has_the_defaults_of_the_class(name: str) -> None:
    config = compose([f"optimizer={name}", "model=llama_60m"]).optimizer
    of_class = CLASSES[name]([nn.Parameter(torch.ones(2, 2))]).defaults
    keys = set(vars(config)) - {"name", "vocabulary"}
    assert {key: getattr(config, key) for key in keys} == {key: of_class[key] for key in keys}
    own = {
        k for k, v in inspect.signature(CLASSES[name]).parameters.items() if k != "params" and v.kind != v.VAR_KEYWORD
    }
    assert own <= keys
    assert config.vocabulary == "matrices"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("scale", {"momentum": 1.0}, "momentum: 1.0 is not allowed; allowed: a number >= 0 and < 1"),
        ("scale", {"rank": 4}, "option: 'rank' is not allowed; allowed: weight_decay, weight_rounding, seed"),
        ("scale", {"moment_dtype": torch.int8}, "moment_dtype: torch.int8 is not allowed; allowed: None"),
        ("adafactor", {"eps": 0.0}, "eps: 0.0 is not allowed; allowed: a number > 0"),
        ("adafactor", {"decay_rate": 0.8}, "decay_rate: 0.8 is not allowed; allowed: a number <= 0"),
        ("adafactor", {"beta1": 1.0}, "beta1: 1.0 is not allowed; allowed: a number >= 0 and < 1"),
        ("came", {"betas": (0.9, 0.99)}, r"betas: \(0.9, 0.99\) is not allowed; allowed: 3 numbers"),
        ("came", {"eps": (1e-30, -1.0)}, "eps: -1.0 is not allowed; allowed: a number >= 0"),
        ("smmf", {"growth": 1.1}, "growth: 1.1 is not allowed; allowed: a number >= 0 and <= 1"),
        ("smmf", {"gamma": 0.5}, "gamma: 0.5 is not allowed; allowed: a number <= 0"),
        ("adamw8bit", {"betas": (0.9, 1.0)}, r"betas: \(0.9, 1.0\) is not allowed; allowed: two numbers"),
        ("adamw8bit", {"dense_eps": 1e-8}, "option: 'dense_eps' is not allowed; allowed: weight_decay"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_what_is_allowed(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CLASSES[name]([nn.Parameter(torch.ones(2, 2))], **options)


def test_a_role_that_scale_does_not_know_is_refused() -> None:
    group = {"params": [nn.Parameter(torch.ones(2, 2))], "vocabulary": "tail"}
    with pytest.raises(ValueError, match="vocabulary: 'tail' is not allowed; allowed: None, embedding, head, tied"):
        SCALE([group])
