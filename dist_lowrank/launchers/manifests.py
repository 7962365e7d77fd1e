"""YAML and JSON as people write them."""

from __future__ import annotations

import json
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


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_PlainDumper.add_representer(str, _text)
