"""Fixtures that several test files share, and the support matrix (see `support_matrix.py`)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support_matrix import Claim, claims_of, render, with_table

from dist_lowrank.config.schema import TextData

# Two runs of this package, 12 steps in 2 processes, made with the commands in their provenance.json.
STORED_RUNS = Path(__file__).parent / "stored_runs"
README = Path(__file__).parents[1] / "README.md"
FAULTS_PAGE = Path(__file__).parents[1] / "docs" / "faults.md"

# Tensors are small here and processes many: threads of theirs would only wait for each other, ten times as long.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of simple English text."""
    from small_runs import write_text

    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twenty files of prose."""
    from small_data import write_prose

    return write_prose(tmp_path_factory.mktemp("prose"))


@pytest.fixture(scope="module")
def text_config(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TextData:
    """That prose as data, with a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")
    return TextData(source="text", path=str(text_folder), sequence_length=16, vocab_size=300, cache=str(cache))


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stored runs, as working directory."""
    shutil.copytree(STORED_RUNS, tmp_path / "stored")
    monkeypatch.chdir(tmp_path / "stored")
    return tmp_path / "stored"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--support-matrix", action="store_true", help="run the marked tests and write their table into the README"
    )
    parser.addoption(
        "--fault-matrix", action="store_true", help="write the table of the fault matrix's tests into docs/faults.md"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    if config.getoption("--support-matrix"):
        marked = [item for item in items if item.get_closest_marker("supports")]
        config.hook.pytest_deselected(items=[item for item in items if item not in marked])
        items[:] = marked


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--support-matrix"):
        config.pluginmanager.register(SupportMatrix())
    if config.getoption("--fault-matrix"):
        config.pluginmanager.register(FaultMatrix())


class SupportMatrix:
    """Collects what the marked tests show as they run, and writes it down at the end."""

    def __init__(self) -> None:
        self.claims: dict[str, Sequence[Claim]] = {}
        self.passed: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.claims = {item.nodeid: claims_of(item) for item in session.items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.config.getoption("collectonly"):
            return
        shown = [claim for claims in self.claims.values() for claim in claims]
        failed = [claim for test, claims in self.claims.items() if test not in self.passed for claim in claims]
        README.write_text(with_table(README.read_text(), render(shown, failed)))


class FaultMatrix:
    """Collects which cells did not pass, or did not run, and writes the table at the end."""

    def __init__(self) -> None:
        self.passed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        import fault_matrix

        shown = {cell for cell in fault_matrix.CELLS for test in self.passed if test.endswith(f"[{'-'.join(cell)}]")}
        table = fault_matrix.render(set(fault_matrix.CELLS) - shown)
        FAULTS_PAGE.write_text(fault_matrix.with_table(FAULTS_PAGE.read_text(), table))
