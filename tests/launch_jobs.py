"""Jobs of every launcher whose files are the same on every machine, and the texts that they render to."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_lowrank.config import compose
from dist_lowrank.launchers.job import Job
from dist_lowrank.launchers.rendering import RENDERERS

CASES = {
    "torchrun": ["launcher=torchrun", "launcher.hosts=[node0,node1]", "launcher.interface=eth0"],
    "torchrun_elastic": [
        "launcher=torchrun",
        "launcher.hosts=[node0,node1,node2]",
        "launcher.rendezvous=c10d",
        "launcher.min_nodes=2",
        "launcher.max_restarts=3",
        "launcher.port=29500",
        "launcher.secret_environment=[HF_TOKEN]",
        "launcher.environment.NCCL_IB_HCA=mlx5",
    ],
    "torchrun_one_host": ["launcher=torchrun", "launcher.device=cpu", "launcher.nproc_per_node=2"],
    "slurm": [
        "launcher=slurm",
        "launcher.nodes=2",
        "launcher.partition=gpu",
        "launcher.account=project",
        "launcher.time_limit_minutes=120",
        "launcher.memory_gib=0",
        "launcher.exclusive=true",
        'launcher.options=["--nice=10"]',
        "launcher.secret_environment=[HF_TOKEN]",
    ],
    "slurm_pyxis": [
        "launcher=slurm_pyxis",
        "launcher.nodes=2",
        "launcher.rendezvous=c10d",
        "launcher.mounts={/scratch/text: /data}",
        "launcher.secret_environment=[HF_TOKEN]",
    ],
    "docker": [
        "launcher=docker",
        "data=text",
        "data.path=books/*.txt",
        "launcher.device=cuda",
        "launcher.infiniband=true",
        "launcher.mounts={more: /data}",
        "launcher.secret_environment=[HF_TOKEN]",
    ],
    "compose": ["launcher=compose", "launcher.secret_environment=[HF_TOKEN]"],
    "compose_gpu": [
        "launcher=compose",
        "launcher.device=cuda",
        "launcher.nproc_per_node=2",
        "launcher.infiniband=true",
    ],
    "kubernetes_trainjob": [
        "launcher=kubernetes",
        "launcher.nodes=2",
        "launcher.namespace=training",
        "launcher.data_claim=text",
        "launcher.rdma_resource=rdma/hca",
        "launcher.memory_gib=512",
        "launcher.secret_environment=[HF_TOKEN]",
        "launcher.secret_name=hub",
        "launcher.node_selector={pool: a100}",
    ],
    "kubernetes_job": ["launcher=kubernetes", "launcher.kind=job", "launcher.nodes=2", "launcher.device=cpu"],
    "deepspeed": ["launcher=deepspeed", "launcher.hosts=[node0,node1]", "strategy=zero3", "launcher.interface=eth0"],
}


def golden_job(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Job[object]:
    """The job of a case, composed in a folder with some text."""
    (folder / "books").mkdir(exist_ok=True)
    (folder / "books" / "one.txt").write_text("Some text.\n")
    monkeypatch.chdir(folder)
    config = compose(["train.global_batch_size=48", *CASES[case]])
    return Job(
        config=config,
        launcher=config.launcher,
        run="runs/llama_tiny-dct_adamw-0123456789ab",
        attempt=1,
        work_directory="/data/me/proj",
        python="/data/me/venv/bin/python",
        user="1000:1000",
    )


def rendered(job: Job[object]) -> dict[str, str]:
    """The files of a job by name, and the commands that start them."""
    renderer = RENDERERS[job.config.launcher.name]
    commands = "".join(" ".join(command) + "\n" for command in renderer.commands(job))
    return {**renderer.render(job), "commands.txt": commands}
