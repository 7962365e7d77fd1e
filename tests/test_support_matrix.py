"""The support matrix in the README is what the tests say."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import README
from support_matrix import OPTIMIZERS, Claim, claims_of, render, supports, table_in, with_table

TESTS = Path(__file__).parent


class Collected:
    """Takes part in a collection to keep what it found."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def test_the_readme_shows_what_the_marked_tests_say() -> None:
    """`make support-matrix` also runs them."""
    files = [path for path in TESTS.glob("test_*.py") if "@supports(" in path.read_text() and path != Path(__file__)]
    collected = Collected()
    arguments = ["--collect-only", "-qq", "--no-header", "-p", "no:faulthandler", "-p", "no:cacheprovider"]
    assert pytest.main([*arguments, *map(str, files)], plugins=[collected]) == 0
    claims = [claim for item in collected.items for claim in claims_of(item)]
    assert claims
    assert table_in(README.read_text()) == render(claims), "run `make support-matrix`"


def test_a_cell_is_exact_only_if_all_of_its_tests_passed() -> None:
    exact = [Claim("Trion", "DDP", "exact"), Claim("Trion", "HSDP", "exact")]
    assert row("Trion", render(exact))[2:4] == ["exact", "-"]
    assert row("Trion", render(exact, failed=exact[:1]))[2:5] == ["failing", "-", "exact"]


def test_a_refusal_is_noted_with_its_reason_and_a_variant_has_no_cell() -> None:
    refused = [Claim(name, "FSDP1", "refused", reason="use FSDP2") for name in OPTIMIZERS]
    other = Claim("Trion", "DDP", "differs", variant="x=1", reason="of x")
    table = render([*refused, other])
    assert "- FSDP1: refused, because use FSDP2." in table
    assert "- Trion under DDP with x=1: differs, because of x." in table
    assert row("Trion", table)[2] == "-"


def test_tests_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="Trion under DDP"):
        render([Claim("Trion", "DDP", "exact"), Claim("Trion", "DDP", "differs", reason="of x")])
    with pytest.raises(ValueError, match="a reason is missing"):
        supports("refused", strategy="DDP")
    with pytest.raises(ValueError, match="FSDP3"):
        supports("exact", strategy="FSDP3")


def test_only_the_table_of_the_readme_is_replaced() -> None:
    before = README.read_text()
    after = with_table(before, "| new |")
    assert table_in(after) == "| new |"
    assert with_table(after, table_in(before)) == before


def row(optimizer: str, table: str) -> list[str]:
    """Its cells, by position in STRATEGIES; the first is the name."""
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {optimizer} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]
