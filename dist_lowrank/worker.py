"""One rank of a run: joins the process group, trains, leaves without a trace.

`python -m dist_lowrank.worker RUNS/RUN/attempt-N` is what `launchers.local` starts. With the run's folder,
`... dist_lowrank.worker RUNS/RUN --of-attempt N`, it is a rank of a job on any number of nodes, which may be started
again and again, always configured as attempt N was: rank 0 decides on the attempt to work on. `main_torchrun` is for
ranks of the user's own torchrun that compose the configuration. Ranks never compose a configuration twice: they read
run.json, or rank 0's broadcast.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dist_lowrank.config import ConfigError, RunConfig, RunFolder, begin_again, claim, from_dict, open_run, to_dict
from dist_lowrank.exit_codes import RESTARTED, ExitCode, Hang, RunFailure
from dist_lowrank.rank_identity import compare_ranks, identity

if TYPE_CHECKING:
    import torch
    from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

# Keys in the launcher's store, which outlives restarts.
_ENDED = "dist_lowrank/ended"  # the exit code of a group of ranks that no restart would better
_ATTEMPT = "dist_lowrank/attempt"  # the folder of the last attempt


def main() -> NoReturn:
    """Entry of a rank whose run has a folder."""
    _end_by_signals()
    parser = argparse.ArgumentParser(prog="dist_lowrank.worker")
    parser.add_argument("folder", type=Path, help="of a run, or of the attempt to work on")
    parser.add_argument("--of-attempt", type=int, help="whose configuration to take; default: the newest one's")
    parser.add_argument("--launcher", type=int, help="its process id; without it this rank is not to start")
    options = parser.parse_args()
    end_with_parent(options.launcher)
    path: Path = options.folder
    if path.name.startswith("attempt-"):
        folder = open_run(path)
        _work(folder.config(), folder, _store(), speaks=False)
    _work_on_agreement(lambda world_size, _: _claim(path, options.of_attempt, world_size))


def main_torchrun(overrides: Sequence[str]) -> NoReturn:
    """Entry of a rank under the user's torchrun: rank 0 composes and checks for all, and broadcasts the outcome."""
    _end_by_signals()
    end_with_parent()
    _work_on_agreement(lambda world_size, before: _prepare(overrides, world_size, before), overrides)


def _work_on_agreement(prepare: Callable[[int, str | None], dict[str, Any]], overrides: Sequence[str] = ()) -> NoReturn:
    store = _store()
    config, folder = _agree(store, prepare)
    if os.environ["RANK"] == "0":
        print(folder.announcement, flush=True)
    _work(config, folder, store, speaks=True, overrides=overrides)


def _agree(store: PrefixStore, prepare: Callable[[int, str | None], dict[str, Any]]) -> tuple[RunConfig, RunFolder]:
    """The attempt that rank 0 prepares for all ranks, and its configuration. Leaves where there is nothing to do.

    Args:
        prepare: takes the number of ranks and, after a restart by torchrun, the folder of the attempt before.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    of_all_restarts = store.underlying_store
    if of_all_restarts.check([_ENDED]):
        leave(int(of_all_restarts.get(_ENDED)))
    if rank == 0:
        before = of_all_restarts.get(_ATTEMPT).decode() if of_all_restarts.check([_ATTEMPT]) else None
        prepared = prepare(world_size, before)
        if "attempt" in prepared:
            of_all_restarts.set(_ATTEMPT, prepared["attempt"])
        store.set("prepared", json.dumps(prepared))
    else:
        prepared = json.loads(store.get("prepared"))
    if "message" in prepared:
        if rank == 0:
            print(prepared["message"], file=sys.stderr)
            store.wait([f"told/{other}" for other in range(1, world_size)])  # this rank may be the host of the store
        else:
            store.set(f"told/{rank}", "")
        _end(ExitCode(prepared["exit_code"]), store, together=False)
    return from_dict(prepared["config"]), RunFolder.of_attempt(prepared["attempt"])


def leave(exit_code: int) -> NoReturn:
    """Ends this process, skipping interpreter shutdown, during which gloo's threads abort one run in twenty."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _prepare(overrides: Sequence[str], world_size: int, before: str | None) -> dict[str, Any]:
    """The configuration and folder of an attempt: the next one of the same run, after a restart of the ranks."""
    from dist_lowrank.launchers.preparation import check_world, prepare_run

    def prepared() -> RunFolder:
        if before is None:
            return prepare_run(overrides, world_size)[1]
        folder = begin_again(open_run(before))
        check_world(folder.config(), world_size)
        return folder

    return _told(prepared)


def _claim(run: Path, of_attempt: int | None, world_size: int) -> dict[str, Any]:
    """The configuration and folder of the attempt that these ranks work on: of a run that has been prepared."""
    from dist_lowrank.launchers.preparation import check_world

    last = open_run(run)
    if last.is_finished:
        return {"message": f"{run} is finished", "exit_code": ExitCode.FINISHED}
    # Nodes that lost one of theirs are stopped by SIGTERM too, to begin again without it.
    if _restarts() and last.stopped and last.stopped["reason"] != "SIGTERM":
        return {"message": f"{run} was stopped by {last.stopped['reason']}", "exit_code": last.stopped["exit_code"]}

    def claimed() -> RunFolder:
        prepared = last if of_attempt is None else open_run(run / f"attempt-{of_attempt}")
        check_world(prepared.config(), world_size)
        return claim(run, of_attempt)

    return _told(claimed)


