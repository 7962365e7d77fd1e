"""The image of the Dockerfile's `cpu` target, really built and run, as a machine without a Docker engine can.

`docker/without_engine.sh` does it with Debian's packages. The image is kept for the next time if `CONTAINER_STORAGE`
names a folder for it; else it is removed after the tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
SCRIPT = str(PROJECT / "docker" / "without_engine.sh")
PODMAN_COMPOSE = str(Path(sys.executable).with_name("podman-compose"))
COMPOSE = [PODMAN_COMPOSE, "--file", str(PROJECT / "docker" / "compose.yaml")]
# Nothing that a container may do without.
CONFINED = ["--cap-drop=ALL", "--security-opt=no-new-privileges", "--read-only", "--read-only-tmpfs=false"]
TRAIN = ["train.steps=20", "checkpoint.interval_steps=5"]  # as in docker/compose.yaml
SIZE_LIMIT_BYTES = 1.8e9

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def _run(*command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command on the tests' own container storage."""
    done = subprocess.run(
        [SCRIPT, "run", *command], capture_output=True, text=True, timeout=900, env={**os.environ, **environment}
    )
    assert not check or done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}"
    return done


def _podman(*options: str, runs: Path | None = None, user: int = 1000) -> list[str]:
    """`podman run` of one confined container, without a network."""
    mounts = []
    if runs is not None:
        runs.mkdir(exist_ok=True)
        os.chown(runs, user, user)
        mounts = ["--volume", f"{runs}:/runs"]
    return ["podman", "run", "--rm", "--network=none", f"--user={user}:{user}", *CONFINED, *mounts, *options]


def _train(runs: Path, *overrides: str, user: int = 1000) -> str:
    return _run(*_podman("--tmpfs=/tmp", "dist-lowrank:cpu", "dist-lowrank", "train", *overrides, runs=runs)).stdout


def _weights(runs: Path) -> bytes:
    (exported,) = runs.glob("*/attempt-*/export/model.safetensors")
    return exported.read_bytes()


@pytest.fixture(scope="module", autouse=True)
def image() -> Iterator[None]:
    if sys.platform != "linux" or os.geteuid() != 0 or not Path("/etc/debian_version").exists():
        pytest.skip("containers without an engine need root on Debian")
    ready = subprocess.run([SCRIPT, "setup"], capture_output=True, text=True)
    if ready.returncode != 0:
        pytest.skip(f"Debian's container packages cannot be set up here: {ready.stderr.strip()[-300:]}")
    started = time.monotonic()
    built = subprocess.run([SCRIPT, "build", "cpu"], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    print(f"built in {time.monotonic() - started:.0f} s")
    print(_run("podman", "history", "--format", "{{.Size}}  {{.CreatedBy}}", "dist-lowrank:cpu").stdout)
    yield
    if "CONTAINER_STORAGE" not in os.environ:
        subprocess.run([SCRIPT, "remove"], check=True, capture_output=True)


@pytest.fixture(scope="module")
def undisturbed(image: None, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights after 20 steps of the default run, in one container without a network."""
    runs = tmp_path_factory.mktemp("undisturbed") / "runs"
    assert "step 20/20" in _train(runs, *TRAIN)
    assert {path.stat().st_uid for path in runs.rglob("*")} == {1000}
    return _weights(runs)


def test_a_killed_container_goes_on_to_the_weights_of_an_undisturbed_one(undisturbed: bytes, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    name = f"killed-{os.getpid()}"
    command = _podman("--tmpfs=/tmp", f"--name={name}", "dist-lowrank:cpu", "dist-lowrank", "train", *TRAIN, runs=runs)
    with subprocess.Popen([SCRIPT, "run", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        deadline = time.monotonic() + 600
        while not list(runs.glob("*/checkpoints/save-*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        _run("podman", "kill", "--signal=KILL", name)
    assert killed.returncode == 128 + signal.SIGKILL
    assert not list(runs.glob("*/attempt-1/export"))
    _train(runs, *TRAIN)
    assert len(list(runs.glob("*/attempt-2"))) == 1, "the second container continued the run of the first"
    assert _weights(runs) == undisturbed


def test_two_containers_as_nodes_train_to_the_weights_of_one(undisturbed: bytes, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    os.chown(runs, 1000, 1000)
    try:
        output = _run(*COMPOSE, "up", RUNS=str(runs)).stdout
        assert [_exit_code(f"dist-lowrank_node{number}_1") for number in range(2)] == [0, 0], output
    finally:
        _run(*COMPOSE, "down", check=False, RUNS=str(runs))
    assert _weights(runs) == undisturbed


def _exit_code(container: str) -> int:
    return int(_run("podman", "inspect", "--format={{.State.ExitCode}}", container).stdout)


@pytest.mark.parametrize(("launcher", "program"), [("docker", "podman"), ("compose", PODMAN_COMPOSE)])
def test_what_launch_renders_trains(launcher: str, program: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dist_lowrank.cli", "launch", f"launcher={launcher}", "train.steps=3"]
    command += [f"launcher.command=[{SCRIPT},run,{program}]", "launcher.unlimited_memlock=false"]
    launched = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert launched.returncode == 0, launched.stderr
    (finished,) = tmp_path.glob("runs/*/FINISHED")
    for file in finished.parent.glob("attempt-1/launch/compose.yaml"):
        _run(PODMAN_COMPOSE, "-p", finished.parent.name.replace("_", "-"), "-f", str(file), "down")


def test_deepspeed_needs_no_compiler_and_no_known_user(tmp_path: Path) -> None:
    assert "step 3/3" in _train(tmp_path / "runs", "strategy=zero2", "train.steps=3", user=12345)


def test_without_a_place_to_write_it_says_what_to_add() -> None:
    refused = _run(*_podman("dist-lowrank:cpu", "dist-lowrank", "train"), check=False)
    assert refused.returncode == 2
    assert "--tmpfs /tmp" in refused.stderr


def test_there_is_no_compiler_no_cache_and_no_secret_in_it() -> None:
    look = r"""
        for name in gcc g++ cc c++ clang nvcc ld as make git ssh sshd curl wget; do command -v $name; done
        ls -A ~root/.cache /var/lib/apt/lists /run/secrets /etc/pip.conf /wheel /build /tmp
        find /opt /workspace ~root /home /data /runs -name '*.whl' -o -name .git -o -name '.env*' -o -name 'id_rsa*'
        find /opt /workspace /usr \( -user 1000 -o -perm -002 \) ! -type l
    """
    command = ["podman", "run", "--rm", "--network=none", "--user=0", "--entrypoint=sh", "dist-lowrank:cpu", "-c", look]
    found = [line for line in _run(*command, check=False).stdout.splitlines() if line and not line.endswith(":")]
    assert found == []


def test_what_the_image_says_of_itself(tmp_path: Path) -> None:
    (facts,) = json.loads(_run("podman", "image", "inspect", "dist-lowrank:cpu").stdout)
    assert facts["User"] == "1000:1000"
    assert facts["Labels"]["org.opencontainers.image.revision"] != "unknown"
    assert not [line for line in facts["Config"]["Env"] if "PIP" in line or "CERT" in line or "TOKEN" in line]
    assert facts["Size"] < SIZE_LIMIT_BYTES
    health = facts["Healthcheck"]["Test"]
    assert health[0] == "CMD"
    _run(*_podman("--tmpfs=/tmp", "dist-lowrank:cpu", *health[1:], runs=tmp_path / "runs"))
