"""The workers' side of the queue: one worker has a job, and who has lost it writes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from promptd_store import CheckFailedError, LeaseLostError, Put, Store
from promptd_store.names import ERASED

from promptd.errors import ConflictError, NotFoundError
from promptd.jobs import (
    LEASE_SECONDS,
    MAX_ATTEMPTS,
    Claim,
    JobClaims,
    JobError,
    JobProgress,
    JobQueue,
    JobRef,
    JobRequest,
    JobSpec,
    JobState,
    TrainingFiles,
)
from tests.jobs.conftest import (
    METHOD,
    OTHER_BASE,
    ROWS,
    Clock,
    StoreFactory,
    UnfencedStore,
    check_index,
    created,
    lost,
    make_queue,
    make_worker,
    result_of,
    spec_of,
)

pytestmark = pytest.mark.anyio


async def test_two_workers_never_own_one_job(queue: JobQueue, open_store: StoreFactory, clock: Clock) -> None:
    """However many workers claim at once, every job has one owner."""
    spec = await spec_of(queue)
    for tenant in ("acme", "eve"):
        await queue.create_many(tenant, [JobRequest(spec)] * 8)
    stores = [await open_store(), await open_store()]
    workers = [make_worker(stores[i % 2], clock, f"w{i}") for i in range(6)]
    claims = await asyncio.gather(*(worker.claim(16) for worker in workers))
    owned = [claim.job.id for some in claims for claim in some]
    assert len(owned) == len(set(owned))
    late = await make_worker(stores[0], clock, "late").claim(16)  # takes what claims in flight stepped over
    assert len(owned) + len(late) == 16
    assert await check_index(stores[0]) == {JobState.RUNNING: 16}


async def test_lost_job_is_claimed_again(store: Store, queue: JobQueue, clock: Clock) -> None:
    """A silent worker's job goes to the next one, with its checkpoint; a heartbeat in time keeps it."""
    job = await created(queue)
    one, two = make_worker(store, clock, "w1"), make_worker(store, clock, "w2")
    (claim,) = await one.claim(1)
    claim = await one.save_checkpoint(claim, b"at step 3", 3)
    clock.now += LEASE_SECONDS - 1
    claim = await one.heartbeat(claim)
    clock.now += LEASE_SECONDS - 1
    assert await two.claim(1) == []
    clock.now += 2
    (again,) = await two.claim(1)
    assert again.job.id == job.id and again.lease.epoch > claim.lease.epoch
    assert await two.load_checkpoint(again) == b"at step 3"
    assert (again.job.attempts, again.job.started_at) == (1, claim.job.started_at)


async def test_an_erased_tenant_keeps_no_worker_from_others(store: Store, queue: JobQueue, clock: Clock) -> None:
    """Its server died between the tombstone and the queue: its jobs, waiting or left by a worker, are passed over."""
    await created(queue)
    await lost(clock, make_worker(store, clock, "lost"))
    await created(queue)
    other = await created(queue, "eve")
    await store.transact(puts=[Put(ERASED + "acme", b"{}")])
    assert [claim.job.id for claim in await make_worker(store, clock).claim(8)] == [other.id]


ZOMBIE_WRITES: dict[str, Callable[[JobClaims, Claim], Awaitable[Any]]] = {
    "save_checkpoint": lambda worker, claim: worker.save_checkpoint(claim, b"old", 9),
    "report": lambda worker, claim: worker.report(claim, JobProgress(9, 10)),
    "finish": lambda worker, claim: worker.finish(claim, result_of(claim.job)),
    "fail": lambda worker, claim: worker.fail(claim, JobError("x", "y")),
    "release": lambda worker, claim: worker.release(claim),
}


@pytest.mark.parametrize("write", ZOMBIE_WRITES.values(), ids=ZOMBIE_WRITES)
async def test_zombies_write_nothing(
    store: Store, queue: JobQueue, clock: Clock, write: Callable[[JobClaims, Claim], Awaitable[Any]]
) -> None:
    """A worker that wakes after its job was given to another changes nothing, and cannot extend its lease."""
    job = await created(queue)
    zombie, owner = make_worker(store, clock, "zombie"), make_worker(store, clock, "owner")
    stale = await lost(clock, zombie)
    (claim,) = await owner.claim(1)
    before = await store.scan("{"), await queue.events("acme", job.id)
    with pytest.raises(LeaseLostError):
        await write(zombie, stale)
    with pytest.raises(LeaseLostError):
        await zombie.heartbeat(stale)
    assert (await store.scan("{"), await queue.events("acme", job.id)) == before
    assert (await owner.heartbeat(claim)).job.state is JobState.RUNNING


