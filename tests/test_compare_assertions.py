"""`dist-lowrank compare --assert`: what an assertion means, and what is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dist_lowrank.cli import main
from dist_lowrank.compare.assertions import evaluate, parse
from dist_lowrank.config import ConfigError


def test_an_assertion_that_does_not_hold_ends_with_code_3_and_says_why(
    stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "adamw", "dct_adamw", "--no-traffic", "--assert"]
    assert main([*command, "state_bytes.max <= 0.8 * baseline"]) == 0
    assert capsys.readouterr().err == ""
    assert main([*command, "state_bytes.max <= 0.35 * baseline", "--assert", "loss.validation < 6"]) == 3
    assert capsys.readouterr().err == (
        "error: does not hold for llama_tiny-dct_adamw: state_bytes.max <= 0.35 * baseline "
        "(state_bytes.max = 34,830, baseline.state_bytes.max = 43,716)\n"
    )


VALUES = {"state_bytes.max": 40.0, "state_bytes.min": 30.0, "loss.validation": 5.0, "captured_energy": None}
BASELINE = {"state_bytes.max": 100.0, "state_bytes.min": 90.0, "loss.validation": 4.5, "captured_energy": None}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("state_bytes.max <= 0.4 * baseline", True),
        ("state_bytes.max < 0.4 * baseline", False),
        ("state_bytes.max == baseline - 60 and state_bytes.min != baseline", True),
        ("abs(loss.validation - baseline.loss.validation) <= 0.5", True),
        ("abs(-loss.validation / 2) > 2.5 or not loss.validation > 5", True),
        ("20 < state_bytes.min < state_bytes.max < 40", False),
        ("state_bytes.max / baseline.state_bytes.min >= (1 + 1) * 0.2", True),
    ],
)
def test_assertions_mean_what_they_say(text: str, holds: bool) -> None:
    assert evaluate(parse(text), "run", VALUES, BASELINE).holds is holds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('true') < 1", "__import__('os').system('true') is not allowed; allowed: numbers, "),
        ("(1).__class__ == 1", "1 .__class__ is not allowed; allowed: numbers, "),
        ("[x for x in (1,)] == 1", "is not allowed"),
        ("(lambda: 1)() == 1", "is not allowed"),
        ("2 ** 999999999 > 1", "2 ** 999999999 is not allowed"),
        ("loss.validation < '5'", "'5' is not allowed"),
        ("loss.validation < True", "True is not allowed"),
        ("loss.validation in (1, 2)", "is no comparison"),
        ("state_bytes.max", "state_bytes.max is no comparison; allowed: numbers, "),
        ("state_bytes.max =< 3", "is no expression"),
        ("(" * 500, "is no expression"),
        ("baseline < 3", "baseline has no meaning where a comparison names several quantities or none; allowed: "),
        ("state_bytes.max - state_bytes.min < baseline", "several quantities or none; allowed: baseline.QUANTITY"),
        (
            "state_byte.max < 1",
            "state_byte.max; did you mean state_bytes.max or state_bytes.min? allowed: one of the 4",
        ),
        ("state_bytes < 1", "no quantity is called state_bytes; did you mean state_bytes.max or state_bytes.min? "),
        ("baseline.los < 1", "no quantity is called los; "),
        ("captured_energy > 0.3", "run has no captured_energy (`-` in the tables); allowed: one of the 3 quantities "),
        ("loss.validation < 1 / 0", "divides by 0, which is 0"),
    ],
)
def test_what_is_no_assertion_is_refused_and_never_executed(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        evaluate(parse(text), "run", VALUES, BASELINE)
    assert str(caught.value).startswith(f"--assert {text}: ")
