"""Processes that train are killed, stopped and poisoned: every job ends once, and with the prompt of a quiet life."""
# ruff: noqa: ASYNC110, ASYNC210, ASYNC220 (these tests look at other processes and may block)

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from promptd_store import EmbeddedStore, PromptCatalog

from promptd.jobs import JobQueue, JobRecord, JobRequest, JobSpec, JobState
from promptd.modeling import FrozenModel
from promptd.training.job_spec import check_spec
from tests.training.process import LEASE_SECONDS, POISON_SEED, process

pytestmark = pytest.mark.anyio

ROWS = b"\n".join(
    json.dumps({"text": f"{verb} {thing} {n}", "label": label}).encode()
    for n in range(12)
    for verb, thing, label in (("is there", "rain", "weather"), ("play a", "song", "music"))
)
STEPS = {"num_steps": 30, "batch_size": 4, "num_evaluations": 3}


@pytest.fixture
def anyio_backend() -> str:
    """Run async tests on asyncio."""
    return "asyncio"


@dataclass
class Site:
    """A store, as a server sees it, and workers to start over it."""

    folder: Path
    model_folder: Path
    model: FrozenModel
    store: EmbeddedStore = field(init=False)
    queue: JobQueue = field(init=False)

    def __post_init__(self) -> None:
        self.store = EmbeddedStore(self.folder / "store")
        self.queue = JobQueue(self.store, self.model.spec.fingerprint, check=check_spec)

    def worker(self, **options: Any) -> Any:
        """A worker's process, as a context."""
        common = {"model": str(self.model_folder), "store": str(self.folder / "store"), "checkpoint_seconds": 0.0}
        return process("worker", self.folder / "log", **(common | options))

    async def create(self, name: str, seed: int = 0, **hyperparameters: Any) -> JobRecord:
        """Create a job of the same rows."""
        method = {"type": "residual", "residual": {"hyperparameters": STEPS | hyperparameters}}
        digest = await self.queue.put_rows("acme", ROWS)
        settings = {"seed": seed, "publish_worse": True}
        return await self.queue.create("acme", JobRequest(JobSpec(method, name, settings, rows_digest=digest)))

    async def until(self, job: JobRecord, holds: Callable[[JobRecord], bool], seconds: float = 30) -> JobRecord:
        """Wait until something holds of a job."""
        with anyio.move_on_after(seconds):
            while not holds(job := await self.queue.get("acme", job.id)):
                await anyio.sleep(0.03)
            return job
        pytest.fail(f"waited in vain: {job}\n{(self.folder / 'log').read_text()}")

    async def ended(self, job: JobRecord, seconds: float = 60) -> JobRecord:
        """Wait for a job's end."""
        return await self.until(job, lambda job: job.state.is_ended, seconds)

    async def version(self, job: JobRecord) -> str:
        """Wait for a job's success and return its prompt's version."""
        ended = await self.ended(job)
        assert ended.result is not None, (ended.error, (self.folder / "log").read_text())
        record = await PromptCatalog(self.store, self.model.spec).resolve("acme", ended.prompt_name)
        assert (record.number, record.version) == (1, ended.result.version)  # published once
        return record.version

    async def starts(self, job: JobRecord) -> list[str]:
        """What the log tells of each worker that took the job, oldest first."""
        events = await self.queue.events("acme", job.id)
        return [event.message for event in reversed(events) if event.message.startswith("A worker has started")]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the store lies: in memory where there is such a place, for the disk is for the store's own tests."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture
async def site(folder: Path, tiny_models: dict[str, Path], llama: FrozenModel) -> Any:
    """A store of its own."""
    site = Site(folder, tiny_models["llama"], llama)
    yield site
    await site.store.close()


def saved_after(step: int) -> Callable[[JobRecord], bool]:
    """Whether a job has a checkpoint of a later step."""
    return lambda job: job.state.is_ended or (job.checkpoint is not None and job.checkpoint.step > step)


async def test_kill_9_changes_no_bit(site: Site) -> None:
    """A worker killed again and again at random moments: the job goes on soon, and its prompt is the quiet run's."""
    dice = random.Random(5)
    job, step = await site.create("broken"), 0
    for _ in range(2):
        with site.worker() as child:
            began = time.monotonic()
            await site.until(job, saved_after(step))
            assert time.monotonic() - began < LEASE_SECONDS + 5
            await anyio.sleep(dice.random() * 0.2)
            child.kill()
            child.join()
        job = await site.queue.get("acme", job.id)
        assert job.checkpoint is not None
        step = job.checkpoint.step
    with site.worker(checkpoint_seconds=10.0):
        broken = await site.version(job)
        quiet = await site.version(await site.create("quiet"))
        assert broken == quiet != await site.version(await site.create("control", seed=1))
    starts = await site.starts(job)
    assert len(starts) == 3 and all("continuing after step" in start for start in starts[1:])


async def test_a_signal_puts_jobs_back_in_line(site: Site) -> None:
    """SIGTERM: a last checkpoint, the job waits, no attempt is counted; the next worker goes on from there."""
    job = await site.create("later", num_steps=100_000, num_evaluations=1)
    with site.worker(checkpoint_seconds=3600.0) as child:
        seen = await site.until(job, lambda job: job.progress is not None)
        child.terminate()
        child.join(20)
        assert child.exitcode == 0, (site.folder / "log").read_text()
    job = await site.queue.get("acme", job.id)
    assert (job.state, job.attempts) == (JobState.QUEUED, 0) and job.checkpoint is not None
    assert seen.progress is not None and job.checkpoint.step >= seen.progress.step
    with site.worker():
        await site.until(job, saved_after(job.checkpoint.step))
    assert f"continuing after step {job.checkpoint.step} " in (await site.starts(job))[-1]