@pytest.mark.parametrize("write", ZOMBIE_WRITES.values(), ids=ZOMBIE_WRITES)
async def test_control_without_the_lease_zombies_write(
    store: Store, queue: JobQueue, clock: Clock, write: Callable[[JobClaims, Claim], Awaitable[Any]]
) -> None:
    """The same writes go through where the store does not look at leases: it is the lease that stops them."""
    await created(queue)
    zombie = make_worker(UnfencedStore(store), clock, "zombie")
    stale = await lost(clock, zombie)
    await make_worker(store, clock, "owner").claim(1)
    before = await store.scan("{")
    await write(zombie, stale)
    assert await store.scan("{") != before


async def test_zombies_cannot_publish(store: Store, queue: JobQueue, clock: Clock) -> None:
    """The checks for a publication hold for the owner of a running job, and for nobody and nothing else."""
    job = await created(queue)
    zombie, owner = make_worker(store, clock, "zombie"), make_worker(store, clock, "owner")
    stale = await lost(clock, zombie)
    (claim,) = await owner.claim(1)
    with pytest.raises(LeaseLostError):
        await store.transact(await zombie.publication_checks(stale), [Put("{acme}:prompt:tone", b"stale")])
    await store.transact(await owner.publication_checks(claim), [Put("{acme}:prompt:tone", b"new")])
    checks = await owner.publication_checks(claim)
    await queue.pause("acme", job.id)
    with pytest.raises(CheckFailedError):
        await store.transact(checks, [Put("{acme}:prompt:tone", b"paused")])
    with pytest.raises(ConflictError, match="is paused"):
        await owner.publication_checks(claim)


async def test_checkpoints_replace_each_other(store: Store, queue: JobQueue, clock: Clock) -> None:
    """Only the last checkpoint is kept; equal ones of two jobs do not share a fate; the end leaves none."""
    await created(queue)
    await created(queue)
    worker = make_worker(store, clock)
    one, two = await worker.claim(2)
    rows = {one.job.spec.rows_digest}
    for step in range(1, 4):
        one = await worker.save_checkpoint(one, b"same %d" % step, step)
        two = await worker.save_checkpoint(two, b"same 1", 1)
        assert len(await store.scan_blobs("acme")) == 3
    assert await worker.load_checkpoint(one) == b"same 3" and await worker.load_checkpoint(two) == b"same 1"
    await worker.finish(one, result_of(one.job))
    assert await worker.load_checkpoint(two) == b"same 1"
    await worker.fail(two, JobError("x", "y"))
    assert {blob.digest for blob in await store.scan_blobs("acme")} == rows


async def test_unreadable_checkpoint(store: Store, queue: JobQueue, clock: Clock) -> None:
    """Where the disk has lost a checkpoint the job starts over, and its log says so."""
    job = await created(queue)
    worker = make_worker(store, clock)
    (claim,) = await worker.claim(1)
    assert await worker.load_checkpoint(claim) is None
    claim = await worker.save_checkpoint(claim, b"state", 4)
    assert claim.job.checkpoint is not None
    await store.delete_blob("acme", claim.job.checkpoint.digest)
    assert await worker.load_checkpoint(claim) is None
    event = (await queue.events("acme", job.id))[0]
    assert (event.level, event.message) == ("warn", "The checkpoint of step 4 is not readable; training starts over")


async def test_release_gives_the_job_back(store: Store, queue: JobQueue, clock: Clock) -> None:
    """A worker that shuts down gives its job back at once; that is no attempt."""
    job = await created(queue)
    one, two = make_worker(store, clock, "w1"), make_worker(store, clock, "w2")
    for _ in range(MAX_ATTEMPTS + 2):
        (claim,) = await one.claim(1)
        assert (await one.release(claim)).state is JobState.QUEUED
    (claim,) = await two.claim(1)
    assert (claim.job.id, claim.job.attempts) == (job.id, 1)
    assert await check_index(store) == {JobState.RUNNING: 1}


async def test_cancel_of_a_running_job(store: Store, queue: JobQueue, clock: Clock) -> None:
    """The worker sees `cancelling` with its next heartbeat and ends the job by letting go of it."""
    job = await created(queue)
    worker = make_worker(store, clock)
    (claim,) = await worker.claim(1)
    assert (await queue.cancel("acme", job.id)).state is JobState.CANCELLING
    assert (await worker.heartbeat(claim)).job.state is JobState.CANCELLING
    cancelled = await worker.release(claim)
    assert (cancelled.state, cancelled.finished_at) == (JobState.CANCELLED, clock.now)
    with pytest.raises(ConflictError, match="is cancelled"):
        await worker.report(claim, JobProgress(1, 2))
    assert await check_index(store) == {JobState.CANCELLED: 1}


