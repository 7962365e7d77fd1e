"""Options that are not allowed are refused by both optimizers, with key, value and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trajectories import KINDS, both, make, make_parameters, train

NAMES = {
    "dictionary": ["dct2", "dct3", "hadamard", "random", "identity"],
    "transform": ["gemm", "fft", "auto"],
    "materialize": ["True", "False"],
    "transform_precision": ["fp32", "bf16"],
    "ranking": ["l1", "l2"],
    "side": ["shorter", "longer", "right", "left"],
    "transition": ["move", "reset", "keep"],
    "error_feedback": ["none", "fp32", "bf16", "int8", "int4"],
    "weight_rounding": ["nearest", "stochastic"],
    "scale": ["spectral", "fan_ratio", "match_rms_adamw", "none"],
    "orthogonalization": ["newton_schulz", "polar_express"],
}
BAD_IN_BOTH: list[tuple[str, Any]] = [
    *(("rank", value) for value in (0, -1, 1.5, 0.0, -0.5, "a", None, True, float("nan"))),
    *(("dictionary", value) for value in ("dct4", None, 2)),
    *(("transform", value) for value in ("dct", None, True)),
    *(("materialize", value) for value in (None, "no", 0)),
    *(("transform_precision", value) for value in ("tf32", None, 16)),
    *(("ranking", value) for value in ("l3", 2)),
    *(("side", value) for value in ("short", "RIGHT", 1)),
    *(("lr", value) for value in (-1e-3, float("nan"), float("inf"), "fast")),
    *(("weight_decay", value) for value in (-0.1, float("nan"))),
    *(("weight_rounding", value) for value in ("up", True)),
]
BAD: list[tuple[str, str, Any]] = [
    *((kind, key, value) for kind in KINDS for key, value in BAD_IN_BOTH),
    *(("dct_adamw", "betas", value) for value in ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9,), 0.9)),
    *(("dct_adamw", "eps", value) for value in (-1e-8, float("nan"))),
    *(("dct_adamw", "refresh_interval", value) for value in (0, -1, 1.5, "a")),
    ("dct_adamw", "transition", "rotate"),
    *(("dct_adamw", "error_feedback", value) for value in ("fp16", None, 8)),
    *(("dct_adamw", "error_feedback_momentum", value) for value in (True, "yes")),  # needs error_feedback
    *(("dct_adamw", "moment_dtype", value) for value in (torch.int16, "int8")),
    *(("trion", "momentum", value) for value in (1.0, -0.1)),
    *(("trion", "newton_schulz_steps", value) for value in (0, -1, 1.5)),
    ("trion", "scale", "muon"),
    ("trion", "dense_lr", -1.0),
    ("trion", "dense_betas", (0.9, 1.0)),
    ("trion", "dense_eps", -1.0),
    *(("muon", "nesterov", value) for value in (1, None)),
    ("muon", "momentum", 1.0),
    ("muon", "orthogonalization", "svd"),
    *(("muon", "newton_schulz_steps", value) for value in (0, 1.5)),
    ("muon", "newton_schulz_dtype", torch.float16),
    ("muon", "moment_dtype", torch.int8),
    ("muon", "scale", "muon"),
    ("muon", "side", "both"),
    ("muon", "dense_betas", (0.9, 1.0)),
    *((kind, "rank", value) for kind in ("dion", "dion3") for value in (0, 1.5, None)),
    *((kind, "momentum", value) for kind in ("dion", "dion3") for value in (1.0, "much")),
    ("dion", "moment_dtype", "bf16"),
    *(("dion3", "neuron_beta", value) for value in (1.0, -0.1)),
]


@pytest.mark.parametrize("where", ["argument", "group"])
@pytest.mark.parametrize(("kind", "key", "value"), BAD, ids=str)
def test_a_bad_option_is_refused_with_key_value_and_what_is_allowed(
    kind: str, key: str, value: Any, where: str
) -> None:
    parameters = make_parameters([(8, 6)])
    with pytest.raises(ValueError, match=key) as caught:
        make(kind, parameters, **{key: value}) if where == "argument" else make(
            kind, [{"params": parameters, key: value}]
        )
    message = str(caught.value)
    wrong = [v for v in value if not 0 <= v < 1] if isinstance(value, tuple) else []
    assert any(str(v) in message for v in (value, *wrong))  # of two betas, the wrong one will do
    for name in NAMES.get(key, []):
        assert name in message


@both
def test_hadamard_on_an_odd_size_is_refused_with_the_name_of_the_parameter(kind: str) -> None:
    parameters = make_parameters([(8, 5)])
    with pytest.raises(ValueError, match="power of two") as caught:
        train(make(kind, [("attention.q", parameters[0])], dictionary="hadamard"), parameters, steps=1)
    assert "n=5" in str(caught.value)
    assert "attention.q" in str(caught.value)


@both
@pytest.mark.parametrize(
    ("options", "key", "words"),
    [
        ({"dictionary": "random", "transform": "fft"}, "transform", ["'fft'", "'random'", "gemm"]),
        ({"dictionary": "random", "materialize": False, "transform": "auto"}, "materialize", ["no formula", "dct2"]),
        ({"dictionary": "dct2", "materialize": False}, "materialize", ["transform='gemm'", "fft, auto"]),
        ({"transform_precision": "bf16", "transform": "fft"}, "transform_precision", ["'fft'", "transform='gemm'"]),
        ({"transform_precision": "bf16", "dictionary": "shared"}, "transform_precision", ["'shared'", "fp32"]),
    ],
    ids=str,
)
def test_transforms_that_a_dictionary_does_not_have_are_refused_with_the_reason(
    kind: str, options: dict[str, Any], key: str, words: list[str]
) -> None:
    with pytest.raises(ValueError, match=key) as caught:
        make(kind, make_parameters([(8, 6)]), **options)
    for word in words:
        assert word in str(caught.value)


@both
def test_an_unknown_argument_is_refused(kind: str) -> None:
    with pytest.raises(TypeError, match="rnak"):
        make(kind, make_parameters([(8, 6)]), rnak=3)


@pytest.mark.parametrize("transition", ["reset", "keep"])
def test_returning_dropped_momentum_is_refused_where_columns_do_not_take_theirs_along(transition: str) -> None:
    with pytest.raises(ValueError, match=f"error_feedback_momentum: True .* transition='{transition}'"):
        make(
            "dct_adamw",
            make_parameters([(8, 6)]),
            error_feedback="fp32",
            error_feedback_momentum=True,
            transition=transition,
        )


@both
@pytest.mark.parametrize("shape", [(8, 6), (6,)], ids=str)
def test_stochastic_rounding_of_float16_is_refused_with_the_name_of_the_parameter(
    kind: str, shape: tuple[int, ...]
) -> None:
    parameters = make_parameters([shape], torch.float16)
    with pytest.raises(ValueError, match=r"attention\.q.*bfloat16"):
        train(make(kind, [("attention.q", parameters[0])], weight_rounding="stochastic"), parameters, steps=1)


def test_more_directions_than_rows_are_refused_by_dion_with_the_name_of_the_parameter() -> None:
    parameters = make_parameters([(4, 9)])
    with pytest.raises(ValueError, match=r"attention\.q.*rank: 9 is not allowed with side='right'; allowed: up to 4"):
        train(make("dion", [("attention.q", parameters[0])], rank=1.0, side="right"), parameters, steps=1)
