"""How jobs lie in the store: every step is one atomic transaction over record, queue index, tally and log.

A queued job has a `waiting` entry, a running or cancelling one an `active` entry; ended and paused jobs have none, so
that looking for work costs what is open, however many jobs there ever were. A tally per tenant keeps the caps exact
and says who was served last.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from promptd_store import Append, Check, CheckFailedError, Lease, LimitReachedError, Put, Store, StoreUnavailableError
from promptd_store.schema import read_fields, stamped

from promptd.errors import NotFoundError, RateLimitError
from promptd.jobs.events import JobEvent
from promptd.jobs.holdings import TRAINING_JOBS, holds
from promptd.jobs.keys import (
    active_key,
    job_key,
    job_log,
    microseconds,
    once_key,
    signals_log,
    tally_key,
    waiting_key,
)
from promptd.jobs.record import MAX_PRIORITY, JobRecord, JobState

MAX_TRIES = 100
RETRY_SECONDS = 30
"""When a tenant whose jobs fill its quota may ask again."""

_ACTIVE = (JobState.RUNNING, JobState.CANCELLING)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class JobLimits:
    """What each tenant may have at a time on one base model."""

    max_queued: int = 10_000
    max_running: int = 64


@dataclass(frozen=True, slots=True)
class StoredJob:
    """A job as read."""

    job: JobRecord
    etag: str


@dataclass(frozen=True, slots=True)
class JobRef:
    """An entry of the queue index, and the payload of a signal."""

    tenant: str
    id: str
    state: JobState

    def to_bytes(self) -> bytes:
        """Write an entry."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> JobRef:
        """Read what `to_bytes` wrote."""
        plain = json.loads(data)
        return cls(plain["tenant"], plain["id"], JobState(plain["state"]))


