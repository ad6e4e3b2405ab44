"""A store on a clock that stands still, a queue, and workers on demand."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from promptd_store import EmbeddedStore, Lease, Store

from promptd.errors import InvalidRequestError
from promptd.jobs import (
    LEASE_SECONDS,
    Claim,
    JobClaims,
    JobLimits,
    JobQueue,
    JobRecord,
    JobRequest,
    JobResult,
    JobSpec,
    JobState,
    TrainingFiles,
)

BASE = "sha256:" + "0123456789abcdef" * 4
OTHER_BASE = "sha256:" + "f" * 64
METHOD = {"type": "residual"}
ROWS = b'{"prompt": "1 + 1 =", "completion": "2"}\n'
LIMITS = JobLimits(max_queued=400, max_running=8)


class Clock:
    """Time that moves when a test says so."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        """Return seconds since 1970."""
        return self.now


class WrappedStore:
    """A store in front of another one; subclasses change single calls."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class UnfencedStore(WrappedStore):
    """The control of the fencing tests: leases are not looked at when something is written."""

    async def transact(self, checks: Sequence[Any] = (), *rest: Any) -> dict[str, str]:
        """Write without the leases among the checks."""
        return await self._store.transact([one for one in checks if not isinstance(one, Lease)], *rest)


class PowerCutError(BaseException):
    """The process is gone; nothing in it may catch this."""


class FragileStore(WrappedStore):
    """A store whose process dies at its n-th call: before the call has an effect, or right after it."""

    def __init__(self, store: Store, dies_at: int, *, after: bool) -> None:
        super().__init__(store)
        self.num_calls = 0
        self._dies_at = dies_at
        self._after = after

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            self.num_calls += 1
            if self.num_calls > self._dies_at or (self.num_calls == self._dies_at and not self._after):
                raise PowerCutError
            result = await method(*args, **kwargs)
            if self.num_calls == self._dies_at:
                raise PowerCutError
            return result

        return call


@pytest.fixture
def clock() -> Clock:
    """The time of leases and records."""
    return Clock()


StoreFactory = Callable[[], Awaitable[Store]]


@pytest.fixture
async def open_store(memory_folder: Path, clock: Clock) -> AsyncIterator[StoreFactory]:
    """A function that opens the same store once more, as another process would."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_one() -> Store:
            store = EmbeddedStore(memory_folder, poll_seconds=0.01, clock=clock)
            stack.push_async_callback(store.close)
            return store

        yield open_one


@pytest.fixture
async def store(open_store: StoreFactory) -> Store:
    """One open store."""
    return await open_store()


def make_queue(store: Any, clock: Clock, base: str = BASE, limits: JobLimits = LIMITS) -> JobQueue:
    """A queue whose trainer takes nothing but residual tuning."""
    return JobQueue(store, base, check=check_spec, limits=limits, clock=clock)


def make_worker(store: Any, clock: Clock, owner: str = "w1", base: str = BASE) -> JobClaims:
    """A worker."""
    return JobClaims(store, base, owner, limits=LIMITS, clock=clock)


async def lost(clock: Clock, worker: JobClaims) -> Claim:
    """A claim whose worker was silent for too long."""
    (claim,) = await worker.claim(1)
    clock.now += LEASE_SECONDS + 1
    return claim


def check_spec(spec: JobSpec) -> None:
    """Stand in for the trainer's checks."""
    if spec.method["type"] != "residual":
        raise InvalidRequestError(f"method {spec.method['type']!r} is not known", param="method")


@pytest.fixture
def queue(store: Store, clock: Clock) -> JobQueue:
    """The tenants' side."""
    return make_queue(store, clock)


@pytest.fixture
def files(store: Store, clock: Clock) -> TrainingFiles:
    """The tenants' files."""
    return TrainingFiles(store, clock=clock)


async def spec_of(queue: JobQueue, tenant: str = "acme", **fields: Any) -> JobSpec:
    """A job with rows of its own."""
    return JobSpec(METHOD, rows_digest=await queue.put_rows(tenant, ROWS), **fields)


async def created(queue: JobQueue, tenant: str = "acme", **fields: Any) -> JobRecord:
    """A queued job."""
    return await queue.create(tenant, JobRequest(await spec_of(queue, tenant, **fields)))


def result_of(job: JobRecord) -> JobResult:
    """What a job came to."""
    version = "sha256:" + "f" * 64
    return JobResult(job.prompt_name, version, 1, 10, 0, version, {"accuracy": 0.5}, {"accuracy": 0.9})


async def check_index(store: Store) -> Counter[JobState]:
    """The queue index and the tallies say what the records say; return how many jobs are in each state."""
    jobs = [JobRecord.from_bytes(one.value) for one in await store.scan("{") if ":job:" in one.key]
    index = {kind: await store.scan("{public}:job-" + kind) for kind in ("waiting", "active", "tally")}
    for kind, states in (("waiting", ("queued",)), ("active", ("running", "cancelling"))):
        expected = sorted((job.tenant, job.id, job.state.value) for job in jobs if job.state in states)
        entries = [json.loads(one.value) for one in index[kind]]
        assert sorted((one["tenant"], one["id"], one["state"]) for one in entries) == expected
    tallies = {one["tenant"]: (one["num_queued"], one["num_running"]) for one in map(_json, index["tally"])}
    counts: dict[str, list[int]] = {}
    for job in jobs:
        place = {"queued": 0, "running": 1, "cancelling": 1}.get(job.state)
        if place is not None:
            counts.setdefault(job.tenant, [0, 0])[place] += 1
    assert tallies == {tenant: tuple(pair) for tenant, pair in counts.items()}
    return Counter(job.state for job in jobs)


def _json(record: Any) -> Any:
    return json.loads(record.value)
