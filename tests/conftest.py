"""Fixtures that several test files share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of simple English text."""
    from small_runs import write_text

    return write_text(tmp_path_factory.mktemp("text"))
