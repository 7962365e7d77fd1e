"""What lies on the disk: readable by others, refused when it is damaged, harmless when it is hostile."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_on_ranks
from resumed_runs import folders_of, run_each, run_to, without_random
from safetensors import safe_open
from small_runs import overrides_for

from dist_lowrank.checkpoint import CheckpointError, committed, newest_good, open_checkpoint, verify_files
from dist_lowrank.checkpoint.restore import check_can_follow
from dist_lowrank.config import ConfigError, compose, digest

OPTIMIZER = ["optimizer.rank=3", "optimizer.error_feedback=int8", "strategy=fsdp"]


@pytest.fixture(scope="module")
def saved(text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, dict[str, Any]]:
    """Overrides of a run of 2 processes, its folder of checkpoints, and what rank 0 held at the end."""
    runs = tmp_path_factory.mktemp("saved")
    kept = ["checkpoint.interval_steps=1", "checkpoint.keep_last=1", "checkpoint.keep_every_steps=2"]
    overrides = overrides_for(text, runs, "train.steps=5", *OPTIMIZER, *kept)
    (folder,) = folders_of(overrides, runs, 1)
    result = run_on_ranks(2, run_to, folder)[0]
    return overrides, folder.checkpoints, result["end"]


def test_retention_keeps_the_last_and_every_second(saved: tuple[list[str], Path, Any]) -> None:
    names = ["save-0002-step-00000002", "save-0004-step-00000004", "save-0005-step-00000005"]
    assert [path.name for path in committed(saved[1])] == names
    assert sorted(path.name for path in saved[1].iterdir()) == names, "nothing else is left behind"


def test_safetensors_alone_reads_names_and_global_shapes(saved: tuple[list[str], Path, dict[str, Any]]) -> None:
    overrides, root, end = saved
    newest = committed(root)[-1]
    files = sorted(path.name for path in newest.iterdir())
    shards = [f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)]
    assert files == ["checkpoint.json", "manifest.json", *shards]
    sidecar = json.loads((newest / "checkpoint.json").read_text())
    assert sidecar["step"] == 5
    assert sidecar["data"][0] == {"samples": 5 * 8}
    assert sidecar["digest"] == digest(compose(overrides))
    assert sidecar["config"]["optimizer"]["rank"] == 3
    assert sidecar["versions"]["torch"]
    whole = {name: torch.zeros(entry["shape"]) for name, entry in sidecar["tensors"].items()}
    for shard in shards:
        with safe_open(newest / shard, framework="pt") as file:
            offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118
                part, offset = file.get_tensor(name), offsets[name]["saved_offsets"]
                whole[name] = whole[name].to(part.dtype)
                whole[name][tuple(slice(o, o + s) for o, s in zip(offset, part.shape, strict=True))] = part
    for name, tensor in without_random(end).items():
        if name != "learning_rates":
            assert torch.equal(whole[name], tensor), name
    matrix = "optimizer.model.layers.0.mlp.up_proj.weight."  # (28, 12): compressed to 3 of 12
    assert whole[f"{matrix}exp_avg"].shape == (28, 3)
    assert whole[f"{matrix}indices"].shape == (3,)
    assert not whole[f"{matrix}indices"].dtype.is_floating_point


def _problem_of(path: Path) -> str | None:
    try:
        verify_files(open_checkpoint(path))
    except CheckpointError as error:
        return str(error)
    return None


@settings(max_examples=100, deadline=None, derandomize=True)
@given(draw=st.data())
def test_a_hundred_corrupted_checkpoints_are_refused_by_name(saved: tuple[list[str], Path, Any], draw: Any) -> None:
    older, newest = committed(saved[1])[-2:]
    root = saved[1].parent / "corrupted" / "checkpoints"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(saved[1], root)
    target = root / newest.name
    names = sorted(path.name for path in target.iterdir())
    name = draw.draw(st.sampled_from(names))
    content = bytearray((target / name).read_bytes())
    position = draw.draw(st.integers(0, len(content) - 1))
    kind = draw.draw(st.sampled_from(["flip", "truncate", "lengthen", "delete", "swap", "older", "zeros"]))
    match kind:
        case "flip":
            content[position] ^= 1 << draw.draw(st.integers(0, 7))
            (target / name).write_bytes(content)
        case "truncate":
            (target / name).write_bytes(content[:position])
        case "lengthen":
            (target / name).write_bytes(content + b"\0" * (1 + position % 9))
        case "delete":
            (target / name).unlink()
        case "swap":
            other = draw.draw(st.sampled_from([each for each in names if each != name]))
            (target / name).write_bytes((target / other).read_bytes())
            (target / other).write_bytes(content)
        case "older":
            shutil.copyfile(root / older.name / name, target / name)
        case "zeros":
            content[position : position + 64] = bytes(len(content[position : position + 64]))
            (target / name).write_bytes(content)
    problem = _problem_of(target)
    if problem is not None:
        named = [each for each in names if str(target / each) in problem]
        assert name in named or name == "manifest.json" or kind == "swap", problem
        assert newest_good(root) == root / older.name
    else:  # only white space or the order of lines can have changed, or nothing
        opened, original = open_checkpoint(target), open_checkpoint(newest)
        assert (opened.sidecar, opened.files) == (original.sidecar, original.files)
        assert all(
            (target / each).read_bytes() == (newest / each).read_bytes() for each in names if each != "manifest.json"
        )


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def _hostile(kind: str, target: Path, outside: Path) -> None:
    """Makes a checkpoint whose author means harm, and who can compute checksums."""
    manifest = json.loads((target / "manifest.json").read_text())
    sidecar = json.loads((target / "checkpoint.json").read_text())
    shard = next(name for name in manifest["files"] if name.endswith(".safetensors"))
    payload = pickle.dumps(_Payload(outside / "executed"))
    if kind == "pickle for manifest":
        (target / "manifest.json").write_bytes(payload)
    elif kind == "pickle for sidecar":
        (target / "checkpoint.json").write_bytes(payload)
        _list(target, manifest, "checkpoint.json")
    elif kind == "pickle for a shard":
        (target / shard).write_bytes(payload)
        _list(target, manifest, shard)
    elif kind in ("parent", "absolute"):
        shutil.move(target / shard, outside / shard)
        path = f"../../{outside.name}/{shard}" if kind == "parent" else str(outside / shard)
        manifest["files"][path] = manifest["files"].pop(shard)
        (target / "manifest.json").write_text(json.dumps(manifest))
    elif kind == "link":
        shutil.move(target / shard, outside / shard)
        (target / shard).symlink_to(outside / shard)
    elif kind == "device":
        (target / shard).unlink()
        os.mkfifo(target / shard)
    elif kind == "deep":
        (target / "manifest.json").write_text('{"files":' * 100_000)
    elif kind == "oversize":
        with open(target / "manifest.json", "r+b") as file:
            file.truncate(2**40)  # takes no space
    elif kind == "one file more":
        shutil.copyfile(target / shard, target / "shard-00009-model-00001-of-00001.safetensors")
    elif kind == "missing tensor":
        sidecar["tensors"]["model.more.weight"] = {"dtype": "F32", "shape": [3, 3]}
        (target / "checkpoint.json").write_text(json.dumps(sidecar))
        _list(target, manifest, "checkpoint.json")
    elif kind == "one copy only":  # half of the blocks, as if that were all
        del manifest["files"][shard]
        (target / shard).unlink()
        (target / "manifest.json").write_text(json.dumps(manifest))
    elif kind == "huge tensor":
        name = next(iter(sidecar["tensors"]))
        sidecar["tensors"][name]["shape"] = [2**60, 2**60]
        (target / "checkpoint.json").write_text(json.dumps(sidecar))
        _list(target, manifest, "checkpoint.json")


def _list(target: Path, manifest: dict[str, Any], name: str) -> None:
    """Gives a file the entry that fits it."""
    from dist_lowrank.checkpoint.manifest import file_sha256

    manifest["files"][name] = {"bytes": (target / name).stat().st_size, "sha256": file_sha256(target / name)}
    (target / "manifest.json").write_text(json.dumps(manifest))


def test_a_hostile_checkpoint_neither_executes_nor_escapes(saved: tuple[list[str], Path, Any], tmp_path: Path) -> None:
    kinds = (
        "pickle for manifest",
        "pickle for sidecar",
        "pickle for a shard",
        "parent",
        "absolute",
        "link",
        "device",
        "deep",
        "oversize",
        "one file more",
        "missing tensor",
        "one copy only",
        "huge tensor",
    )
    for kind in kinds:
        outside, target = tmp_path / f"outside {kind}", tmp_path / kind
        outside.mkdir()
        shutil.copytree(committed(saved[1])[-1], target)
        verify_files(open_checkpoint(target))
        _hostile(kind, target, outside)
        problem = _problem_of(target)
        assert problem is not None, kind
        assert str(target) in problem
        assert not (outside / "executed").exists(), kind


def test_configuration_in_a_checkpoint_is_data(saved: tuple[list[str], Path, Any], tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    shutil.copytree(committed(saved[1])[-1], target)
    manifest = json.loads((target / "manifest.json").read_text())
    sidecar = json.loads((target / "checkpoint.json").read_text())
    sidecar["config"] = {"_target_": "os.mkdir", "optimizer": f"${{oc.env:HOME}}{tmp_path}/executed", "model": 3}
    (target / "checkpoint.json").write_text(json.dumps(sidecar))
    _list(target, manifest, "checkpoint.json")
    with pytest.raises(ConfigError, match=r"optimizer\.name: dct_adamw cannot continue"):
        check_can_follow(open_checkpoint(target), compose(saved[0]))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.rank=4", "optimizer.rank: 4 cannot continue"),
        ("optimizer.dictionary=hadamard", "optimizer.dictionary: hadamard cannot continue"),
        ("optimizer.error_feedback=int4", "optimizer.error_feedback: int4 cannot continue"),
        ("optimizer.side=longer", "optimizer.side: longer cannot continue"),
        ("model.config.num_hidden_layers=1", "model.config: "),
        ("optimizer=trion", "optimizer.name: trion cannot continue"),
    ],
)
def test_what_the_state_cannot_follow_is_refused_by_key(
    saved: tuple[list[str], Path, Any], override: str, key: str
) -> None:
    changed = ["optimizer=trion"] if override == "optimizer=trion" else [override]
    kept = [o for o in saved[0] if not (override == "optimizer=trion" and o.startswith("optimizer."))]
    with pytest.raises(ConfigError) as refusal:
        check_can_follow(open_checkpoint(committed(saved[1])[-1]), compose([*kept, *changed]))
    assert key in str(refusal.value)
    assert "resume.weights_only=true" in str(refusal.value)
    check_can_follow(open_checkpoint(committed(saved[1])[-1]), compose([*saved[0], "optimizer.lr=0.5", "seed=7"]))


def _resumes(rank: int, damaged: Any, fallback: Any, weights_only: Any, precision: Any) -> list[Any]:
    """Starts runs from a damaged checkpoint and from that of another optimizer."""
    problems: list[Any] = []
    for folder in (damaged, precision):
        try:
            run_to(rank, folder)
        except (CheckpointError, ConfigError) as error:
            problems.append(str(error))
    return [*problems, *run_each(rank, [(fallback, None), (weights_only, None)])]


def test_fallback_and_weights_only_are_the_ways_out(
    saved: tuple[list[str], Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Of a damaged newest checkpoint, and of another optimizer; on one process, where two had saved."""
    run = tmp_path / "run"
    shutil.copytree(saved[1], run / "checkpoints")
    newest = committed(run / "checkpoints")[-1]
    shard = sorted(newest.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)
    start = [*(o for o in saved[0] if not o.startswith(("checkpoint.", "strategy"))), f"resume={run}", "strategy=ddp"]
    (damaged,) = folders_of(start, tmp_path / "damaged", 1)
    (fallback,) = folders_of([*start, "resume.fallback=true"], tmp_path / "fallback", 1)
    (precision,) = folders_of(
        [*start[:-2], f"resume={committed(saved[1])[-1]}", "precision=fp64"], tmp_path / "precision", 1
    )
    other = [o for o in start if not o.startswith(("optimizer", "resume="))]
    good = committed(saved[1])[-1]
    (weights,) = folders_of(
        [*other, "optimizer=adamw", f"resume={good}", "resume.weights_only=true"], tmp_path / "weights", 1
    )
    refused, differs, recovered, taken = run_on_ranks(1, _resumes, damaged, fallback, weights, precision)[0]
    assert shard.name in refused
    assert "resume.fallback=true" in refused
    assert "F64" in differs
    assert {step for step, _ in recovered["losses"]} == {5}, "it continued after step 4"
    assert {step for step, _ in taken["losses"]} == {0, 1, 2, 3, 4, 5}
    for name, tensor in saved[2].items():
        if name.startswith("model."):
            assert torch.equal(taken["begin"][name], tensor), name
