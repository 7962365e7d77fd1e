"""Plain data to typed configuration and back, with errors that a user can act on.

`run.json` is read through the same door as the composed YAML: JSON, strictly typed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dist_lowrank.config.errors import ConfigError, show, suggestion
from dist_lowrank.config.schema import RunConfig

# What changes where, how fast and how visibly a run computes, but not what it computes.
_NOT_SCIENCE = (
    "launcher",
    "telemetry",
    "checkpoint",
    "strategy",
    "runs",
    "name",
    "train.micro_batch_size",
    "train.export",
    "train.sample_tokens",
    "train.max_skipped_steps",
    "train.time_limit_minutes",
    "train.time_limit_lead_minutes",
    "model.activation_checkpointing",
    "model.compile",
    "optimizer.transform",
    "optimizer.materialize",
    "optimizer.kernels",
    "data.cache",
    "data.workers",
)


def from_dict(data: dict[str, Any]) -> RunConfig:
    """Plain data, such as the content of `run.json`, as a checked configuration.

    Raises:
        ConfigError: with one line per problem, each naming the key, the value and what is allowed.
    """
    launcher = data.get("launcher")
    if isinstance(launcher, dict) and "name" not in launcher:  # stored before there was another one
        data = {**data, "launcher": {"name": "local", **launcher}}
    try:
        return _adapter().validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        schema = _adapter().json_schema()
        lines = dict.fromkeys(_explain(problem, data, schema) for problem in error.errors())
        raise ConfigError("\n".join(lines)) from error


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as data that JSON can hold; `from_dict` reads it back."""
    data: dict[str, Any] = _adapter().dump_python(config, mode="json")
    return data


