"""The one error that a user's configuration can cause."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot run. Each line of its text names a key, the value given and what is allowed."""


def show(value: Any) -> str:
    """A value as a user would write it in an override: text plain, unless it would read as something else."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value or '""'
    return json.dumps(value, default=str)


def suggestion(given: Any, known: Iterable[str]) -> str:
    """`did you mean ...? ` for a likely misspelling of one of the known names, else nothing."""
    known = list(known)
    if given == "gpu" and "cuda" in known:  # not `cpu`, which is nearer in letters only
        return "did you mean cuda? "
    matches = difflib.get_close_matches(str(given), known, n=1)
    return f"did you mean {matches[0]}? " if matches else ""
