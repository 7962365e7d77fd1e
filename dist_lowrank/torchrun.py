"""torchrun, but it ends with the exit code of the run.

`python -m dist_lowrank.torchrun OPTIONS -m dist_lowrank.worker RUN --of-attempt N`, with torchrun's own options.
torchrun itself ends with 1 whatever its ranks ended with; schedulers need to know whether to start a job again
(docs/faults.md). With `--nnodes 1` the rendezvous is on loopback, whatever the options say.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from dist_lowrank.config import ConfigError, open_run
from dist_lowrank.exit_codes import ExitCode
from dist_lowrank.launchers import loopback
from dist_lowrank.launchers.endings import Interrupted, first_failure, how_stopped, stop_once
from dist_lowrank.worker import leave


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the ranks of this node and waits for them.

    Args:
        arguments: of torchrun; the script's first argument is the folder of a run.

    Returns:
        The run's exit code, as far as this node knows it.
    """
    options = parse_args(arguments)  # type: ignore[no-untyped-call]
    path = options.training_script_args[0]
    try:
        open_run(path)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.CONFIGURATION
    # The agent's own account of a failure is long and comes after the ranks' own.
    for name in ("", ".agent.server.api", ".agent.server.local_elastic_agent"):
        logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    if options.nnodes in ("1", "1:1"):
        loopback.stay_on_loopback()
        store = loopback.open_store()
        options.rdzv_backend, options.rdzv_endpoint, options.node_rank = "static", "", 0
        options.master_addr, options.master_port = loopback.ADDRESS, store.port
    elif options.rdzv_backend == "c10d":
        # A store for every group of ranks. The one that torchrun else keeps for all groups is on the node that was
        # first at the beginning; when that is lost, the others go on asking there.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    options.training_script_args += ["--launcher", str(os.getpid())]
    names = {name.strip() for name in options.signals_to_handle.split(",")}
    options.signals_to_handle = ""  # by torch
    stop_once([number for number in signal.Signals if number.name in names - {"SIGINT"}])
    try:
        run(options)  # type: ignore[no-untyped-call]
    except Interrupted:
        return ExitCode.INTERRUPTED
    except SignalException:
        return how_stopped(open_run(path))
    except ChildFailedError as error:
        folder = open_run(path)  # the last attempt, after restarts
        failure = first_failure(error, folder)
        if failure is None or folder.is_finished:
            return how_stopped(folder)
        if not failure.told and failure.code is ExitCode.FAILED:  # ranks tell what they end by with another code
            print(f"error: rank {failure.rank} of {folder.attempt_path} {failure.text}", file=sys.stderr)
        return failure.code
    return ExitCode.FINISHED


if __name__ == "__main__":
    leave(main())
