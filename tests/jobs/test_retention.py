"""What is forgotten, and what is not."""

from __future__ import annotations

import pytest
from promptd_store import Store, show_records

from promptd.errors import NotFoundError
from promptd.jobs import JobQueue, JobRequest
from promptd.jobs.retention import OldJobs, trim_signals
from tests.jobs.conftest import Clock, created, make_worker, result_of, spec_of

pytestmark = pytest.mark.anyio

DAY = 86400.0


async def forget(store: Store, clock: Clock) -> int:
    """Forget what ended a day ago and longer; return how many jobs."""
    old = OldJobs("acme", keep_seconds=DAY, clock=clock)
    await show_records(store, "acme", old.see)
    return await old.forget(store)


async def test_old_ended_jobs_are_forgotten(store: Store, queue: JobQueue, clock: Clock) -> None:
    """A job goes a while after its end, with log and idempotency key; open and young ones stay."""
    old = await queue.create("acme", JobRequest(await spec_of(queue), "key"))
    worker = make_worker(store, clock)
    (claim,) = await worker.claim(1)
    await worker.finish(claim, result_of(old))
    waiting = await created(queue)
    clock.now += DAY
    young = await created(queue)
    await queue.cancel("acme", young.id)
    assert await forget(store, clock) == 0
    clock.now += 1
    assert await forget(store, clock) == 1
    assert {job.id for job in await queue.list("acme")} == {waiting.id, young.id}
    with pytest.raises(NotFoundError):
        await queue.events("acme", old.id)
    assert await store.scan("{acme}:job-once:") == []
    assert {event.log.split(":")[-1] for event in await store.read_log("{acme}:job-events:")} == {waiting.id, young.id}
    again = await queue.create("acme", JobRequest(await spec_of(queue, name="other"), "key"))
    assert again.id != old.id


async def test_old_signals_are_trimmed(store: Store, queue: JobQueue, clock: Clock) -> None:
    """Signals go after an hour; newer ones and the jobs' own logs stay."""
    job = await created(queue)
    clock.now += 3601
    await queue.cancel("acme", job.id)
    assert await trim_signals(store, clock=clock) == 1
    assert len(await store.read_log("{public}:job-signals:")) == 1
    assert len(await queue.events("acme", job.id)) == 2
