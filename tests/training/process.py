"""`promptd worker` and `promptd serve` as processes that can be killed: forked, so that they are there at once.

Leases are short here, and a job with the seed `POISON_SEED` takes its process down at its third step.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from promptd import app  # noqa: F401 - imported once, by the process that all others are forked from
from promptd.commands.serve import serve
from promptd.commands.worker import worker
from promptd.jobs import claims
from promptd.training import job, job_run
from promptd.training import worker as training_worker

LEASE_SECONDS = 1.0
POISON_SEED = 666


def main(command: str, log: Path, options: dict[str, Any]) -> None:
    """Run one of the two commands."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    claims.LEASE_SECONDS = LEASE_SECONDS
    job_run.HEARTBEAT_SECONDS = training_worker.POLL_SECONDS = LEASE_SECONDS / 5
    learn = job.TrainingJob._learn

    def deadly(self: job.TrainingJob, *args: Any) -> Any:
        if self.config.seed == POISON_SEED and self._step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return learn(self, *args)

    job.TrainingJob._learn = deadly  # type: ignore[method-assign]
    {"worker": worker, "serve": serve}[command](**options)


@contextmanager
def process(command: str, log: Path, **options: Any) -> Iterator[BaseProcess]:
    """Start a command; kill it at the end unless it is gone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    child = context.Process(target=main, args=(command, log, options), daemon=True)
    child.start()
    try:
        yield child
    finally:
        child.kill()
        child.join()
