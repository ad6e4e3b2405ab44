"""Whatever dies whenever: every job ends exactly once, from its last checkpoint, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from promptd_store import CheckFailedError, EmbeddedStore, LeaseLostError, Put, Store, collect_garbage

from promptd.errors import ConflictError
from promptd.jobs import LEASE_SECONDS, JobClaims, JobProgress, JobQueue, JobRequest, JobState
from tests.jobs.conftest import (
    BASE,
    Clock,
    FragileStore,
    PowerCutError,
    StoreFactory,
    check_index,
    check_spec,
    created,
    make_queue,
    make_worker,
    result_of,
    spec_of,
)
from tests.jobs.worker_process import NUM_STEPS

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]


async def run_one_job(worker: JobClaims, num_steps: int = 2) -> int:
    """Take one job from claim to end and return the step that it began with."""
    (claim,) = await worker.claim(1)
    saved = await worker.load_checkpoint(claim)
    first = int(saved or 0)
    for step in range(first + 1, num_steps + 1):
        claim = await worker.save_checkpoint(claim, b"%d" % step, step)
        claim = await worker.report(claim, JobProgress(step, num_steps))
    await worker.finish(claim, result_of(claim.job))
    return first


async def ends_of(queue: JobQueue, tenant: str, job_id: str) -> list[str]:
    """Every end that a job's log tells of."""
    return [event.data["state"] for event in await queue.events(tenant, job_id) if event.ends_job]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_worker_dies_at_every_step(store: Store, queue: JobQueue, clock: Clock, after: bool) -> None:
    """A worker that dies before or after any of its calls to the store leaves a job that the next one ends once."""
    dies_at = 0
    while True:
        dies_at += 1
        job = await created(queue)
        fragile: Any = FragileStore(store, dies_at, after=after)
        try:
            await run_one_job(make_worker(fragile, clock, f"fragile-{dies_at}"))
            survived = True
        except PowerCutError:
            survived = False
        await check_index(store)
        seen = await queue.get("acme", job.id)
        clock.now += LEASE_SECONDS + 1
        if not seen.state.is_ended:
            first = await run_one_job(make_worker(store, clock, f"next-{dies_at}"))
            assert first == (seen.checkpoint.step if seen.checkpoint else 0)
        assert await ends_of(queue, "acme", job.id) == ["succeeded"]
        assert (await check_index(store)).keys() == {JobState.SUCCEEDED}
        await collect_garbage(store, "acme", unused_for_seconds=0)
        assert await store.scan_blobs("acme") == []
        if survived:
            assert dies_at > 15  # the whole life of a job was cut
            return


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("what", ["create", "cancel", "pause", "resume"])
async def test_server_dies_at_every_step(store: Store, queue: JobQueue, clock: Clock, what: str, after: bool) -> None:
    """A wish whose server dies has been done wholly or not at all; repeating it does it once."""
    spec = await spec_of(queue)
    for dies_at in range(1, 20):
        fragile = make_queue(FragileStore(store, dies_at, after=after), clock)
        job = None if what == "create" else await queue.create("acme", JobRequest(spec))
        if job is not None and what == "resume":
            await queue.pause("acme", job.id)

        async def wish(queue: JobQueue, job_id: str = job.id if job else "", key: str = f"key-{dies_at}") -> JobState:
            if what == "create":
                return (await queue.create("acme", JobRequest(spec, key))).state
            done = await getattr(queue, what)("acme", job_id)
            return JobState(done.state)

        try:
            done = await wish(fragile)
        except PowerCutError:
            await check_index(store)
            assert await wish(queue) == await wish(queue)
        else:
            assert dies_at > 2 and done is await wish(queue)
            assert sum((await check_index(store)).values()) == dies_at
            return
    pytest.fail("it never came to an end")


