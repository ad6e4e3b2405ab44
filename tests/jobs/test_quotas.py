"""Quotas of jobs, their steps and bytes; tokens of training in the ledger. What is counted equals what is there."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from promptd_store import STORED_BYTES, LimitReachedError, Put, Store, number_held, quota_key, show_records

from promptd.errors import NotFoundError, RateLimitError
from promptd.jobs import (
    TRAINING_JOBS,
    TRAINING_STEPS,
    JobClaims,
    JobProgress,
    JobQueue,
    JobRequest,
    JobsHeld,
    TrainingFiles,
    steps_of,
)
from promptd.tenancy import UsageLedger
from tests.jobs.conftest import ROWS, Clock, StoreFactory, created, make_queue, make_worker, result_of, spec_of

pytestmark = pytest.mark.anyio
DAY = "2027-01-15"
"""Of the clock."""


async def check_counts(store: Store) -> None:
    """The counts are what the records say."""
    jobs = JobsHeld("acme")
    await show_records(store, "acme", jobs.see)
    for what in (TRAINING_JOBS, STORED_BYTES):
        assert await number_held(store, "acme", what) == jobs.held[what]


async def with_rows(queue: JobQueue, num_steps: int = 0) -> JobRequest:
    """A job with rows that count."""
    return JobRequest(await spec_of(queue, rows_bytes=len(ROWS), num_steps=num_steps), key_id="k1")


async def test_counts_over_a_jobs_life(store: Store, queue: JobQueue, files: TrainingFiles, clock: Clock) -> None:
    """Rows and checkpoints while it is open, nothing after; files until they are deleted."""
    file = await files.create("acme", "a.jsonl", ROWS)
    await check_counts(store)
    for end in ("finish", "cancel", "release"):
        job = await queue.create("acme", await with_rows(queue))
        await check_counts(store)
        worker = make_worker(store, clock, f"worker-{end}")
        (claim,) = await worker.claim(1)
        for size in (100, 300):
            claim = await worker.save_checkpoint(claim, bytes(size), size)
            await check_counts(store)
        assert await number_held(store, "acme", STORED_BYTES) == 2 * len(ROWS) + 300
        if end == "cancel":
            await queue.cancel("acme", job.id)
            await worker.release(claim)
        elif end == "finish":
            await worker.finish(claim, result_of(job))
        else:
            await queue.pause("acme", job.id)
            await worker.release(claim)
            await check_counts(store)
            await queue.cancel("acme", job.id)
        await check_counts(store)
        assert await number_held(store, "acme", TRAINING_JOBS) == 0
    await files.delete("acme", file.id)
    with pytest.raises(NotFoundError):
        await files.delete("acme", file.id)
    assert await number_held(store, "acme", STORED_BYTES) == 0


async def test_a_quota_of_jobs(store: Store, queue: JobQueue) -> None:
    """All of a call or none; free again when one ends; asking again later helps, and the answer says so."""
    await store.transact(puts=[Put(quota_key("acme", TRAINING_JOBS), b"3")])
    jobs = [await created(queue) for _ in range(2)]
    results = await queue.create_many("acme", [await with_rows(queue) for _ in range(2)])
    refused = results[0]
    assert isinstance(refused, RateLimitError) and refused is results[1]
    assert (refused.code, refused.retry_after_seconds, refused.retryable) == ("too_many_training_jobs", 30, True)
    await queue.pause("acme", jobs[0].id)  # paused ones have not ended
    await created(queue)
    with pytest.raises(RateLimitError):
        await created(queue)
    await queue.cancel("acme", jobs[0].id)
    await created(queue)
    await created(queue, "eve")


async def test_a_burst_of_jobs_over_two_servers(open_store: StoreFactory, clock: Clock) -> None:
    """Of 60 at once exactly ten; the control, another tenant without a quota, gets all."""
    queues = [make_queue(await open_store(), clock) for _ in range(2)]
    store = await open_store()
    await store.transact(puts=[Put(quota_key("acme", TRAINING_JOBS), b"10")])

    async def burst(tenant: str, count: int) -> int:
        async def create(number: int) -> bool:
            try:
                await created(queues[number % 2], tenant)
            except RateLimitError:
                return False
            return True

        return sum(await asyncio.gather(*map(create, range(count))))

    assert await burst("acme", 60) == 10
    assert len(await queues[0].list("acme")) == 10
    assert await burst("eve", 20) == 20


async def test_rows_and_files_need_room(store: Store, queue: JobQueue, files: TrainingFiles) -> None:
    """Refused before a byte is written."""
    await store.transact(puts=[Put(quota_key("acme", STORED_BYTES), b"%d" % (len(ROWS) + 1))])
    await files.create("acme", "a.jsonl", ROWS)
    with pytest.raises(LimitReachedError):
        await files.create("acme", "b.jsonl", ROWS + b'{"text": "x"}\n')
    with pytest.raises(LimitReachedError):
        await queue.put_rows("acme", ROWS)
    assert len(await store.scan_blobs("acme")) == 1


async def test_steps_of_a_day(store: Store, queue: JobQueue, clock: Clock) -> None:
    """Reserved when a job is made; what it did not take is there again; the next day begins anew."""
    await store.transact(puts=[Put(quota_key("acme", TRAINING_STEPS), b"1000")])
    assert steps_of(DAY) == f"training_steps:{DAY}"
    first = await queue.create("acme", await with_rows(queue, 600))
    with pytest.raises(LimitReachedError) as refused:
        await queue.create("acme", await with_rows(queue, 600))
    assert refused.value.param == TRAINING_STEPS
    worker: JobClaims = make_worker(store, clock)
    (claim,) = await worker.claim(1)
    claim = await worker.report(claim, JobProgress(250, 600, 5000))
    await worker.finish(claim, result_of(first))
    assert await number_held(store, "acme", steps_of(DAY)) == 250
    second = await queue.create("acme", await with_rows(queue, 750))
    clock.now += 86400
    await queue.create("acme", await with_rows(queue, 1000))
    await queue.cancel("acme", second.id)  # yesterday's are gone with their day
    assert await number_held(store, "acme", steps_of(DAY)) == 1000


async def test_trained_tokens_are_in_the_ledger(store: Store, queue: JobQueue, clock: Clock) -> None:
    """By day, key and prompt, equal to what the jobs say, whatever was reported twice or began again."""
    worker = make_worker(store, clock)
    job = await queue.create("acme", await with_rows(queue))
    (claim,) = await worker.claim(1)
    for step in (1, 2, 3, 2, 3):  # goes back to a checkpoint once
        claim = await worker.report(claim, JobProgress(step, 9, 100 * step))
    clock.now += 86400
    claim = await worker.report(claim, JobProgress(9, 9, 900))
    await worker.finish(claim, result_of(job))
    found = await UsageLedger(store, "s1", clock).read("acme", DAY, "2027-01-16")
    counts = [(key.day, key.key_id, key.prompt, one.training_tokens) for key, one in found]
    assert counts == [(DAY, "k1", job.prompt_name, 300), ("2027-01-16", "k1", job.prompt_name, 600)]
    assert replace(job.spec).num_steps == 0
