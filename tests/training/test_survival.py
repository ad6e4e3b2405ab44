"""Processes that train are killed, stopped and poisoned: every job ends once, and with the prompt of a quiet life."""
# ruff: noqa: ASYNC110, ASYNC220, ASYNC240 (these tests look at other processes and may block)

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from promptd.jobs import LEASE_SECONDS as REAL_LEASE_SECONDS
from promptd.jobs import JobRecord, JobState
from promptd.modeling import FrozenModel, load_model
from promptd.training.worker import POLL_SECONDS
from tests.integration.server import is_ready
from tests.ports import free_port
from tests.training.process import POISON_SEED
from tests.training.site import ENDLESS, ROWS, TENANT, Site, has_ended, method_of, quiet_version, saved_after

pytestmark = pytest.mark.anyio


@pytest.fixture
async def site(memory_folder: Path, tiny_models: dict[str, Path], llama: FrozenModel) -> Any:
    """A store of its own."""
    site = Site(memory_folder, tiny_models["llama"], llama)
    yield site
    await site.store.close()


@pytest.mark.parametrize("num_jobs", [1, 2], ids=["alone", "strict"])
async def test_kill_9_changes_no_bit(site: Site, num_jobs: int) -> None:
    """Workers killed at random moments: every job goes on, and its prompt is the one of a quiet run alone.

    Beside others, this is what --strict is for.
    """
    dice, strict, num_kills = random.Random(num_jobs), num_jobs > 1, 3 - num_jobs
    settings = [{"num_virtual_tokens": 7 * (seed + 1)} for seed in range(2)]
    jobs = [await site.create(f"broken-{seed}", seed, **settings[seed]) for seed in range(num_jobs)]
    steps = [0] * num_jobs
    for _ in range(num_kills):
        with site.worker(strict=strict) as child:
            for job, step in zip(jobs, steps, strict=True):
                await site.until(job, saved_after(step))
            await anyio.sleep(dice.random() * 0.2)
            child.kill()
            child.join(60)
        jobs = [await site.look(job) for job in jobs]
        steps = [job.checkpoint.step if job.checkpoint else 1 << 30 for job in jobs]
    with site.worker(strict=strict):
        versions = [await site.version(job) for job in jobs]
    model = load_model(site.model_folder, strict=strict)
    quiet = [quiet_version(model, seed, **settings[seed]) for seed in range(2)]
    assert versions == quiet[:num_jobs] and len(set(quiet)) == 2
    starts = await site.starts(jobs[0])
    assert len(starts) == num_kills + 1 and all("continuing after step" in start for start in starts[1:])


def is_beyond_its_checkpoint(job: JobRecord) -> bool:
    """Whether a job has got further than where it would go on."""
    return job.progress is not None and job.checkpoint is not None and job.progress.step > job.checkpoint.step


async def test_a_signal_puts_jobs_back_in_line(site: Site) -> None:
    """SIGTERM: a last checkpoint, the job waits, no attempt is counted; the next worker goes on from there."""
    job = await site.create("later", **ENDLESS)
    with site.worker(checkpoint_seconds=3600.0) as child:
        seen = await site.until(job, is_beyond_its_checkpoint)
        child.terminate()
        child.join(20)
        assert child.exitcode == 0, site.log
    job = await site.look(job)
    assert (job.state, job.attempts) == (JobState.QUEUED, 0) and job.checkpoint is not None
    assert seen.progress is not None and job.checkpoint.step >= seen.progress.step
    with site.worker():
        await site.until(job, saved_after(job.checkpoint.step))
    assert f"continuing after step {job.checkpoint.step} " in (await site.starts(job))[-1]


