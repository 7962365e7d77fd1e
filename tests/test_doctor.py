"""`dist-lowrank doctor` in real processes: alone, as two nodes on loopback addresses, and with what can be wrong."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed  # noqa: F401  # once, before the forks

from dist_lowrank.cli import main
from dist_lowrank.doctor.all_reduce import Reduced, disagreements
from dist_lowrank.doctor.gpus import Gpu, check_gpus, list_gpus
from dist_lowrank.doctor.items import Item, as_text
from dist_lowrank.doctor.machine import check_disk, check_locked_memory, check_open_files, check_shared_memory
from dist_lowrank.doctor.meeting import check_clock
from dist_lowrank.doctor.names import check_own_name, check_port, exposed, listening, resolve
from dist_lowrank.doctor.nodes import Place, check_names, check_reach
from dist_lowrank.worker import end_with_parent

A, B = "127.0.0.2", "127.0.0.3"
FEW = ["--min-free-gib", "0"]


def free_port() -> int:
    with socket.create_server((A, 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    with socket.create_server((A, 0)) as listener:
        yield listener


def command_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has just ended
        return ""


class Node:
    """The command in a fork of this process, which has imported torch already."""

    def __init__(self, *options: str) -> None:
        reading, writing = os.pipe()
        self.printed = os.fdopen(reading)
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                end_with_parent()
                self.printed.close()
                with os.fdopen(writing, "w") as output, contextlib.redirect_stdout(output):
                    code = main(["doctor", "--json", *FEW, *options])
            finally:
                os._exit(code)
        os.close(writing)

    def result(self) -> tuple[int, dict[str, dict[str, Any]]]:
        """Waits; the exit code, and the items by `node name`."""
        items = json.loads(self.printed.read())["items"]
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), {f"{i['node']} {i['name']}".strip(): i for i in items}

    def kill_in_all_reduce(self) -> None:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        while not any("all_reduce" in command_of(pid) for pid in children.read_text().split()):
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def test_two_nodes_meet_agree_and_print_the_same() -> None:
    shared = ["--nodes", f"{A},{B}", "--port", str(free_port())]
    one, other = Node(*shared, "--node-rank", "1"), Node(*shared, "--node-rank", "0")
    (code, items), (other_code, other_items) = one.result(), other.result()
    assert (code, other_code) == (0, 0)
    assert items == other_items
    assert {item["status"] for item in items.values()} <= {"ok", "warning"}
    assert items["nodes"]["found"] == "all 2 came"
    assert "over 2 ranks (gloo): " in items["all-reduce"]["found"]
    assert items["all-reduce"]["found"].endswith("equal bit by bit")
    assert {f"{A} reachable", f"{B} reachable", f"{B} clock", f"{A} names of nodes", "versions"} <= items.keys()


def test_missing_nodes_and_a_first_node_that_is_away_are_named() -> None:
    shared = ["--nodes", f"{A},{B},127.0.0.4", "--port", str(free_port()), "--timeout-seconds", "6"]
    first, second = Node(*shared, "--node-rank", "0"), Node(*shared, "--node-rank", "1")
    port = str(free_port())
    alone = Node("--nodes", f"{A},{B}", "--port", port, "--node-rank", "1", "--timeout-seconds", "1")
    nameless = Node(
        *("--nodes", f"no-such-node.invalid,{B}", "--node-rank", "0"),
        *("--port", str(free_port()), "--timeout-seconds", "1"),
    )
    code, items = nameless.result()
    assert code == 4
    assert items["nodes"]["found"] == f"not there within 1 s: {B}", "it waits no longer where its own name is unknown"
    code, items = alone.result()
    assert code == 4
    assert items[f"{B} rendezvous"]["found"] == (
        f"{A} does not answer, port {port}: connection refused: nothing listens there"
    )
    for node in (first, second):
        code, items = node.result()
        assert code == 4
        assert items["nodes"]["found"] == "not there within 6 s: 127.0.0.4"
        assert items["nodes"]["remedy"].startswith("start the same command there, with the same list and port")
        assert "all-reduce" not in items


def test_a_node_that_dies_in_the_middle_and_a_port_in_use_are_told(taken: socket.socket) -> None:
    port = str(taken.getsockname()[1])
    blocked = Node("--nodes", f"{A},{B}", "--port", port, "--node-rank", "0")
    fooled = Node("--nodes", f"{A},{B}", "--port", port, "--node-rank", "1", "--timeout-seconds", "2")
    shared = ["--nodes", f"{A},{B}", "--port", str(free_port()), "--timeout-seconds", "4"]
    first, second = Node(*shared, "--node-rank", "0"), Node(*shared, "--node-rank", "1")
    second.kill_in_all_reduce()

    code, items = blocked.result()
    assert code == 4
    assert items[f"{A} rendezvous port"]["found"] == f"{port}: Address already in use"
    assert "ss -ltnp" in items[f"{A} rendezvous port"]["remedy"]
    code, items = fooled.result()
    assert code == 4
    assert items[f"{B} rendezvous"]["found"].endswith(f"port {port}: what answers there is no rendezvous store")
    code, items = first.result()
    assert code == 4
    assert items[f"{A} rendezvous"]["found"] == f"{B} does not answer, it came and then fell silent"
    assert items["all-reduce"]["status"] == "failed"


def test_alone_it_reduces_over_two_ranks_and_a_slow_link_fails(capsys: pytest.CaptureFixture[str]) -> None:
    patient = ["--timeout-seconds", "240"]  # two processes that import torch, on a machine with more to do
    assert main(["doctor", *FEW, *patient, "--port", str(free_port()), "--min-bandwidth", "1e6"]) == 4
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if "all-reduce" in line)
    assert line.startswith("failed   all-reduce ")
    assert "16 MiB over 2 ranks (gloo)" in line
    assert any("remedy: look at the links" in each for each in lines)
    assert lines[-1].endswith(" checks, 1 failed, 0 warnings")


def test_quick_imports_no_torch_and_takes_under_three_seconds(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "dist_lowrank.cli", "doctor", "--quick", "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, *FEW, "--port", str(free_port())], capture_output=True, text=True, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 3
    assert not [line for line in done.stderr.splitlines() if line.split("|")[-1].strip() == "torch"]
    report = json.loads(done.stdout)
    assert report["fit"] is True
    assert "all-reduce" not in [item["name"] for item in report["items"]]
    full = subprocess.run([*command[:1], *command[3:], "--min-free-gib", "1e9"], capture_output=True, text=True)
    assert full.returncode == 4
    (disk,) = (item for item in json.loads(full.stdout)["items"] if item["status"] == "failed")
    assert disk["name"] == "disk"
    assert disk["found"].endswith("free for runs, less than 1e+09 GiB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", "a.invalid,b.invalid"], "error: --nodes a.invalid,b.invalid: none of them is this machine ("),
        (["--nodes", f"{A},{B}"], f"error: --nodes {A},{B}: {A} and {B} of them are this machine ("),
        (["--nodes", f"{A},{A}"], f"error: --nodes {A},{A}: is not allowed; allowed: each node once, such as "),
        (["--nodes", f"{A},{B}", "--node-rank", "2"], "error: --node-rank: 2 is not allowed; allowed: 0 to 1"),
        (["--nodes", A, "--quick"], f"error: --nodes {A}: is not allowed with --quick; allowed: one of the two"),
        (["--port", "70000"], "error: --port: 70000 is not allowed; allowed: 1 to 65535"),
        (["--port", "abc"], "error: --port: abc is not allowed; allowed: 1 to 65535"),
        (["--gpus", "-1"], "error: --gpus: -1 is not allowed; allowed: a whole number from 0"),
        (["--min-free-gib", "-5"], "error: --min-free-gib: -5 is not allowed; allowed: 0 or more"),
        (["--min-bandwidth", "nan"], "error: --min-bandwidth: nan is not allowed; allowed: more than 0"),
        (["--quick", "--min-bandwidth", "3"], "error: --min-bandwidth 3: is not allowed with --quick; allowed: one "),
        (["--node-rank", "0"], "error: --node-rank 0: is not allowed without --nodes; allowed: both"),
        (["--nodes", ""], "error: --nodes: '' is not allowed; allowed: each node once, such as node1,node2"),
        (["--timeout-seconds", "0"], "error: --timeout-seconds: 0 is not allowed; allowed: more than 0"),
    ],
)
def test_options_without_a_meaning_here_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *options]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_wrong_names_and_closed_ports_are_named(taken: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place([A, "no-such-node.invalid", B], 0, 0, timeout_seconds=0.5)
    assert check_names(place).found == "no address for no-such-node.invalid"
    closed, port = free_port(), taken.getsockname()[1]
    assert check_reach(Place([B, A], 0, 0, 0.5), [0, port]).status == "ok"
    assert check_reach(Place([B, A], 0, 0, 0.5), [0, closed]).found == (
        f"not from here: {A} port {closed} (connection refused: nothing listens there)"
    )
    assert resolve("no-such-node.invalid") == []
    assert resolve(A) == [A]
    if resolve(socket.gethostname())[:1] == ["127.0.0.1"]:
        assert "where no other node can reach it" in check_own_name(others=True).found
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
        assert check_own_name(others=True).status == "ok"


def test_a_store_that_answers_at_a_public_address_is_told(taken: socket.socket) -> None:
    port = taken.getsockname()[1]
    assert listening(port) == {A}
    assert check_port(port).status == "warning"
    assert check_port(port).found == f"{port} is in use (at {A}), by a job on this node perhaps"
    with socket.create_server(("::", 0), family=socket.AF_INET6) as everywhere:
        assert listening(everywhere.getsockname()[1]) == {"::"}
    own = ["10.0.0.1", "8.8.8.8", "127.0.0.1", "fd00::1"]
    assert exposed({"0.0.0.0"}, own) == exposed({"::"}, own) == exposed({"8.8.8.8"}, own) == ["8.8.8.8"]
    assert exposed({"10.0.0.1", A}, own) == []


def test_limits_of_this_process_are_read_and_judged(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        assert check_open_files().found == "at most 512, less than 4,096"
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, locked[1]))
        assert check_locked_memory(infiniband=tmp_path / "none").status == "ok"
        refused = check_locked_memory(infiniband=tmp_path)
        assert (refused.status, refused.found) == ("failed", f"at most 64 KiB, and {tmp_path} is there")
        assert "--ulimit memlock=-1" in refused.remedy
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_MEMLOCK, locked)
    assert check_shared_memory(needed=True, least_bytes=2**60).status == "failed"
    assert check_shared_memory(needed=False, least_bytes=2**60).status == "warning"
    assert check_shared_memory(needed=True, path=str(tmp_path / "none")).status == "warning"
    assert check_disk(str(tmp_path / "file" / "runs"), 0).status == "ok", "it will be made"
    (tmp_path / "file").touch()
    assert check_disk(str(tmp_path / "file" / "runs"), 0).found == f"{tmp_path}/file: is no folder"
    if Path("/proc/sys").is_dir():
        assert "is on no disk" in (found := check_disk("/proc/no_such_folder/runs", 0).found) or "written" in found
    if os.geteuid():
        tmp_path.chmod(0o500)
        assert check_disk(str(tmp_path / "runs"), 0).found.endswith("cannot be written by this user")


def test_gpus_that_are_missing_or_have_errors_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "nvidia-smi"  # stands for a driver's, on machines without one
    driver.write_text("#!/bin/sh\necho 'H100, 570.1, 81559 MiB, 0'\necho 'H100, 570.1, 81559 MiB, [N/A]'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert list_gpus() == [Gpu("H100", "570.1", "81559 MiB", "0"), Gpu("H100", "570.1", "81559 MiB", "[N/A]")]
    driver.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert list_gpus() == "nvidia-smi: No devices were found"
    good, bad = Gpu("H100", "570.1", "81559 MiB", "0"), Gpu("H100", "570.1", "81559 MiB", "3")
    assert [item.status for item in check_gpus([good, good], 2)] == ["ok", "ok"]
    assert check_gpus([good], 2)[0].found == "1 answer, 2 should"
    assert check_gpus([good, bad], 2)[-1].found == "uncorrected errors: GPU 1 has 3"
    assert check_gpus("nvidia-smi does not answer within 20 s")[0].status == "failed"
    assert check_gpus([], 0)[0].status == "ok"


def test_clocks_and_sums_are_judged() -> None:
    assert check_clock(0.9, 0.001, B).status == "ok"
    assert check_clock(-90.0, 0.5, B).found == "+90,000.0 ms against node 0, to 500.0 ms"
    assert check_clock(-90.0, 0.5, B).status == "failed"
    assert check_clock(2.0, 1.5, B).status == "ok", "too slow a network to tell"
    found = [Reduced(0, 1.0, 4, True, "a"), Reduced(1, 1.0, 4, False, "a"), Reduced(2, 1.0, 4, True, "b")]
    assert disagreements(found) == ["rank 1 has a wrong sum", "rank 2 has other sums than rank 0"]


def test_what_nodes_have_in_common_stands_once() -> None:
    items = [Item("disk", "ok", "free", node=n) for n in (A, B)] + [Item("clock", "failed", "late", "chrony", B)]
    assert as_text([*items, Item("nodes", "ok", "all")]).splitlines() == [
        "ok       all 2      disk   free",
        f"failed   {B}  clock  late",
        "                           remedy: chrony",
        "ok       together   nodes  all",
        "",
        "4 checks, 1 failed, 0 warnings",
    ]