async def work(open_store: StoreFactory, clock: Clock, dice: random.Random, name: str, num_open: list[int]) -> None:
    """Work like a careless worker until no job is open: now and then die, or sleep until the lease is lost."""
    store, lives = await open_store(), 0
    while num_open[0]:
        lives += 1
        worker = make_worker(store, clock, f"{name}.{lives}")
        for claim in await worker.claim(4):
            try:
                saved = await worker.load_checkpoint(claim)
                for step in range(int(saved or 0) + 1, 4):
                    claim = await worker.save_checkpoint(claim, b"%d" % step, step)
                    if dice.random() < 0.05:
                        clock.now += LEASE_SECONDS + 1  # everyone's lease is over, this worker is dead
                        break
                    if dice.random() < 0.05:
                        await asyncio.sleep(0.01)
                    claim = await worker.heartbeat(claim)
                else:
                    prompt = Put(f"{{{claim.job.tenant}}}:prompt:{claim.job.id}", worker.owner.encode())
                    await store.transact(await worker.publication_checks(claim), [prompt])
                    await worker.finish(claim, result_of(claim.job))
                    num_open[0] -= 1
            except (LeaseLostError, ConflictError, CheckFailedError):
                continue  # another worker has it now
        await asyncio.sleep(0)


async def test_300_jobs_and_four_careless_workers(
    store: Store, open_store: StoreFactory, queue: JobQueue, clock: Clock
) -> None:
    """300 jobs of three tenants, drained by workers that die and oversleep, succeed exactly once each."""
    for tenant in ("a", "b", "c"):
        results = await queue.create_many(tenant, [JobRequest(await spec_of(queue, tenant))] * 100)
        assert len(results) == 100
    num_open, dice = [300], random.Random(7)
    async with asyncio.timeout(240):
        await asyncio.gather(*(work(open_store, clock, dice, f"w{i}", num_open) for i in range(4)))
    assert await check_index(store) == {JobState.SUCCEEDED: 300}
    for tenant in ("a", "b", "c"):
        jobs = await queue.list(tenant)
        for job in jobs[::10]:
            assert await ends_of(queue, tenant, job.id) == ["succeeded"]
            assert await store.get(f"{{{tenant}}}:prompt:{job.id}") is not None
        await collect_garbage(store, tenant, unused_for_seconds=0)
        assert await store.scan_blobs(tenant) == []


async def test_kill_9(memory_folder: Path) -> None:
    """A worker process killed at work is followed by another one, from the last step that the dead one called safe."""
    store = EmbeddedStore(memory_folder)
    await created(JobQueue(store, BASE, check=check_spec))
    reader, writer = os.pipe()
    workers = [_started(memory_folder, writer) for _ in range(2)]
    os.close(writer)
    try:
        with os.fdopen(reader) as lines:
            messages = _until(lines, lambda message: message["op"] == "saved" and message["step"] == 3)
            victim = messages[-1]["pid"]
            os.kill(victim, signal.SIGKILL)
            messages += _until(lines, lambda message: message["op"] == "finished")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait(60)
    safe = max(message["step"] for message in messages if message["op"] == "saved" and message["pid"] == victim)
    (claimed,) = [one for one in messages if one["op"] == "claimed" and one["pid"] != victim]
    assert claimed["first"] in (safe + 1, safe + 2)  # it may have died between being safe and saying so
    steps = [message["step"] for message in messages if message["op"] == "saved"]
    assert sorted(set(steps) | {claimed["first"] - 1}) == list(range(1, NUM_STEPS + 1))
    assert await check_index(store) == {JobState.SUCCEEDED: 1}
    await store.close()


def _started(folder: Path, stdout: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tests.jobs.worker_process", str(folder)], stdout=stdout, cwd=ROOT)


def _until(lines: Iterable[str], is_last: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Read what workers say, up to the message that is waited for."""
    messages: list[dict[str, Any]] = []
    for line in lines:
        messages.append(json.loads(line))
        if is_last(messages[-1]):
            return messages
    raise AssertionError(f"the workers ended early: {messages}")
