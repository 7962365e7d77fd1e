"""From the overrides of a command line to a checked configuration, once, in the parent process.

Hydra's compose API merges the YAML of `conf/` and the overrides; `validate` gives the result its types. Which keys
exist is the schema's business alone, so Hydra is told to add what it does not know, and the schema refuses it by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_lowrank.config.credentials import is_credential
from dist_lowrank.config.cross_checks import check_combinations
from dist_lowrank.config.errors import ConfigError, show, suggestion
from dist_lowrank.config.schema import RunConfig
from dist_lowrank.config.validate import from_dict


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """Composes `conf/config.yaml` with Hydra overrides and checks the result.

    Args:
        overrides: such as `optimizer=trion`, `train.steps=500`, `+model.config.rope_theta=1e4`.

    Returns:
        The complete configuration; keys that neither YAML nor overrides set have the schema's defaults.

    Raises:
        ConfigError: with one line per problem, each naming the key, the value and what is allowed.
    """
    directory = config_directory()
    with initialize_config_dir(str(directory), job_name="dist-lowrank", version_base="1.3"):
        try:
            composed = hydra_compose("config", _accepted_by_hydra(overrides, directory))
            _refuse_resolvers(OmegaConf.to_container(composed, resolve=False))
            data = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise ConfigError(
                f"{error.full_key}: {_first_line(error)}; allowed: ${{KEY}} of this configuration"
            ) from error
        except HydraException as error:
            if (match := re.match(r"Could not override '(\w+)/(\w+)'", str(error))) is not None:
                raise ConfigError(_no_such_part(directory, *match.groups())) from error
            keys = " ".join(text.partition("=")[0] for text in overrides)
            raise ConfigError(f"{keys}: {_first_line(error)}") from error
    assert isinstance(data, dict)
    _refuse_credentials(data)
    _refuse_targets(data, "")
    # Sections that begin so are for YAML's own use: tables that its interpolations look up.
    config = from_dict({str(key): value for key, value in data.items() if not str(key).startswith("_")})
    check_combinations(config)
    return config


def config_directory() -> Path:
    """The folder of YAML files: inside an installed wheel, else at the root of the repository."""
    package = Path(__file__).parents[1]
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ConfigError(
        f"conf: no config.yaml in {package / 'conf'} or {package.parent / 'conf'}; reinstall dist-lowrank"
    )


def group_options(directory: Path) -> dict[str, list[str]]:
    """The configuration groups and the names that each can be set to."""
    return {
        group.relative_to(directory).as_posix(): sorted(option.stem for option in group.glob("*.yaml"))
        for group in directory.rglob("*")
        if group.is_dir()
    }


def _accepted_by_hydra(overrides: Sequence[str], directory: Path) -> list[str]:
    groups = group_options(directory)
    # `resume=VALUE` for short, beside the keys of the same section.
    parsed = [_parse(re.sub(r"^(\+*)resume=", r"\1resume.source=", text)) for text in overrides]
    accepted = [_checked_group(each, groups) if each.key_or_group in groups else _as_addition(each) for each in parsed]
    keys = {each.key_or_group for each in parsed}
    if "model.pretrained" in keys and "model" not in keys:
        accepted.append("model=pretrained")  # a checkpoint brings its own architecture
    return accepted


def refuse_credential(text: str) -> None:
    """Refuses an override that likely holds a credential, whether it can be parsed or not.

    Raises:
        ConfigError: naming the key and not the value.
    """
    name, _, value = text.partition("=")
    key = name.lstrip("+~").partition("@")[0]
    if is_credential("", name):
        raise _credential("an override")
    if is_credential(key.split(".")[-1], value.strip("'\"")):
        raise _credential(key)


def _parse(text: str) -> Override:
    refuse_credential(text)  # first of all, so that no message repeats it
    name = text.partition("=")[0]
    try:
        override = OverridesParser.create().parse_override(text)
    except (OverrideParseException, HydraException):
        raise ConfigError(
            f"{name}: is not an override that can be read; allowed: key=value, +key=value, ~key or group=option "
            "(quote a value with spaces or special characters: 'key=\"a value\"')"
        ) from None  # the parser's message would repeat the value
    key = override.key_or_group
    if re.split(r"[./]", key)[0] == "hydra":
        raise ConfigError(f"{key}: Hydra's own settings are not allowed; allowed: `runs` and `name` for the run folder")
    if override.package is not None:
        raise ConfigError(f"{name}: packages are not allowed; allowed: {key}=option")
    if override.is_sweep_override():
        raise ConfigError(f"{key}: the sweep {text.partition('=')[2]} is not allowed; allowed: one value per run")
    return override


def _checked_group(override: Override, groups: dict[str, list[str]]) -> str:
    group, option = override.key_or_group, override.value()
    optional = group == "experiment"
    if option in groups[group] or (optional and option is None):
        return f"{group}={option}" if option else f"~{group}"
    raise ConfigError(
        f"{group}: {show(option)} is not allowed; {suggestion(option, groups[group])}"
        f"allowed: {', '.join(groups[group])}{', null' if optional else ''} (or set a key inside: {group}.key=value)"
    )


def _no_such_part(directory: Path, group: str, part: str) -> str:
    made_of = [path.stem for path in sorted((directory / group).glob("*.yaml")) if f"  - {part}: " in path.read_text()]
    return f"{group}/{part}: is not allowed, this {group} has no such part; allowed: with {group}={', '.join(made_of)}"


def _as_addition(override: Override) -> str:
    plain = override.type in (OverrideType.CHANGE, OverrideType.ADD)
    text = str(override.input_line)
    return "++" + text.lstrip("+") if plain else text


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The values of nested sections as text, by dotted key; those of a list one by one, and as one text."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, path)
        yield path, " ".join(map(str, node))
    elif node is not None and not isinstance(node, bool):
        yield path, str(node)


def _refuse_resolvers(data: Any) -> None:
    """Only keys of the configuration may be interpolated: what functions such as `oc.env` read may be a secret."""
    for key, text in _leaves(data):
        rest, found = text, 1
        while found:  # from the inside out, as `${_by_model.${model.name}.rank}`
            rest, found = re.subn(r"\$\{[^${}:]*\}", "KEY", rest)
        if "${" in rest:
            raise ConfigError(
                f"{key}: {text} is not allowed; allowed: ${{KEY}} of this configuration (what comes from the "
                "environment would be written into files; launcher.secret_environment passes variables on by name)"
            )


def _refuse_credentials(data: Any) -> None:
    for key, text in _leaves(data):
        if is_credential(key.rpartition(".")[2], text):
            raise _credential(key)


def _credential(key: str) -> ConfigError:
    return ConfigError(
        f"{key}: credentials are not allowed, they would be saved with the run; allowed: the environment variable of "
        "the service, such as HF_TOKEN (launcher.secret_environment passes it on by name)"
    )


def _refuse_targets(node: Any, path: str) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_":
                raise ConfigError(
                    f"{path}_target_: {show(value)} is not allowed; allowed: the keys of the schema "
                    "(a name selects a class; no configuration runs code)"
                )
            _refuse_targets(value, f"{path}{key}.")
    elif isinstance(node, list):
        for value in node:
            _refuse_targets(value, path)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