async def test_cancelling_ends_without_its_worker(store: Store, queue: JobQueue, clock: Clock) -> None:
    """A job whose worker died while it was to be cancelled is cancelled by the next worker that looks."""
    job = await created(queue)
    await make_worker(store, clock, "w1").claim(1)
    await queue.cancel("acme", job.id)
    assert await make_worker(store, clock, "w2").claim(1) == []
    assert (await queue.get("acme", job.id)).state is JobState.CANCELLING
    clock.now += LEASE_SECONDS + 1
    assert await make_worker(store, clock, "w2").claim(1) == []
    assert await check_index(store) == {JobState.CANCELLED: 1}


async def test_pause_of_a_running_job(store: Store, queue: JobQueue, clock: Clock) -> None:
    """A paused job's worker can still save what it has; after a resume the next worker continues from there."""
    job = await created(queue)
    worker = make_worker(store, clock)
    (claim,) = await worker.claim(1)
    assert (await queue.pause("acme", job.id)).state is JobState.PAUSED
    claim = await worker.heartbeat(claim)
    assert claim.job.state is JobState.PAUSED
    await worker.save_checkpoint(claim, b"half way", 5)
    assert (await worker.release(claim)).state is JobState.PAUSED
    assert await worker.claim(1) == []
    await queue.resume("acme", job.id)
    (again,) = await worker.claim(1)
    assert await worker.load_checkpoint(again) == b"half way" and again.job.attempts == 1


async def test_resumed_before_its_worker_noticed(store: Store, queue: JobQueue, clock: Clock) -> None:
    """A job that was paused and resumed at once stays with its worker until that lets go; nobody else gets it."""
    job = await created(queue)
    one, two = make_worker(store, clock, "w1"), make_worker(store, clock, "w2")
    (claim,) = await one.claim(1)
    await queue.pause("acme", job.id)
    await queue.resume("acme", job.id)
    assert await two.claim(1) == []
    assert (await one.release(claim)).state is JobState.QUEUED
    (again,) = await two.claim(1)
    assert again.job.attempts == 1


@pytest.mark.parametrize("wishes", [("pause",), ("cancel",), ("pause", "resume")])
async def test_published_is_succeeded(store: Store, queue: JobQueue, clock: Clock, wishes: tuple[str, ...]) -> None:
    """A wish that comes after the publication and before the end finds a job that has succeeded."""
    job = await created(queue)
    worker = make_worker(store, clock)
    (claim,) = await worker.claim(1)
    for wish in wishes:
        await getattr(queue, wish)("acme", job.id)
    finished = await worker.finish(claim, result_of(job))
    assert (finished.state, finished.result) == (JobState.SUCCEEDED, result_of(job))
    assert await worker.claim(1) == []
    assert await check_index(store) == {JobState.SUCCEEDED: 1}


async def test_data(store: Store, queue: JobQueue, files: TrainingFiles, clock: Clock) -> None:
    """A worker gets the rows of files and those that came with the job; a deleted file is a reason to fail."""
    train, valid = [await files.create("acme", name, ROWS + name.encode()) for name in ("train", "valid")]
    await queue.create("acme", JobRequest(JobSpec(METHOD, training_file=train.id, validation_file=valid.id)))
    clock.now += 1
    await created(queue)
    worker = make_worker(store, clock)
    one, two = await worker.claim(2)
    data = await worker.data(one)
    assert (data.training, data.validation) == (ROWS + b"train", ROWS + b"valid")
    data = await worker.data(two)
    assert (data.training, data.validation) == (ROWS, None)
    for file, param in ((valid, "validation_file"), (train, "training_file")):
        await files.delete("acme", file.id)
        with pytest.raises(NotFoundError, match=f"{param} '{file.id}' was deleted"):
            await worker.data(one)


async def test_signals(store: Store, queue: JobQueue, clock: Clock) -> None:
    """Workers hear of every change of state on their queue, and of no other."""
    worker = make_worker(store, clock)
    subscription = await store.subscribe(worker.signals_log)
    await created(make_queue(store, clock, OTHER_BASE))
    job = await created(queue)
    (claim,) = await worker.claim(1)
    await worker.report(claim, JobProgress(1, 2))
    await queue.cancel("acme", job.id)
    async with asyncio.timeout(60):
        heard = [JobRef.from_bytes((await anext(subscription)).payload) for _ in range(3)]
    assert heard == [JobRef("acme", job.id, JobState(state)) for state in ("queued", "running", "cancelling")]
    await subscription.aclose()


async def test_a_claim_looks_at_open_jobs_only(store: Store, queue: JobQueue, clock: Clock) -> None:
    """Ended and paused jobs leave nothing in the index, so that looking for work does not cost the past."""
    worker = make_worker(store, clock)
    for _ in range(3):
        await created(queue)
        (claim,) = await worker.claim(1)
        await worker.finish(claim, result_of(claim.job))
    paused = await created(queue)
    await queue.pause("acme", paused.id)
    assert await store.scan("{public}:job-") == []
