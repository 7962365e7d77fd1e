"""Plans of the largest models on thousands of ranks take seconds, and a laptop's memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCALES = {
    "7B on 8": ["model=llama_7b", "train.global_batch_size=64", "--world-size=8"],
    "70B on 256": ["model=llama_70b", "train.global_batch_size=256", "--world-size=256"],
    "405B on 16384": ["model=llama_405b", "train.global_batch_size=16384", "--world-size=16384"],
}
PARAMETERS = {"7B on 8": 6_738_415_616, "70B on 256": 70_553_706_496, "405B on 16384": 405_853_388_800}
CPU_SECONDS = 120
RSS_BYTES = 8 * 2**30


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
def test_large_models_are_planned_in_seconds(scale: str) -> None:
    more = ["precision=bf16", "train.micro_batch_size=1", "data.sequence_length=2048", "--device=h100", "--json"]
    script = "import sys; from dist_lowrank.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "plan", *SCALES[scale], *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.read())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode in (0, 5)
    print(f"{scale}: {usage.ru_utime + usage.ru_stime:.1f} CPU seconds, {usage.ru_maxrss / 1024:.0f} MiB")
    assert usage.ru_utime + usage.ru_stime < CPU_SECONDS
    assert usage.ru_maxrss * 1024 < RSS_BYTES
    held = sum((kind["last_rank"] - kind["first_rank"] + 1) * kind["bytes"]["parameters"] for kind in told["memory"])
    assert held >= 4 * PARAMETERS[scale]  # with padding
    assert told["verdict"]["largest_micro_batch"] >= 0
