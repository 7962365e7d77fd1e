"""What the launchers write: compared with golden files, linted, and validated against published schemas."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubeflow_trainer_api.models as kubeflow
import kubernetes_validate
import pytest
import yaml
from launch_jobs import CASES, golden_job, rendered
from ruamel.yaml import YAML

from dist_lowrank.config import ConfigError, compose, from_dict
from dist_lowrank.config.compose import config_directory, group_options
from dist_lowrank.launchers.rendering import RENDERERS

GOLDEN = Path(__file__).parent / "golden_launch"
BIN = Path(sys.executable).parent


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_launcher_has_golden_files() -> None:
    launchers = {next(each.partition("=")[2] for each in overrides) for overrides in CASES.values()}
    assert launchers == set(RENDERERS)
    assert set(group_options(config_directory())["launcher"]) == {*RENDERERS, "local"}


def test_rendered_files_are_the_golden_ones(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a wanted change: `UPDATE_GOLDEN=1 pytest tests/test_launch_files.py`, and read the difference."""
    folder = GOLDEN / case
    texts = {
        name: _without_configuration(text) for name, text in rendered(golden_job(case, tmp_path, monkeypatch)).items()
    }
    if os.environ.get("UPDATE_GOLDEN"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
    assert {path.name: path.read_text() for path in folder.iterdir()} == texts


def _without_configuration(text: str) -> str:
    """Without the run.json in a ConfigMap, which changes with every new setting."""
    start, begin, rest = text.partition("  run.json: |\n")
    _, end, after = rest.partition("---\n")
    return start + begin + end + after


def test_scripts_pass_bash_and_shellcheck() -> None:
    scripts = [path for path in GOLDEN.rglob("*") if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) >= 10
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    found = subprocess.run([BIN / "shellcheck", "--shell=bash", *scripts], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_compose_files_are_valid() -> None:
    files = sorted(GOLDEN.rglob("compose.yaml"))
    assert len(files) == 2
    check = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", *files]
    found = subprocess.run(check, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    lint = [BIN / "yamllint", "-d", "{extends: default, rules: {line-length: disable, document-start: disable}}"]
    found = subprocess.run([*lint, *files], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.fixture(params=["kubernetes_trainjob", "kubernetes_job"])
def manifests(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    job = golden_job(request.param, tmp_path, monkeypatch)
    return list(yaml.safe_load_all(rendered(job)["manifest.yaml"]))


def test_manifests_are_valid_for_kubernetes_and_kubeflow(manifests: list[dict[str, Any]]) -> None:
    for manifest in manifests:
        _validate(manifest)


def test_the_validation_sees_misspelt_keys_and_wrong_types(manifests: list[dict[str, Any]]) -> None:
    last = manifests[-1]["spec"]
    for wrong in ({**last, "misspelt": 1}, {**last, "suspend": "no"}):
        with pytest.raises(Exception, match=r"misspelt|suspend"):
            _validate({**manifests[-1], "spec": wrong})


def _validate(manifest: dict[str, Any]) -> None:
    if "trainer.kubeflow.org" not in manifest["apiVersion"]:
        kubernetes_validate.validate(manifest, "1.37", strict=True)
        return
    model = getattr(kubeflow, f"TrainerV1alpha1{manifest['kind']}")
    kept = model.from_dict(manifest).to_dict()  # without what it does not know
    assert list(_leaves(kept)) == list(_leaves(manifest)), "a key that the published models do not have"
    if manifest["kind"] == "TrainingRuntime":  # the models let wrong enumerations of pods pass, so also by Kubernetes
        (node,) = manifest["spec"]["template"]["spec"]["replicatedJobs"]
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, "spec": node["template"]["spec"]}
        kubernetes_validate.validate(job, "1.37", strict=True)


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    pairs = sorted(node.items()) if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if not pairs:
        yield path, str(node)
        return
    for key, value in pairs:
        yield from _leaves(value, f"{path}.{key}")


def test_the_configuration_travels_with_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = golden_job("kubernetes_job", tmp_path, monkeypatch)
    first = next(yaml.safe_load_all(rendered(job)["manifest.yaml"]))
    assert from_dict(json.loads(first["data"]["run.json"])["config"]) == job.config


@pytest.mark.parametrize("case", ["compose", "kubernetes_job"])
def test_values_of_variables_reach_containers_as_they_are(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [
        "$HOME",
        "a$$b",
        "$(HOME)",
        "1e-3",
        "1e3",
        "0o17",
        "0x1F",
        "1_000",
        "yes",
        "y",
        "null",
        "~",
        "12:30",
        ".5",
    ]
    job = golden_job(case, tmp_path, monkeypatch)
    variables = {f"V{number}": value for number, value in enumerate(values)}
    job = dataclasses.replace(job, launcher=dataclasses.replace(job.launcher, environment=variables))
    (file,) = (text for name, text in rendered(job).items() if name.endswith(".yaml"))
    for version in ((1, 1), (1, 2)):
        reader = YAML(typ="safe", pure=True)
        reader.version = version
        *_, last = reader.load_all(file)
        if case == "compose":
            found = last["services"]["node0"]["environment"]
        else:
            found = {each["name"]: each["value"] for each in _node(last)["env"]}
        assert [found[name].replace("$$", "$") for name in variables] == values
        assert [found[name].count("$") for name in variables] == [2 * value.count("$") for value in values]


def _node(indexed_job: dict[str, Any]) -> dict[str, Any]:
    (container,) = indexed_job["spec"]["template"]["spec"]["containers"]
    return dict(container)


def test_paths_with_dollars_are_what_compose_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = dataclasses.replace(golden_job("compose", tmp_path, monkeypatch), work_directory="/data/$me/a b")
    (volume,) = yaml.safe_load(rendered(job)["compose.yaml"])["services"]["node0"]["volumes"]
    assert volume == "/data/$$me/a b/runs:/runs"


def test_the_directives_of_slurm_hold_percent_signs_and_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = dataclasses.replace(golden_job("slurm", tmp_path, monkeypatch), work_directory="/data/50%j of #1")
    lines = rendered(job)["job.sbatch"].splitlines()
    assert '#SBATCH --chdir="/data/50%j of #1"' in lines
    assert f'#SBATCH --output="/data/50%%j of #1/{job.run}/slurm-%j.txt"' in lines


def test_containers_are_confined(manifests: list[dict[str, Any]]) -> None:
    text = json.dumps(manifests)
    assert '"privileged"' not in text
    assert text.count('"allowPrivilegeEscalation": false') == text.count('"readOnlyRootFilesystem": true') == 2
    (policy,) = (each for each in manifests if each["kind"] == "NetworkPolicy")
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": policy["spec"]["podSelector"]}]}]
    engines = [path.read_text() for path in GOLDEN.rglob("*") if path.name in ("compose.yaml", "run.sh")]
    for engine in engines:
        assert "privileged" not in engine.replace("no-new-privileges", "")
        assert "no-new-privileges" in engine
        assert "read-only" in engine or "read_only: true" in engine
        assert ("/dev/infiniband" in engine) == ("IPC_LOCK" in engine)


REFUSED = {
    "no such launcher": (["launcher=slrm"], "launcher: slrm is not allowed; did you mean slurm? allowed: compose, "),
    "no such key": (
        ["launcher=slurm", "launcher.nods=2"],
        "launcher.nods: 2 is not allowed, no such key; did you mean",
    ),
    "of another launcher": (["launcher.hosts=[a]"], 'launcher.hosts: ["a"] is not allowed, no such key; '),
    "no nodes": (["launcher=slurm", "launcher.nodes=0"], "launcher.nodes: 0 is not allowed; allowed: an integer > 0"),
    "no hosts": (
        ["launcher=torchrun", "launcher.hosts=[]"],
        "launcher.hosts: [] is not allowed; allowed: a list that is not empty, of text that is a host name or address",
    ),
    "a host twice": (
        ["launcher=torchrun", "launcher.hosts=[a,b,a]"],
        'launcher.hosts: ["a", "b", "a"] is not allowed, a more than once; allowed: every host once',
    ),
    "a host of DeepSpeed twice": (["launcher=deepspeed", "launcher.hosts=[a,a]"], 'launcher.hosts: ["a", "a"] is not '),
    "a shell in a host": (["launcher=torchrun", "launcher.hosts=['a;b']"], 'launcher.hosts: ["a;b"] is not allowed; '),
    "too few hosts": (
        ["launcher=torchrun", "launcher.hosts=[a,b]", "launcher.min_nodes=3", "launcher.rendezvous=c10d"],
        "launcher.min_nodes: 3 is not allowed with launcher.rendezvous=c10d and 2 hosts; allowed: null, or 1 to 2",
    ),
    "fewer hosts without c10d": (
        ["launcher=torchrun", "launcher.hosts=[a,b]", "launcher.min_nodes=1"],
        "launcher.min_nodes: 1 is not allowed with launcher.rendezvous=static",
    ),
    "an image for plain Slurm": (
        ["launcher=slurm", "launcher.image=x.sqsh"],
        "launcher.image: x.sqsh is not allowed with launcher=slurm; allowed: null, or launcher=slurm_pyxis",
    ),
    "no image for pyxis": (["launcher=slurm_pyxis", "launcher.image=null"], "launcher.image: null is not allowed with"),
    "an unknown device": (
        ["launcher=docker", "launcher.device=auto"],
        "launcher.device: auto is not allowed; allowed: ",
    ),
    "a device by another name": (
        ["launcher=torchrun", "launcher.device=gpu"],
        "launcher.device: gpu is not allowed; did you mean cuda? allowed: cpu, cuda",
    ),
    "a name of Kubernetes": (
        ["launcher=kubernetes", "launcher.claim=My_Claim"],
        "launcher.claim: My_Claim is not allowed; allowed: text of small letters, digits and '-'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_launcher_that_cannot_work_is_refused_by_key_value_and_what_is_allowed(what: str) -> None:
    overrides, message = REFUSED[what]
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    assert message in str(error.value)
