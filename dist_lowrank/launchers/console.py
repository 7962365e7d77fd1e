"""Workers that write to the console of their launcher."""

from __future__ import annotations

import os

from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing.api import LogsDest


class SharedConsole(LogsSpecs):
    """Nothing is redirected, and nothing is read back.

    torch's own `DefaultLogsSpecs(log_dir=os.devnull)` does the same, but reads /dev/null in two threads for each
    worker. When a signal comes as one of them starts, Python forgets the thread, which then prints a traceback.
    """

    @property
    def root_log_dir(self) -> str:
        """There is none."""
        return os.devnull

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Called by torch before it starts the workers, which it numbers as the keys of `envs`."""
        for environment in envs.values():
            environment["TORCHELASTIC_ERROR_FILE"] = ""  # ranks tell by files in the run's folder
        console = dict.fromkeys(envs, "")
        return LogsDest(stdouts=console, stderrs=console, error_files=dict.fromkeys(envs, os.devnull))