async def test_cancel_reaches_another_process(site: Site) -> None:
    """A running job is cancelled by its worker, amid its steps, and leaves nothing; the worker takes the next one."""
    job = await site.create("never", **ENDLESS)
    with site.worker():
        await site.until(job, saved_after(0))
        assert (await site.queue.cancel(TENANT, job.id)).state is JobState.CANCELLING
        ended = await site.until(job, has_ended)
        assert (ended.state, ended.checkpoint) == (JobState.CANCELLED, None)
        await site.version(await site.create("next"))
    assert len(await site.starts(job)) == 1


async def test_a_worker_that_oversleeps_disturbs_nobody(site: Site) -> None:
    """A worker stopped for longer than its lease wakes up when another one has its job: what it does counts nothing."""
    job = await site.create("fenced", num_steps=60)
    with site.worker(traits=["forger"], checkpoint_seconds=0.1) as first:
        await site.until(job, saved_after(0))
        await _freeze(site, first.pid)
        with site.worker(lease_seconds=60.0, checkpoint_seconds=3600.0) as second:
            with anyio.fail_after(60):
                while len(await site.starts(job)) < 2:
                    await anyio.sleep(0.02)
            await _freeze(site, second.pid)
            os.kill(first.pid, signal.SIGCONT)
            # It has lost a job, not its life: the next one is its own, and what it publishes is another prompt.
            control = await site.create("control", num_steps=90)
            assert await site.version(control) != quiet_version(site.model, num_steps=90)
            assert not (await site.look(job)).state.is_ended
            os.kill(second.pid, signal.SIGCONT)
            assert await site.version(job) == quiet_version(site.model, num_steps=60)
    assert len(await site.starts(job)) == 2


async def _freeze(site: Site, pid: int) -> None:
    """Stop a process, but not amid a write: that would stop the store for everyone."""
    for _ in range(100):
        os.kill(pid, signal.SIGSTOP)
        write = asyncio.create_task(site.store.publish("probe", b""))
        if (await asyncio.wait({write}, timeout=0.5))[0]:
            return
        os.kill(pid, signal.SIGCONT)
        await write
    pytest.fail("it writes all the time")


async def test_a_publication_that_oversleeps_is_refused(site: Site) -> None:
    """A worker falls asleep right before it publishes; awake again, its prompt is not taken for the other worker's."""
    job = await site.create("fenced")
    with site.worker(traits=["forger", "sleepy"]) as first:
        await _stopped(first.pid)
        with site.worker():
            honest = await site.version(job)
        os.kill(first.pid, signal.SIGCONT)
        control = await site.create("control")  # equal but for its name; nobody takes this one away
        await _stopped(first.pid)
        os.kill(first.pid, signal.SIGCONT)
        assert await site.version(control) != honest
    assert await site.version(job) == honest == quiet_version(site.model)
    assert len(await site.starts(job)) == 2


async def _stopped(pid: int) -> None:
    with anyio.fail_after(60):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            await anyio.sleep(0.02)


async def test_acknowledged_jobs_outlive_the_server(site: Site) -> None:
    """`promptd serve` dies amid requests for jobs: each job that it has named is run by the next server."""
    port = free_port()
    options = {"port": port, "drain_seconds": 0.0}
    acknowledged: list[str] = []
    body = {"defaults": {"rows": ROWS, "publish_worse": True, "method": method_of(num_steps=2)}, "jobs": [{}, {}]}

    def ask() -> None:
        while True:
            try:
                reply = httpx.post(f"http://127.0.0.1:{port}/admin/training/jobs", json=body, timeout=60)
            except httpx.TransportError:
                return
            acknowledged.extend(result["job"]["id"] for result in reply.json()["data"])

    with site.process("serve", **options) as server:
        await _ready(port)
        clients = [threading.Thread(target=ask, daemon=True) for _ in range(2)]
        for client in clients:
            client.start()
        with anyio.fail_after(60):
            while len(acknowledged) < 4:
                await anyio.sleep(0.01)
        server.kill()
        for client in clients:
            await anyio.to_thread.run_sync(client.join, 60)
    kept = {job.id for job in await site.queue.list(TENANT)}
    assert set(acknowledged) <= kept
    assert len(kept) % 2 == 0 and len(kept) <= len(acknowledged) + 2 * len(clients)  # a call makes all its jobs or none
    with site.process("serve", **options):
        for job in await site.queue.list(TENANT):
            ended = await site.until(job, has_ended)
            assert ended.state is JobState.SUCCEEDED, ended.error


