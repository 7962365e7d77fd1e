"""What the files that make the images promise, as far as it can be read without building one."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

PROJECT = Path(__file__).parents[1]
DOCKERFILE = (PROJECT / "Dockerfile").read_text().replace("\\\n", " ")
INSTRUCTIONS = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if re.match(r"[A-Z]+ ", line)]


def _all(instruction: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def _stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, by its name."""
    stages: dict[str, list[tuple[str, str]]] = {}
    for name, rest in INSTRUCTIONS:
        if name == "FROM":
            stages[rest.split(" AS ")[1]] = current = []
        elif stages:
            current.append((name, rest))
    return stages


def _ignored(path: str) -> bool:
    """By .dockerignore, where the last line that matches decides."""
    ignored = False
    for line in (PROJECT / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!")
        if line and not line.startswith("#") and (pattern == "*" or path == pattern or path.startswith(f"{pattern}/")):
            ignored = not line.startswith("!")
    return ignored


def test_every_source_of_a_copy_exists_and_reaches_the_build() -> None:
    sources = [word for rest in _all("COPY") if "--from" not in rest for word in rest.split()[:-1] if word[0] != "-"]
    assert len(sources) > 5
    for source in sources:
        assert (PROJECT / source).exists(), source
        assert not _ignored(source), source


def test_nothing_else_reaches_the_build() -> None:
    for path in (".git", ".venv", "runs", "build", "dist", "tests", ".env", "runs/x/checkpoints", ".ssh/id_rsa"):
        assert _ignored(path), path


def test_every_stage_stands_on_the_pinned_base_or_on_another_stage() -> None:
    stages = _stages()
    assert stages.keys() >= {"cpu", "cuda"}
    for rest in _all("FROM"):
        assert rest.split()[0] in ("${BASE_IMAGE}", *stages), rest
    for source in re.findall(r"(?:--from=|,from=)([a-z-]+)", DOCKERFILE):
        assert source in stages, source
    (base,) = (rest for rest in _all("ARG") if rest.startswith("BASE_IMAGE="))
    assert re.search(r"@sha256:[0-9a-f]{64}$", base)


def test_the_images_end_as_a_user_that_is_not_root() -> None:
    for target in ("cpu", "cuda"):
        users = [rest for name, rest in _stages()[target] if name == "USER"]
        assert users == ["1000:1000"], target


def test_secrets_are_mounted_and_never_arguments_or_variables() -> None:
    for rest in [*_all("ARG"), *_all("ENV"), *_all("LABEL")]:
        assert not re.search(r"token|secret|passw|credential|_key|api", rest, re.IGNORECASE), rest
    mounts = {"type=secret,id=pip_conf,target=/etc/pip.conf", "type=secret,id=ca_bundle"}
    for rest in _all("RUN"):
        if re.search(r"\bpip\b.* (install|wheel) ", rest) and "--no-index" not in rest:
            assert all(f"--mount={mount} " in rest for mount in mounts), rest


def test_no_stage_that_is_run_has_a_compiler_installed() -> None:
    for stage in ("runtime", "cpu", "cuda"):
        installed = " ".join(rest for name, rest in _stages()[stage] if name == "RUN" and "apt-get" in rest)
        assert not re.search(r"\b(gcc|g\+\+|clang|build-essential|\S+-dev|openssh\S*)\b", installed), stage


def test_the_nodes_of_the_compose_file_are_confined() -> None:
    composed = yaml.safe_load((PROJECT / "docker" / "compose.yaml").read_text())
    assert len(composed["services"]) == 2
    for name, service in composed["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert not {"privileged", "network_mode", "ports", "cap_add"} & service.keys(), name
    assert all(network["internal"] for network in composed["networks"].values())
