"""docs/properties.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "properties.md"


def test_every_property_names_tests_that_exist() -> None:
    rows = re.findall(r"^\| (\d+) \|.*\| (.+) \|$", PAGE.read_text(), flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 31))
    for number, cell in rows[:-1]:
        for part in cell.split(";"):
            files, _, names = part.partition(":")
            for file in files.split(","):
                source = (TESTS / f"test_{file.strip()}.py").read_text()
                assert names.strip() == "all" or "`" in names or "all (" in names, (number, part)
                for name in re.findall(r"`(\w+)`", names):
                    assert f"def test_{name}(" in source, (number, file, name)
