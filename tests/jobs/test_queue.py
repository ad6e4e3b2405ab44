"""The tenants' side of the queue."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from promptd_store import Store

from promptd.errors import ConflictError, NotFoundError, PromptdError, RateLimitError
from promptd.jobs import (
    JobError,
    JobEvent,
    JobLimits,
    JobProgress,
    JobQueue,
    JobRecord,
    JobRequest,
    JobSpec,
    JobState,
    TrainingFiles,
)
from tests.jobs.conftest import (
    METHOD,
    ROWS,
    Clock,
    StoreFactory,
    WrappedStore,
    check_index,
    created,
    make_queue,
    make_worker,
    result_of,
    spec_of,
)

pytestmark = pytest.mark.anyio


async def test_create_and_get(queue: JobQueue, files: TrainingFiles, clock: Clock) -> None:
    """A created job is queued, named after itself, and found under its id."""
    file = await files.create("acme", "train.jsonl", ROWS)
    job = await queue.create("acme", JobRequest(JobSpec(METHOD, training_file=file.id)))
    assert (job.state, job.created_at, job.attempts) == (JobState.QUEUED, clock.now, 0)
    assert job.id.startswith("ftjob-") and job.prompt_name == f"ft-{job.id}"
    assert await queue.get("acme", job.id) == job


async def test_jobs_belong_to_a_tenant(queue: JobQueue) -> None:
    """A foreign job looks exactly like one that never was, whatever is tried."""
    job = await created(queue)
    told = []
    for job_id in (job.id, "ftjob-none"):
        for ask in (queue.get, queue.cancel, queue.pause, queue.resume, queue.events):
            with pytest.raises(NotFoundError) as caught:
                await ask("eve", job_id)
            told.append(str(caught.value).replace(job_id, "ID"))
    assert len(set(told)) == 1
    assert await queue.list("eve") == []
    assert (await queue.get("acme", job.id)).state is JobState.QUEUED


async def test_list_is_newest_first_and_paged(queue: JobQueue, clock: Clock) -> None:
    """Jobs are listed by age, also those made in one call; a page goes on behind the last job of the one before."""
    spec = await spec_of(queue)
    jobs = []
    for _ in range(3):
        clock.now += 1
        jobs += await queue.create_many("acme", [JobRequest(spec)] * 2)
    ids = [job.id for job in jobs if isinstance(job, JobRecord)][::-1]
    assert [job.id for job in await queue.list("acme")] == ids
    assert [job.id for job in await queue.list("acme", after=ids[1], limit=3)] == ids[2:5]


@pytest.mark.parametrize(
    ("fields", "told", "param"),
    [
        ({"method": {"type": "magic"}, "rows_digest": "sha256:1"}, "method 'magic' is not known", "method"),
        ({"name": "no/slash"}, "prompt name 'no/slash' must be", "name"),
        ({}, "give either training_file or rows", "training_file"),
        ({"training_file": "file-1", "rows_digest": "sha256:1"}, "give either training_file or rows", "training_file"),
        ({"training_file": "file-1"}, "training_file: no file 'file-1'", "training_file"),
        (
            {"rows_digest": "sha256:1", "validation_file": "file-1"},
            "validation_file: no file 'file-1'",
            "validation_file",
        ),
    ],
)
async def test_bad_jobs_are_refused(
    store: Store, queue: JobQueue, fields: dict[str, object], told: str, param: str
) -> None:
    """A job that cannot run is refused with field and value, and leaves nothing behind."""
    with pytest.raises(Exception, match=told) as caught:
        await queue.create("acme", JobRequest(JobSpec(**{"method": METHOD, **fields})))  # type: ignore[arg-type]
    assert getattr(caught.value, "param", None) == param and getattr(caught.value, "status", 0) < 500
    assert await store.scan("{") == []


async def test_many_at_once_each_with_its_own_result(store: Store, queue: JobQueue) -> None:
    """In one call good jobs are created whatever is wrong with others, and results come in the order asked."""
    good = await spec_of(queue)
    bad = JobSpec({"type": "magic"}, rows_digest="sha256:1")
    results = await queue.create_many("acme", [JobRequest(one) for one in (good, bad, good, bad, good)])
    assert [isinstance(one, JobRecord) for one in results] == [True, False, True, False, True]
    assert await check_index(store) == {JobState.QUEUED: 3}
    assert await queue.create_many("acme", [JobRequest(bad)]) != [] and await queue.create_many("acme", []) == []


async def test_idempotency(queue: JobQueue, open_store: StoreFactory, clock: Clock) -> None:
    """The same key and wishes give the same job, for ever and from anywhere; other wishes are a conflict."""
    spec = await spec_of(queue)
    job = await queue.create("acme", JobRequest(spec, "k"))
    assert await queue.create("acme", JobRequest(spec, "k")) == job
    other = make_queue(await open_store(), clock)
    await other.cancel("acme", job.id)  # its rows are let go: the wishes are still known
    assert (await other.create("acme", JobRequest(spec, "k"))).id == job.id
    with pytest.raises(ConflictError, match="idempotency key 'k' has created another job"):
        await queue.create("acme", JobRequest(await spec_of(queue, name="tone"), "k"))
    assert (await queue.create("eve", JobRequest(await spec_of(queue, "eve"), "k"))).tenant == "eve"
    assert len(await queue.list("acme")) == 1


async def test_idempotency_within_and_across_calls(queue: JobQueue, open_store: StoreFactory, clock: Clock) -> None:
    """A key twice in one call is one job; concurrent calls with the same keys make each job once."""
    spec = await spec_of(queue)
    first, second = await queue.create_many("acme", [JobRequest(spec, "k")] * 2)
    assert first == second
    queues = [queue, make_queue(await open_store(), clock)]
    requests = [JobRequest(spec, f"many-{number}") for number in range(20)]
    results = await asyncio.gather(*(queues[i % 2].create_many("acme", requests) for i in range(6)))
    assert all(one == results[0] for one in results)
    assert len(await queue.list("acme")) == 21


async def test_cap_on_queued_jobs(store: Store, clock: Clock) -> None:
    """A call that does not fit under the cap creates none of its jobs; bad ones keep their own reason."""
    queue = make_queue(store, clock, limits=JobLimits(max_queued=3))
    spec, bad = await spec_of(queue), JobSpec({"type": "magic"})
    await queue.create_many("acme", [JobRequest(spec)] * 2)
    results = await queue.create_many("acme", [JobRequest(one) for one in (spec, bad, spec)])
    assert [type(one).__name__ for one in results] == ["RateLimitError", "InvalidRequestError", "RateLimitError"]
    assert "4 jobs would wait, at most 3 may" in str(results[0])
    job = await queue.create("acme", JobRequest(spec))
    with pytest.raises(RateLimitError):
        await queue.create("acme", JobRequest(spec))
    await queue.pause("acme", job.id)  # a paused job does not wait
    await queue.create("acme", JobRequest(spec))
    with pytest.raises(RateLimitError):
        await queue.resume("acme", job.id)
    assert (await queue.create("eve", JobRequest(await spec_of(queue, "eve")))).state is JobState.QUEUED
    assert await check_index(store) == {JobState.QUEUED: 4, JobState.PAUSED: 1}


async def test_cap_holds_under_concurrent_creates(store: Store, open_store: StoreFactory, clock: Clock) -> None:
    """However many callers create at once, exactly as many jobs as allowed are made."""
    queues = [make_queue(await open_store(), clock, limits=JobLimits(max_queued=5)) for _ in range(2)]
    spec = await spec_of(queues[0])
    results = await asyncio.gather(*(queues[i % 2].create_many("acme", [JobRequest(spec)]) for i in range(12)))
    assert sum(isinstance(one, JobRecord) for (one,) in results) == 5
    assert await check_index(store) == {JobState.QUEUED: 5}


CASES = [
    # job is             cancel        pause      resume
    ("queued", "cancelled", "paused", "queued"),
    ("running", "cancelling", "paused", "running"),
    ("paused", "cancelled", "paused", "queued"),
    ("cancelling", "cancelling", "conflict", "conflict"),
    ("cancelled", "cancelled", "conflict", "conflict"),
    ("succeeded", "conflict", "conflict", "conflict"),
    ("failed", "conflict", "conflict", "conflict"),
]


@pytest.mark.parametrize(("state", "cancel", "pause", "resume"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("what", ["cancel", "pause", "resume"])
async def test_every_wish_in_every_state(
    store: Store, queue: JobQueue, clock: Clock, what: str, state: str, cancel: str, pause: str, resume: str
) -> None:
    """Cancel, pause and resume do what the table says, twice the same, and never break the index."""
    expected = {"cancel": cancel, "pause": pause, "resume": resume}[what]
    job = await brought_to(store, queue, clock, JobState(state))
    wish: Callable[[str, str], Awaitable[JobRecord]] = getattr(queue, what)
    for _ in range(2):
        if expected == "conflict":
            with pytest.raises(ConflictError, match=f"is {state}"):
                await wish("acme", job.id)
        else:
            assert (await wish("acme", job.id)).state == expected
    final = state if expected == "conflict" else expected
    assert (await queue.get("acme", job.id)).state == final
    assert await check_index(store) == {JobState(final): 1}


async def brought_to(store: Store, queue: JobQueue, clock: Clock, state: JobState) -> JobRecord:
    """A job in a state that it got into honestly."""
    job = await created(queue)
    if state is JobState.QUEUED:
        return job
    if state is JobState.PAUSED:
        return await queue.pause("acme", job.id)
    if state is JobState.CANCELLED:
        return await queue.cancel("acme", job.id)
    worker = make_worker(store, clock)
    (claim,) = await worker.claim(1)
    if state is JobState.CANCELLING:
        await queue.cancel("acme", job.id)
    if state is JobState.SUCCEEDED:
        await worker.finish(claim, result_of(job))
    if state is JobState.FAILED:
        await worker.fail(claim, JobError("diverged", "the loss is not finite"))
    return await queue.get("acme", job.id)


async def test_events_tell_the_story(store: Store, queue: JobQueue, clock: Clock) -> None:
    """The log has every change of state, progress and messages; newest first, in pages."""
    job = await created(queue)
    worker = make_worker(store, clock)
    (claim,) = await worker.claim(1)
    await worker.report(claim, JobProgress(1, 10, loss=0.5), [JobEvent("a row was cut", "warn")])
    await worker.finish(claim, result_of(job))
    events = list(await queue.events("acme", job.id))
    assert [(event.kind, event.level) for event in events] == [
        ("state", "info"),
        ("metrics", "info"),
        ("message", "warn"),
        ("state", "info"),
        ("state", "info"),
    ]
    assert [event.data["state"] for event in events if event.kind == "state"] == ["succeeded", "running", "queued"]
    assert events[1].data["loss"] == 0.5 and events[1].message == "Step 1 of 10"
    assert events[0].created_at == clock.now and events[0].ends_job and not events[4].ends_job
    assert list(await queue.events("acme", job.id, before=events[1].seq, limit=2)) == events[2:4]
    assert (await queue.get("acme", job.id)).progress == JobProgress(1, 10, loss=0.5)


async def test_follow_does_not_miss_the_end(store: Store, queue: JobQueue, clock: Clock) -> None:
    """A job that ends at the moment when a follower looks at it ends the follower's stream."""
    job = await created(queue)
    worker = make_worker(store, clock)
    (claim,) = await worker.claim(1)

    class Ending(WrappedStore):
        async def read_tail(self, *args: Any, **kwargs: Any) -> Any:
            """Read after the job has ended."""
            await worker.finish(claim, result_of(job))
            return await self._store.read_tail(*args, **kwargs)

    async with asyncio.timeout(60):
        seen = [event async for event in make_queue(Ending(store), clock).follow("acme", job.id)]
    assert seen[-1].ends_job and len(seen) == 3


async def test_follow_ends_with_the_job(store: Store, queue: JobQueue, clock: Clock) -> None:
    """A follower gets past and new events once, in order, and its stream ends with the job; a late one too."""
    job = await created(queue)
    worker = make_worker(store, clock)
    (claim,) = await worker.claim(1)

    async def read(after: int | None = None) -> list[JobEvent]:
        return [event async for event in queue.follow("acme", job.id, after=after)]

    following = asyncio.create_task(read())
    for step in range(1, 4):
        await asyncio.sleep(0.005)
        await worker.report(claim, JobProgress(step, 3))
    await worker.finish(claim, result_of(job))
    async with asyncio.timeout(60):
        seen = await following
        assert seen == list(await queue.events("acme", job.id))[::-1] and len(seen) == 6
        assert await read() == seen
        assert await read(after=seen[2].seq) == seen[3:]
        assert await read(after=seen[-1].seq) == []
    with pytest.raises(PromptdError):
        await anext(queue.follow("eve", job.id))