@dataclass(frozen=True, slots=True)
class Tally:
    """A tenant's open jobs; the record is gone where there are none."""

    tenant: str
    served_at: float
    """When a worker last took one of its jobs, or when it came with the first."""
    num_queued: int = 0
    num_running: int = 0
    unknown: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What a newer release has written down here; it is left as it is."""

    def counted(self, state: JobState, change: int) -> Tally:
        """Return the tally with so many more jobs in a state."""
        if state is JobState.QUEUED:
            return replace(self, num_queued=self.num_queued + change)
        if state in _ACTIVE:
            return replace(self, num_running=self.num_running + change)
        return self

    def to_bytes(self) -> bytes:
        """Write the record."""
        plain = asdict(self)
        return json.dumps(stamped(plain, plain.pop("unknown"))).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Tally:
        """Read what `to_bytes` wrote."""
        return cls(**read_fields(cls, data))


class JobLedger:
    """Reads and moves jobs. Which moves are made is the business of the queue and of the claims."""

    def __init__(self, store: Store, limits: JobLimits, clock: Callable[[], float]) -> None:
        self.store = store
        self.limits = limits
        self.clock = clock

    async def read(self, tenant: str, job_id: str) -> StoredJob:
        """Read a job; raises `NotFoundError`."""
        stored = await self.store.get(job_key(tenant, job_id))
        if stored is None:
            raise NotFoundError(f"no job {job_id[:80]!r}", param="job_id", code="job_not_found")
        return StoredJob(JobRecord.from_bytes(stored.value), stored.etag)

    async def add(self, jobs: Sequence[JobRecord], event: JobEvent, also: Sequence[Check] = ()) -> None:
        """Store new jobs of one tenant and base model, all or none, as long as the cap has room for all."""
        checks: list[Check | Lease] = list(also)
        puts, appends = [], []
        for job in jobs:
            key = job_key(job.tenant, job.id)
            checks.append(Check(key, None))
            puts += [Put(key, job.to_bytes()), Put(_entry_key(job) or "", ref_of(job))]
            if job.idempotency_key is not None:
                once = once_key(job.tenant, job.idempotency_key)
                checks.append(Check(once, None))
                puts.append(Put(once, job.id.encode()))
            appends += [Append(job_log(job.tenant, job.id), event.to_bytes()), _signal(job)]
        before, etag = await self.tally(jobs[0].base_fingerprint, jobs[0].tenant)
        after = before.counted(JobState.QUEUED, len(jobs))
        self._check_caps(before, after, is_worker=False)
        key = tally_key(jobs[0].base_fingerprint, jobs[0].tenant)
        checks.append(Check(key, etag))
        puts.append(Put(key, after.to_bytes()))
        adds = holds([(None, job) for job in jobs], self.clock())
        try:
            await self.store.transact(checks, puts, (), appends, adds)
        except LimitReachedError as error:
            if error.param != TRAINING_JOBS:
                raise
            raise RateLimitError(  # unlike the other quotas this one is free again by itself
                f"{error.held} training jobs have not ended and {error.amount} more are wanted; {error.limit} may be "
                "open at a time",
                code="too_many_training_jobs",
                retry_after_seconds=RETRY_SECONDS,
            ) from None

    async def move(
        self, stored: StoredJob, changed: JobRecord, events: Sequence[JobEvent] = (), *, lease: Lease | None = None
    ) -> JobRecord:
        """Write a changed job, fenced by its worker's lease; a checkpoint that it no longer names is deleted.

        Raises `CheckFailedError` where another writer came first, `LeaseLostError`, and `RateLimitError` where the
        tenant's cap leaves no room; a worker that gives a job back is never refused.
        """
        job = stored.job
        key = job_key(job.tenant, job.id)
        checks: list[Check | Lease] = [Check(key, stored.etag)]
        puts = [Put(key, changed.to_bytes())]
        deletes = []
        appends = [Append(job_log(job.tenant, job.id), event.to_bytes()) for event in events]
        if lease is not None:
            checks.append(lease)
        if changed.state is not job.state:
            appends.append(_signal(changed))
            left, entered = _entry_key(job), _entry_key(changed)
            if left is not None and left != entered:
                deletes.append(left)
            if entered is not None:
                puts.append(Put(entered, ref_of(changed)))
            before, etag = await self.tally(job.base_fingerprint, job.tenant)
            after = before.counted(job.state, -1).counted(changed.state, +1)
            if after != before:
                self._check_caps(before, after, is_worker=lease is not None)
                tally = tally_key(job.base_fingerprint, job.tenant)
                checks.append(Check(tally, etag))
                if not after.num_queued and not after.num_running:
                    deletes.append(tally)
                elif after.num_running > before.num_running:
                    puts.append(Put(tally, replace(after, served_at=self.clock()).to_bytes()))
                else:
                    puts.append(Put(tally, after.to_bytes()))
        adds = holds([(job, changed)], self.clock(), is_limited=False)
        await self.store.transact(checks, puts, deletes, appends, adds)
        old, new = job.checkpoint, changed.checkpoint
        if old is not None and (new is None or new.digest != old.digest):
            await self.store.delete_blob(job.tenant, old.digest)
        return changed

    async def drop(self, stored: StoredJob) -> None:
        """Forget a job whatever its state: whoever runs it finds nothing any more. Raises `CheckFailedError`."""
        job, key = stored.job, job_key(stored.job.tenant, stored.job.id)
        checks, deletes = [Check(key, stored.etag)], [key]
        deletes += [one for one in (_entry_key(job),) if one is not None]
        if job.idempotency_key is not None:
            deletes.append(once_key(job.tenant, job.idempotency_key))
        before, etag = await self.tally(job.base_fingerprint, job.tenant)
        after = before.counted(job.state, -1)
        puts = []
        if after != before:
            tally = tally_key(job.base_fingerprint, job.tenant)
            checks.append(Check(tally, etag))
            if after.num_queued or after.num_running:
                puts.append(Put(tally, after.to_bytes()))
            else:
                deletes.append(tally)
        adds = [] if job.state.is_ended else holds([(job, job.let_go())], self.clock(), is_limited=False)
        await self.store.transact(checks, puts, deletes, [_signal(job)], adds)

    async def retry(self, tenant: str, job_id: str, step: Callable[[StoredJob], Awaitable[_T]]) -> _T:
        """Run read-check-move until no other writer came in between."""
        for _ in range(MAX_TRIES):
            try:
                return await step(await self.read(tenant, job_id))
            except CheckFailedError:
                continue
        raise StoreUnavailableError(f"job {job_id!r} is being changed by too many writers at once", param="job_id")

    async def tally(self, base_fingerprint: str, tenant: str) -> tuple[Tally, str | None]:
        """Read a tenant's tally and its etag; None where it has no open jobs."""
        stored = await self.store.get(tally_key(base_fingerprint, tenant))
        if stored is None:
            return Tally(tenant, self.clock()), None
        return Tally.from_bytes(stored.value), stored.etag

    async def tallies(self, base_fingerprint: str) -> list[Tally]:
        """Read every tenant with open jobs, the one first that was served longest ago."""
        found = await self.store.scan(tally_key(base_fingerprint, ""))
        return sorted((Tally.from_bytes(one.value) for one in found), key=lambda one: (one.served_at, one.tenant))

    async def waiting(self, base_fingerprint: str, tenant: str, limit: int) -> list[JobRef]:
        """Read a tenant's queued jobs, those first that are next."""
        found = await self.store.scan(waiting_key(base_fingerprint, tenant, ""), limit=limit)
        return [JobRef.from_bytes(one.value) for one in found]

    async def active(self, base_fingerprint: str) -> list[JobRef]:
        """Read all jobs that have, or had, a worker."""
        found = await self.store.scan(active_key(base_fingerprint, ""))
        return [JobRef.from_bytes(one.value) for one in found]

    def _check_caps(self, before: Tally, after: Tally, *, is_worker: bool) -> None:
        if before.num_queued < after.num_queued > self.limits.max_queued and not is_worker:
            raise RateLimitError(
                f"{after.num_queued} jobs would wait, at most {self.limits.max_queued} may", code="too_many_queued_jobs"
            )
        if before.num_running < after.num_running > self.limits.max_running:
            raise RateLimitError(
                f"{after.num_running} jobs would run, at most {self.limits.max_running} may",
                code="too_many_running_jobs",
            )


def _entry_key(job: JobRecord) -> str | None:
    if job.state is JobState.QUEUED:
        order = f"{MAX_PRIORITY - job.spec.priority}:{microseconds(job.created_at):016d}:{job.id}"
        return waiting_key(job.base_fingerprint, job.tenant, order)
    if job.state in _ACTIVE:
        return active_key(job.base_fingerprint, f"{job.tenant}:{job.id}")
    return None


def ref_of(job: JobRecord) -> bytes:
    """Write what names a job in the index and in signals."""
    return JobRef(job.tenant, job.id, job.state).to_bytes()


def _signal(job: JobRecord) -> Append:
    return Append(signals_log(job.base_fingerprint), ref_of(job))
