"""Prints the dependencies that pyproject.toml declares, with those of the extras named: a layer without the code."""

from __future__ import annotations

import sys
from pathlib import Path

import tomllib

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
print("\n".join([*project["dependencies"], *(each for extra in sys.argv[1:] for each in extras[extra])]))