async def _ready(port: int) -> None:
    with anyio.fail_after(60):
        while not is_ready(f"http://127.0.0.1:{port}"):
            await anyio.sleep(0.05)


async def test_poison_takes_nobody_along(site: Site) -> None:
    """A job that kills each of its workers fails after five attempts with that reason; the one beside it succeeds."""
    poison = await site.create("poison", seed=POISON_SEED)
    healthy = await site.create("healthy")
    num_lives = 0
    while not (await site.look(poison)).state.is_ended:
        num_lives += 1
        assert num_lives < 12
        with site.worker(lease_seconds=0.3) as child, anyio.move_on_after(30):
            while child.is_alive() and not (await site.look(poison)).state.is_ended:
                await anyio.sleep(0.02)
    failed = await site.look(poison)
    assert failed.state is JobState.FAILED and failed.error is not None
    assert failed.error.code == "poison" and "5 times in a row" in failed.error.message
    assert len(await site.starts(poison)) == 5
    with site.worker():
        assert await site.version(healthy) == quiet_version(site.model)


def test_the_real_lease_is_short_enough() -> None:
    """Another worker goes on with a dead one's job within 20 seconds: `test_the_real_lease` sees it."""
    assert REAL_LEASE_SECONDS + POLL_SECONDS < 20


@pytest.mark.long
async def test_jobs_and_workers_that_die_by_the_dozen(site: Site) -> None:
    """Two workers, twelve jobs, a kill every second or so: each job ends once, with the version it has in peace."""
    dice = random.Random(11)
    model = load_model(site.model_folder, strict=True)
    quiet = [quiet_version(model, seed, num_steps=100) for seed in range(2)]
    assert len(set(quiet)) == 2
    jobs = [await site.create(f"job-{number}", number % 2, num_steps=100) for number in range(12)]
    num_kills = 0
    with ExitStack() as stack:
        workers = [stack.enter_context(site.worker(strict=True, max_training_jobs=4)) for _ in range(2)]
        while not all([(await site.look(job)).state.is_ended for job in jobs]):
            await anyio.sleep(dice.uniform(0.5, 2.5))
            number = dice.randrange(2)
            workers[number].kill()
            workers[number] = stack.enter_context(site.worker(strict=True, max_training_jobs=4))
            num_kills += 1
            assert num_kills < 200
    assert num_kills >= 3
    for number, job in enumerate(jobs):
        assert await site.version(job) == quiet[number % 2]


@pytest.mark.long
async def test_the_real_lease(site: Site) -> None:
    """`promptd worker` from the command line, killed: another one goes on within 20 seconds."""
    job = await site.create("real", **ENDLESS)
    command = [sys.executable, "-m", "promptd", "worker", "--model", str(site.model_folder)]
    command += ["--store", str(site.folder / "store"), "--checkpoint-seconds", "1"]
    with (site.folder / "log").open("wb") as log, ExitStack() as stack:

        async def started(num_ready: int) -> subprocess.Popen[bytes]:
            one = stack.enter_context(subprocess.Popen(command, stderr=log))
            stack.callback(one.kill)
            with anyio.fail_after(120):
                while site.log.count("ready") < num_ready:
                    await anyio.sleep(0.1)
            return one

        first = await started(1)
        await site.until(job, saved_after(10))
        await started(2)
        first.kill()
        killed_at = time.monotonic()
        job = await site.look(job)
        assert job.checkpoint is not None
        await site.until(job, saved_after(job.checkpoint.step + 1), 20)
        assert len(await site.starts(job)) == 2
        assert 5 < time.monotonic() - killed_at < 20
