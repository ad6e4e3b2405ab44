"""A worker in a process of its own: `python -m tests.jobs.worker_process FOLDER`. Says each step that is durable."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from promptd_store import EmbeddedStore

from promptd.jobs import JobClaims, claims
from tests.jobs.conftest import BASE, result_of

NUM_STEPS = 12
LEASE_SECONDS = 0.5


def say(**message: object) -> None:
    """Write one line in one system call, so that a kill never leaves half of it."""
    os.write(1, json.dumps({"pid": os.getpid(), **message}).encode() + b"\n")


async def work(folder: Path) -> None:
    """Claim one job and take it to its end, a durable step every 20 ms."""
    claims.LEASE_SECONDS = LEASE_SECONDS
    worker = JobClaims(EmbeddedStore(folder), BASE, f"pid-{os.getpid()}")
    say(op="ready")
    while not (claimed := await worker.claim(1)):  # noqa: ASYNC110 - workers poll
        await asyncio.sleep(0.05)
    (claim,) = claimed
    saved = await worker.load_checkpoint(claim)
    first = 1 + int(saved or 0)
    say(op="claimed", first=first)
    for step in range(first, NUM_STEPS + 1):
        await asyncio.sleep(0.02)
        claim = await worker.heartbeat(claim)
        claim = await worker.save_checkpoint(claim, b"%d" % step, step)
        say(op="saved", step=step)
    await worker.finish(claim, result_of(claim.job))
    say(op="finished")


if __name__ == "__main__":
    asyncio.run(work(Path(sys.argv[1])))