def by_dotted_key(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested sections, such as `("train.steps", 350)`."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from by_dotted_key(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def digest(config: RunConfig) -> str:
    """12 hexadecimal digits that name what the run computes, whatever it runs on."""
    data = to_dict(config)
    if config.resume.starts_elsewhere:  # another run then, with a folder of its own
        del data["resume"]["fallback"]
    else:
        del data["resume"]
    for path in _NOT_SCIENCE:
        *sections, key = path.split(".")
        node = data
        for section in sections:
            node = node[section]
        node.pop(key, None)
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


@cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


# --- what went wrong, in the user's words ---------------------------------------------------------------------------


def _explain(problem: Any, data: dict[str, Any], schema: dict[str, Any]) -> str:
    kind = problem["type"]
    path = _path_in(data, problem["loc"]) + ([problem["loc"][-1]] if kind == "missing" else [])
    key = ".".join(path)
    if kind == "value_error":
        return f"{key}.{problem['ctx']['error']}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        path.append(problem["ctx"]["discriminator"].strip("'"))
        key = ".".join(path)
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return _unknown_key(path, data, schema)
    allowed = _node_at(path, data, schema)
    value = _value_at(path, data)
    if value is _ABSENT:
        return f"{key}: is missing; allowed: a value, {_describe(allowed, schema)}"
    hint = suggestion(value, allowed.get("enum", ()))
    return f"{key}: {show(value)} is not allowed; {hint}allowed: {_describe(allowed, schema)}"


def _unknown_key(path: list[str], data: dict[str, Any], schema: dict[str, Any]) -> str:
    siblings = sorted(_properties(_node_at(path[:-1], data, schema), schema))
    value = _value_at(path, data)
    given = list(path)
    while isinstance(value, dict) and len(value) == 1:  # `optimiser.rank=4` arrives as optimiser: {rank: 4}
        ((key, value),) = value.items()
        given.append(key)
    hint = _elsewhere(path[-1], data, schema) or suggestion(path[-1], siblings) or _elsewhere(given[-1], data, schema)
    where = f" of {'.'.join(path[:-1])}" if path[:-1] else ""
    return f"{'.'.join(given)}: {show(value)} is not allowed, no such key; {hint}allowed{where}: {', '.join(siblings)}"


def _elsewhere(name: str, data: dict[str, Any], schema: dict[str, Any]) -> str:
    found = [known for known in _keys(data, schema, schema) if known.rpartition(".")[2] == name]
    return f"did you mean {' or '.join(found)}? " if found else ""


_ABSENT = object()


def _path_in(data: Any, location: Sequence[int | str]) -> list[str]:
    """The user's key of an error: its location without the names of union branches and the positions in lists."""
    path: list[str] = []
    node = data
    for part in location:
        if isinstance(node, dict) and part in node:
            path.append(str(part))
            node = node[part]
    return path


def _value_at(path: Sequence[str], data: Any) -> Any:
    for part in path:
        if not isinstance(data, dict) or part not in data:
            return _ABSENT
        data = data[part]
    return data


def _node_at(path: Sequence[str], data: Any, schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of the key at `path`, with each union of sections decided by its discriminator in `data`."""
    node = schema
    for part in path:
        node = _resolve(_properties(node, schema)[part], schema)
        data = data.get(part) if isinstance(data, dict) else None
        if "discriminator" in node:
            tag = node["discriminator"]["propertyName"]
            options = node["discriminator"]["mapping"]
            chosen = data.get(tag) if isinstance(data, dict) else None
            node = (
                _resolve({"$ref": options[chosen]}, schema)
                if chosen in options
                else {"type": "object", "properties": {tag: {"enum": sorted(options)}}}
            )
    return node


def _resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    reference: str | None = node.get("$ref")
    return schema["$defs"][reference.rpartition("/")[2]] if reference else node


def _properties(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = _resolve(node, schema).get("properties", {})
    return properties


def _keys(data: Any, node: dict[str, Any], schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """All dotted keys of the schema, as far as the unions in `data` are decided."""
    for name in _properties(node, schema):
        yield prefix + name
        path = (prefix + name).split(".")
        yield from _keys(data, _node_at(path, data, schema), schema, f"{prefix}{name}.")


def _describe(node: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a JSON schema allows, in words: `an integer >= 1 (number of columns) or a float in (0, 1]`."""
    node = _resolve(node, schema)
    kind = node.get("type")
    if "anyOf" in node:
        return " or ".join(_describe(option, schema) for option in node["anyOf"])
    if "enum" in node:
        return ", ".join(show(option) for option in node["enum"])
    if "const" in node:
        return str(node["const"])
    if kind in ("integer", "number"):
        text = ("an integer" if kind == "integer" else "a float") + _range(node)
        return text + (f" ({node['description']})" if "description" in node else "")
    if kind == "array" and "prefixItems" in node:
        items = [_describe(item, schema) for item in node["prefixItems"]]
        return f"a list of {len(items)}: [{', '.join(items)}]"
    if kind == "array":
        some = "a list that is not empty," if node.get("minItems") else "a list"
        return f"{some} of {_describe(node['items'], schema)}"
    if kind == "object":
        keys = ", ".join(node.get("properties", {}))
        return f"a section with the keys {keys}" if keys else "a dictionary"
    if kind == "string":
        return "text" + (f" {node['description']}" if "description" in node else "")
    return {"boolean": "true or false", "null": "null"}.get(str(kind), str(kind))


def _range(node: dict[str, Any]) -> str:
    low, above = node.get("minimum"), node.get("exclusiveMinimum")
    high, below = node.get("maximum"), node.get("exclusiveMaximum")
    lower = f"[{low:g}" if low is not None else f"({above:g}" if above is not None else None
    upper = f"{high:g}]" if high is not None else f"{below:g})" if below is not None else None
    if lower and upper:
        return f" in {lower}, {upper}"
    if lower:
        return f" >= {low:g}" if low is not None else f" > {above:g}"
    return f" <= {high:g}" if high is not None else f" < {below:g}" if below is not None else ""
