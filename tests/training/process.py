"""`promptd worker`, `serve` and `train` as processes that can be killed: forked, so that they are there at once.

Leases are short here. A job with the seed `POISON_SEED` takes its process down at its first step. A forger publishes
another prompt than the one that it has trained, and where it is sleepy, too, it stops right before.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from promptd import app  # noqa: F401 - imported once, by the process that all others are forked from
from promptd.commands.serve import serve
from promptd.commands.train import train
from promptd.commands.worker import worker
from promptd.jobs import claims
from promptd.training import job, job_run
from promptd.training import worker as training_worker

LEASE_SECONDS = 1.0
POISON_SEED = 666
gc.freeze()  # a collection in a fork would copy all pages that it walks


def main(command: str, log: Path, options: dict[str, Any], lease_seconds: float, traits: Sequence[str]) -> None:
    """Run one of the commands."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    claims.LEASE_SECONDS = lease_seconds
    job_run.HEARTBEAT_SECONDS = training_worker.POLL_SECONDS = min(lease_seconds, LEASE_SECONDS) / 5
    _poison()
    for trait in traits:
        {"sleepy": _sleepy, "forger": _forger}[trait]()
    {"worker": worker, "serve": serve, "train": train}[command](**options)


def _poison() -> None:
    learn = job.TrainingJob._learn

    def deadly(self: job.TrainingJob, *args: Any) -> Any:
        if self.config.seed == POISON_SEED:
            os.kill(os.getpid(), signal.SIGKILL)
        return learn(self, *args)

    job.TrainingJob._learn = deadly  # type: ignore[method-assign]


def _sleepy() -> None:
    checks = claims.JobClaims.publication_checks

    async def sleepy(self: claims.JobClaims, claim: claims.Claim) -> Any:
        found = await checks(self, claim)
        os.kill(os.getpid(), signal.SIGSTOP)  # the whole process: for as long as the test likes
        return found

    claims.JobClaims.publication_checks = sleepy  # type: ignore[method-assign]


def _forger() -> None:
    make = job_run.make_artifact

    def forged(model: Any, task: Any, result: job.TrainingResult) -> Any:
        return make(model, task, dataclasses.replace(result, prompt=-result.prompt))

    job_run.make_artifact = forged


@contextmanager
def process(
    command: str, log: Path, *, lease_seconds: float = LEASE_SECONDS, traits: Sequence[str] = (), **options: Any
) -> Iterator[BaseProcess]:
    """Start a command; kill it at the end unless it is gone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    child = context.Process(target=main, args=(command, log, options, lease_seconds, traits), daemon=True)
    child.start()
    try:
        yield child
    finally:
        child.kill()
        child.join(60)
