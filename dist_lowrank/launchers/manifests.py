"""YAML and JSON as people write them."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml


def as_json(data: Any) -> str:
    """Indented, with a line at the end."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def dump(*documents: dict[str, Any]) -> str:
    """YAML as people write it: in the order of the keys, without anchors."""
    return str(yaml.dump_all(documents, Dumper=_PlainDumper, sort_keys=False, width=110))


class _PlainDumper(yaml.SafeDumper):  # type: ignore[misc]
    """Repeats what appears twice; indents lists; texts of several lines as such."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


# Texts that PyYAML would leave plain, but readers of YAML 1.2 (`1e3`, `0o17`) or of old YAML (`y`) take for others.
_AMBIGUOUS = re.compile(r"[-+]?(0[ox][0-9a-fA-F]+|[0-9.][0-9_.:]*([eE][-+]?[0-9]+)?)|[yYnN]")


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else "'" if _AMBIGUOUS.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_PlainDumper.add_representer(str, _text)
