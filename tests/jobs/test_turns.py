"""Who gets which job: fair between tenants, by priority within one, and nothing that kills its workers for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from promptd_store import Store

from promptd.jobs import (
    LEASE_SECONDS,
    MAX_ATTEMPTS,
    Claim,
    JobClaims,
    JobQueue,
    JobRequest,
    JobState,
)
from tests.jobs.conftest import (
    LIMITS,
    OTHER_BASE,
    Clock,
    StoreFactory,
    check_index,
    created,
    lost,
    make_queue,
    make_worker,
    result_of,
    spec_of,
)

pytestmark = pytest.mark.anyio


async def test_fair_between_tenants(store: Store, queue: JobQueue, clock: Clock) -> None:
    """Tenants take turns, whoever came first and with however many jobs; within a tenant the oldest is first."""
    names: list[str] = []
    for tenant, count in (("many", 5), ("few", 2), ("one", 1)):
        clock.now += 1
        spec = await spec_of(queue, tenant)
        await queue.create_many(tenant, [JobRequest(spec)] * count)
    worker = make_worker(store, clock)
    for _ in range(8):
        clock.now += 1
        (claim,) = await worker.claim(1)
        names.append(claim.job.tenant)
    assert names == ["many", "few", "one", "many", "few", "many", "many", "many"]
    assert [job.started_at for job in await queue.list("many")] == sorted(
        (job.started_at for job in await queue.list("many")), key=lambda at: -(at or 0)
    )


async def test_newcomers_starve_nobody(store: Store, queue: JobQueue, clock: Clock) -> None:
    """A tenant that waits is served even if a new one arrives before every single claim."""
    spec = await spec_of(queue)
    await queue.create_many("waiting", [JobRequest(spec)] * 2)
    worker = make_worker(store, clock)
    served = []
    for number in range(6):
        clock.now += 1
        await queue.create(f"new-{number}", JobRequest(spec))
        (claim,) = await worker.claim(1)
        served.append(claim.job.tenant)
    assert served == ["waiting", "new-0", "waiting", "new-1", "new-2", "new-3"]


async def test_one_claim_takes_from_all(store: Store, queue: JobQueue, clock: Clock) -> None:
    """A claim of many jobs goes round the tenants too."""
    for tenant in ("a", "b"):
        await queue.create_many(tenant, [JobRequest(await spec_of(queue, tenant))] * 4)
    assert [claim.job.tenant for claim in await make_worker(store, clock).claim(5)] == ["a", "b", "a", "b", "a"]


async def test_priority_within_a_tenant(store: Store, queue: JobQueue, clock: Clock) -> None:
    """Larger priorities go first, equal ones by age; another tenant's turn is not touched."""
    for priority in (0, 5, 9, 5):
        clock.now += 1
        await created(queue, priority=priority, name=f"p{priority}-{clock.now:.0f}")
    clock.now += 1
    await created(queue, "eve", name="eve")
    claims = await make_worker(store, clock).claim(9)
    assert [(claim.job.spec.name or "")[:3] for claim in claims] == ["p9-", "eve", "p5-", "p5-", "p0-"]
    assert claims[2].job.created_at < claims[3].job.created_at


async def test_cap_on_running_jobs(store: Store, open_store: StoreFactory, queue: JobQueue, clock: Clock) -> None:
    """No tenant runs more jobs than allowed, however many workers ask; ended jobs make room."""
    await queue.create_many("acme", [JobRequest(await spec_of(queue))] * 20)
    stores = [await open_store(), await open_store()]
    workers = [make_worker(stores[i % 2], clock, f"w{i}") for i in range(4)]
    claims = [claim for some in await asyncio.gather(*(one.claim(20) for one in workers)) for claim in some]
    assert len(claims) == LIMITS.max_running
    assert await workers[0].claim(20) == []
    owner = next(worker for worker in workers if worker.owner == claims[0].lease.owner)
    await owner.finish(claims[0], result_of(claims[0].job))
    assert len(await workers[0].claim(20)) == 1
    await check_index(store)


async def test_base_models_have_their_own_queues(store: Store, queue: JobQueue, clock: Clock) -> None:
    """A worker gets jobs of its own base model only; tenants see all of theirs from everywhere."""
    mine = await created(queue)
    other_queue = make_queue(store, clock, OTHER_BASE)
    other = await created(other_queue)
    (claim,) = await make_worker(store, clock, "w1").claim(9)
    assert claim.job.id == mine.id
    (claim,) = await make_worker(store, clock, "w2", OTHER_BASE).claim(9)
    assert claim.job.id == other.id
    assert (await queue.cancel("acme", other.id)).state is JobState.CANCELLING
    assert {job.id for job in await queue.list("acme")} == {mine.id, other.id}


async def test_poison(store: Store, queue: JobQueue, clock: Clock) -> None:
    """A job that takes down every worker fails after five attempts, with its reason; others go on."""
    job = await created(queue)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        claim = await lost(clock, make_worker(store, clock, f"w{attempt}"))
        assert claim.job.attempts == attempt
    healthy = await created(queue)
    (claim,) = await make_worker(store, clock, "next").claim(9)
    assert claim.job.id == healthy.id
    failed = await queue.get("acme", job.id)
    assert failed.state is JobState.FAILED and failed.error is not None and failed.error.code == "poison"
    assert "5 times in a row" in failed.error.message and (await queue.events("acme", job.id))[0].ends_job
    await check_index(store)


async def test_poison_takes_nobody_along(store: Store, queue: JobQueue, clock: Clock) -> None:
    """Jobs that share their worker with one that takes it down before anything is saved all end well, but that one.

    The control: the same workers without quarantine lose all of them.
    """

    async def lives(claims_of: Callable[[JobClaims, list[Claim]], Awaitable[list[Claim]]], tenant: str) -> list[str]:
        poison, *healthy = [await created(queue, tenant) for _ in range(4)]
        for life in range(40):
            worker, running = make_worker(store, clock, f"{tenant}-{life}"), list[Claim]()
            while claims := await claims_of(worker, running):
                if poison.id in {claim.job.id for claim in claims}:
                    break  # it dies before it saves anything
                running += [await worker.save_checkpoint(one, b"%d" % life, life + 1) for one in claims]
            else:
                for claim in running:
                    await worker.finish(claim, result_of(claim.job))
            clock.now += LEASE_SECONDS + 1
        assert (await queue.get(tenant, poison.id)).state is JobState.FAILED
        return [(await queue.get(tenant, job.id)).state.value for job in healthy]

    assert await lives(lambda worker, running: worker.claim(9, running), "a") == ["succeeded"] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("promptd.jobs.claims.MAX_SHARED_ATTEMPTS", MAX_ATTEMPTS)
        assert await lives(lambda worker, running: worker.claim(9, running), "c") == ["failed"] * 3


async def test_getting_on_is_no_poison(store: Store, queue: JobQueue, clock: Clock) -> None:
    """A job may be interrupted any number of times as long as each time it got further; standing still counts."""
    await created(queue)
    for step in range(1, 9):
        worker = make_worker(store, clock, f"w{step}")
        (claim,) = await worker.claim(1)
        claim = await worker.save_checkpoint(claim, b"%d" % step, step)
        assert claim.job.attempts == 0
        clock.now += LEASE_SECONDS + 1
    for attempt in range(1, MAX_ATTEMPTS + 1):
        (claim,) = await worker.claim(1)
        claim = await worker.save_checkpoint(claim, b"again", 8)
        assert claim.job.attempts == attempt
        clock.now += LEASE_SECONDS + 1
    assert await worker.claim(1) == []