def _told(prepare: Callable[[], RunFolder]) -> dict[str, Any]:
    """What rank 0 tells the others: the attempt, or how all of them have to end."""
    try:
        folder = prepare()
        return {"config": to_dict(folder.config()), "attempt": str(folder.attempt_path)}
    except ConfigError as error:
        message = "\n".join(f"error: {line}" for line in str(error).splitlines())
        return {"message": message, "exit_code": ExitCode.CONFIGURATION}
    except Exception:
        return {"message": traceback.format_exc(), "exit_code": ExitCode.FAILED}


def _work(
    config: RunConfig, folder: RunFolder, store: Store, *, speaks: bool, overrides: Sequence[str] = ()
) -> NoReturn:
    """Trains and exits. An error goes to a file of the run folder, from where the launcher reads it, or is printed."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def end_by(error: Exception) -> NoReturn:
        code = _exit_code(error)
        text = traceback.format_exc() if code is ExitCode.FAILED else str(error)
        path = folder.error(rank)
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        except OSError:  # the disk is full: say it anyway
            print(f"error: rank {rank}: {text}", file=sys.stderr)
        unexpected = code is ExitCode.FAILED
        if speaks and (rank == 0 or unexpected or code is ExitCode.HANG):
            print(f"error: {f'rank {rank} failed: ' if unexpected else ''}{text}", file=sys.stderr)
            if rank == 0 and code is not ExitCode.CONFIGURATION:
                from dist_lowrank.checkpoint.folders import newest_line

                print(newest_line(folder.checkpoints), file=sys.stderr)
        _end(code, store, together=False)

    try:
        _wait_for_folder(folder)
        compare_ranks(store, rank, world_size, identity(config, overrides), config.launcher.timeout_seconds)
        device = _join(config, store)
        from dist_lowrank.training.run import train
        from dist_lowrank.training.watchdog import Watchdog

        timeout_seconds = config.launcher.timeout_seconds
        code = train(
            config,
            folder,
            device,
            lambda position: Watchdog(store, position, timeout_seconds, lambda text: end_by(Hang(text))),
        )
    except Exception as error:
        end_by(error)
    _end(code, store, together=True)


def _wait_for_folder(folder: RunFolder, seconds: float = 60) -> None:
    """Until this node sees what rank 0 has written: network file systems may take a while.

    Raises:
        ConfigError: it does not come; then the nodes do not share a file system.
    """
    deadline = time.monotonic() + seconds
    while not folder.attempt_path.is_dir():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{folder.attempt_path}: does not exist on {platform.node()}; allowed: a folder that all nodes see "
                "(`runs` on a shared file system)"
            )
        os.listdir(folder.path.parent if folder.path.parent.is_dir() else ".")  # makes NFS ask the server again
        time.sleep(0.1)


def _exit_code(error: Exception) -> ExitCode:
    if isinstance(error, ConfigError):
        return ExitCode.CONFIGURATION
    return error.exit_code if isinstance(error, RunFailure) else ExitCode.FAILED


def _end(code: ExitCode, store: Store, *, together: bool) -> NoReturn:
    """Leaves; tells torchrun's next attempt if there is nothing that another attempt would cure.

    Args:
        together: whether all ranks come here, so that they can wait for each other; the peers of a rank that failed
            may be stuck in a collective.
    """
    with contextlib.suppress(RuntimeError):  # the store may be gone
        if together and not _all_are_here():
            code = code or ExitCode.FAILED
        if code not in RESTARTED and hasattr(store, "underlying_store"):
            store.underlying_store.set(_ENDED, str(int(code)))
    leave(code)


def _all_are_here() -> bool:
    """Waits for all ranks and takes leave of them. False: one failed after the last step, and says why itself."""
    import torch.distributed as dist

    try:
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError:
        return False
    return True


def _store() -> PrefixStore:
    """The launcher's key-value store, under a prefix that this group of ranks has for itself.

    torchrun keeps one store for all groups, and a restarted one would read the addresses of the dead. The number of
    restarts tells groups apart on one node only: of several, one that joins others which failed has not restarted
    anything itself. There every group has a store of its own (see `dist_lowrank.torchrun`).
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://"))
    of_all_groups = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return PrefixStore(f"dist_lowrank/{_restarts() if of_all_groups else 0}", store)


def _restarts() -> int:
    """How often torchrun has restarted the ranks of this node after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _join(config: RunConfig, store: Store) -> torch.device:
    import torch
    import torch.distributed as dist

    from dist_lowrank.launchers.preparation import resolve_processes

    if config.launcher.threads is not None:
        torch.set_num_threads(config.launcher.threads)
    kind, _ = resolve_processes(config)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses to be deterministic
    if kind == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"torchrun --nproc-per-node: {os.environ['LOCAL_WORLD_SIZE']} ranks but {torch.cuda.device_count()} "
                f"GPUs visible; allowed: 1 to {torch.cuda.device_count()} (or launcher.device=cpu)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed, if installed, else warns that it guesses
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        # Longer, so that the watchdog, which names who hangs, comes first.
        timeout=timedelta(seconds=1.5 * config.launcher.timeout_seconds + 5),
        device_id=device if kind == "cuda" else None,
    )
    return device


def end_with_parent(parent: int | None = None) -> None:
    """Asks Linux to kill this process when its parent dies, even by SIGKILL, so that no process is left behind.

    Args:
        parent: the process that started this one, which may have died since; then this one ends here.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(ExitCode.FAILED)


def _end_by_signals() -> None:
    """Until the training loop takes signals there is nothing to finish, and the system ends this rank at once.

    A handler of Python's would not be called as long as torch waits for another rank, which may be gone by then.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which Python handles unless told otherwise


if __name__ == "__main__":
    main()