async def test_a_worker_that_oversleeps_disturbs_nobody(site: Site) -> None:
    """A worker stopped for longer than its lease wakes up beside the one that took over: one end, one prompt."""
    job = await site.create("fenced", num_steps=100)
    with site.worker() as first:
        await site.until(job, saved_after(0))
        os.kill(first.pid or 0, signal.SIGSTOP)
        with site.worker():
            while len(await site.starts(job)) < 2:
                await anyio.sleep(0.03)
            os.kill(first.pid or 0, signal.SIGCONT)
            await site.version(job)
            assert len(await site.starts(job)) == 2
        assert first.is_alive()  # it has lost a job, not its life: the next one is its own
        await site.version(await site.create("next", num_steps=5))


async def test_acknowledged_jobs_outlive_the_server(site: Site) -> None:
    """`promptd serve` dies right behind its answer: every job that it has named is run by the next server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"model": str(site.model_folder), "store": str(site.folder / "store"), "port": port, "drain_seconds": 0.0}
    body = {
        "defaults": {"rows": [json.loads(row) for row in ROWS.split(b"\n")], "publish_worse": True},
        "jobs": [{"name": f"user-{number}", "method": {"type": "residual", "residual": {"hyperparameters": STEPS}}}
                 for number in range(3)],
    }  # fmt: skip
    with process("serve", site.folder / "log", **options) as server:
        await _ready(port)
        reply = httpx.post(f"http://127.0.0.1:{port}/admin/training/jobs", json=body)
        server.kill()
    assert reply.status_code == 207, reply.text
    ids = [result["job"]["id"] for result in reply.json()["data"]]
    with process("serve", site.folder / "log", **options):
        for job_id in ids:
            ended = await site.until(JobRecord(job_id, "default", "", JobSpec({}), 0.0), lambda job: job.state.is_ended)
            assert ended.state is JobState.SUCCEEDED, ended.error
    # The control: a call that was never answered has left nothing.
    assert {job.id for job in await site.queue.list("default")} == set(ids)


async def _ready(port: int) -> None:
    with anyio.fail_after(30):
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                await anyio.sleep(0.05)


@pytest.mark.long
async def test_poison_takes_nobody_along(site: Site) -> None:
    """A job that kills each of its workers fails after five attempts with that reason; those beside it succeed."""
    poison = await site.create("poison", seed=POISON_SEED)
    healthy = [await site.create(f"healthy-{number}", num_steps=100) for number in range(3)]
    num_lives = 0
    while not (await site.queue.get("acme", poison.id)).state.is_ended:
        num_lives += 1
        assert num_lives < 12
        with site.worker(checkpoint_seconds=10.0) as child, anyio.move_on_after(30):
            while child.is_alive() and not (await site.queue.get("acme", poison.id)).state.is_ended:
                await anyio.sleep(0.05)
    failed = await site.queue.get("acme", poison.id)
    assert failed.state is JobState.FAILED and failed.error is not None
    assert failed.error.code == "poison" and "5 times in a row" in failed.error.message
    assert len(await site.starts(poison)) == 5
    with site.worker():
        for job in healthy:
            await site.version(job)


@pytest.mark.long
async def test_jobs_and_workers_that_die_by_the_dozen(site: Site) -> None:
    """Two workers, twelve jobs, a kill every second or so: each job ends once, with the version it has in peace."""
    dice = random.Random(11)
    with site.worker():
        quiet = {
            seed: await site.version(await site.create(f"quiet-{seed}", seed=seed, num_steps=100)) for seed in range(2)
        }
    jobs = [await site.create(f"job-{number}", seed=number % 2, num_steps=100) for number in range(12)]
    assert len(set(quiet.values())) == 2
    num_kills = 0
    with ExitStack() as stack:
        workers = [stack.enter_context(site.worker(max_training_jobs=4)) for _ in range(2)]
        while not all([(await site.queue.get("acme", job.id)).state.is_ended for job in jobs]):
            await anyio.sleep(dice.uniform(0.5, 2.5))
            number = dice.randrange(2)
            workers[number].kill()
            workers[number] = stack.enter_context(site.worker(max_training_jobs=4))
            num_kills += 1
            assert num_kills < 200
    assert num_kills >= 3
    for job in jobs:
        await site.version(job)


@pytest.mark.long
async def test_the_real_lease(site: Site) -> None:
    """`promptd worker` from the command line, killed: another one goes on within 20 seconds."""
    job = await site.create("real", num_steps=100_000, num_evaluations=1)
    command = [sys.executable, "-m", "promptd", "worker", "--model", str(site.model_folder)]
    command += ["--store", str(site.folder / "store"), "--checkpoint-seconds", "1"]
    with (site.folder / "log").open("wb") as log, ExitStack() as stack:

        async def started(num_ready: int) -> subprocess.Popen[bytes]:
            one = stack.enter_context(subprocess.Popen(command, stderr=log))
            stack.callback(one.kill)
            while (site.folder / "log").read_text().count("ready") < num_ready:
                await anyio.sleep(0.1)
            return one

        first = await started(1)
        await site.until(job, saved_after(10))
        await started(2)
        first.kill()
        killed_at = time.monotonic()
        job = await site.queue.get("acme", job.id)
        assert job.checkpoint is not None
        await site.until(job, saved_after(job.checkpoint.step + 1), 20)
        assert len(await site.starts(job)) == 2
        assert 5 < time.monotonic() - killed_at < 20
