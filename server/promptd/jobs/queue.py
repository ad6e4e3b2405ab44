"""The tenants' side of training jobs: create, look, cancel, pause, resume, follow."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass

from promptd_store import (
    STORED_BYTES,
    CheckFailedError,
    LimitReachedError,
    Store,
    StoreError,
    StoreUnavailableError,
    check_name,
    check_room,
    check_tenant,
    drop_unnamed,
)
from promptd_store.users import raise_if_erased, user_checks

from promptd.errors import ConflictError, InvalidRequestError, NotFoundError, PromptdError
from promptd.jobs.events import JobEvent, state_event
from promptd.jobs.files import TrainingFiles, check_lines
from promptd.jobs.keys import job_key, job_log, new_id, once_key
from promptd.jobs.ledger import MAX_TRIES, JobLedger, JobLimits, StoredJob
from promptd.jobs.record import JobRecord, JobSpec, JobState
from promptd.jobs.retention import forget_job

MAX_LISTED_EVENTS = 1000

Jobs = list[JobRecord]  # `list` is a method of the queue
Outcome = JobRecord | PromptdError | StoreError
Outcomes = list[Outcome]


@dataclass(frozen=True, slots=True)
class JobRequest:
    """One job to create. Asking again with the same key returns the job of the first time."""

    spec: JobSpec
    idempotency_key: str | None = None
    wish: bytes | None = None
    """What the caller asked for, before anything was looked up; None: the spec says it all."""
    key_id: str = ""
    """The API key that asks."""
    user: str | None = None
    """The end user whom the job and its prompt belong to."""

    @property
    def digest(self) -> str:
        """Tells a repeated request from another one under the same key."""
        wish = json.dumps(asdict(self.spec)).encode() if self.wish is None else self.wish
        return hashlib.sha256(wish).hexdigest()


class JobQueue:
    """Jobs for one base model. Absent and foreign jobs look the same.

    `check` raises a typed error for a method or settings that no trainer would take.
    """

    def __init__(
        self,
        store: Store,
        base_fingerprint: str,
        *,
        check: Callable[[JobSpec], object],
        limits: JobLimits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._base_fingerprint = base_fingerprint
        self._check = check
        self._clock = clock
        self._ledger = JobLedger(store, limits or JobLimits(), clock)
        self._files = TrainingFiles(store, clock=clock)

    async def put_rows(self, tenant: str, rows: bytes) -> str:
        """Store rows that come with a job and return the digest for `JobSpec.rows_digest`; kept until the job ends."""
        check_lines(rows, "rows")
        await check_room(self._store, tenant, {STORED_BYTES: len(rows)})
        return await self._store.put_blob(tenant, rows)

    async def create(self, tenant: str, request: JobRequest) -> JobRecord:
        """Create one job, durable on return; raises what `create_many` returns."""
        (created,) = await self.create_many(tenant, [request])
        if isinstance(created, Exception):
            raise created
        return created

    async def create_many(self, tenant: str, requests: Sequence[JobRequest]) -> Outcomes:
        """Create jobs and return for each the job or why there is none.

        The good ones are stored in one transaction, in their order; caps and quotas take all of them or none.
        """
        check_tenant(tenant)
        users = {request.user for request in requests}
        checks = [check for user in users for check in await user_checks(self._store, tenant, user)]
        faults = [await self._fault(tenant, request.spec) for request in requests]
        for _ in range(MAX_TRIES):
            results, fresh = await self._drafted(tenant, requests, faults)
            try:
                if fresh:
                    event = state_event(JobState.QUEUED, "The job is waiting for a worker")
                    await self._ledger.add(fresh, event, checks)
                return results
            except CheckFailedError as error:  # the tally moved, or another request came with the same key
                if any(error.key == check.key for check in checks):
                    await drop_unnamed(self._store, tenant, {digest for job in fresh for digest in job.digests})
                    for user in users:
                        raise_if_erased(error, tenant, user)
                continue
            except (PromptdError, LimitReachedError) as error:
                ids = {job.id for job in fresh}
                return [error if isinstance(one, JobRecord) and one.id in ids else one for one in results]
        raise StoreUnavailableError(f"too many writers at once create jobs for tenant {tenant!r}")

    async def created_before(self, tenant: str, idempotency_key: str, wish: bytes | None = None) -> JobRecord | None:
        """Return the job that a key has created; raises `ConflictError` where that was for another wish."""
        stored = await self._store.get(once_key(tenant, idempotency_key))
        if stored is None:
            return None
        job = await self.get(tenant, stored.value.decode())
        if wish is not None and job.wish_digest != hashlib.sha256(wish).hexdigest():
            raise _reused(idempotency_key)
        return job

    async def get(self, tenant: str, job_id: str) -> JobRecord:
        """Return one job; raises `NotFoundError`."""
        return (await self._ledger.read(tenant, job_id)).job

    async def list(self, tenant: str, *, after: str | None = None, limit: int | None = None) -> Jobs:
        """Return the tenant's jobs, newest first, those behind the job `after`."""
        prefix = job_key(tenant, "")
        found = await self._store.scan(prefix, after=prefix + (after or ""), limit=limit)
        return [JobRecord.from_bytes(one.value) for one in found]

    async def cancel(self, tenant: str, job_id: str) -> JobRecord:
        """Cancel: at once where no worker has it, else it is `cancelling` until the worker has stopped.

        Cancelling again changes nothing; raises `ConflictError` for a job that has ended otherwise.
        """

        async def step(stored: StoredJob) -> JobRecord:
            job = stored.job
            if job.state in (JobState.CANCELLING, JobState.CANCELLED):
                return job
            if job.state is JobState.RUNNING:
                event = state_event(JobState.CANCELLING, "Cancelling: the worker is told to stop")
            else:
                event = state_event(JobState.CANCELLED, "The job is cancelled")
            return await self._ledger.move(stored, job.moved(JobState(event.data["state"]), self._clock()), [event])

        return await self._ledger.retry(tenant, job_id, step)

    async def pause(self, tenant: str, job_id: str) -> JobRecord:
        """Pause; a worker that has the job saves a checkpoint and lets go of it. Pausing again changes nothing."""

        async def step(stored: StoredJob) -> JobRecord:
            job = stored.job
            if job.state is JobState.PAUSED:
                return job
            attempts = max(0, job.attempts - (job.state is JobState.RUNNING))  # being paused is no failure
            paused = job.moved(JobState.PAUSED, self._clock(), attempts=attempts)
            return await self._ledger.move(stored, paused, [state_event(JobState.PAUSED, "The job is paused")])

        return await self._ledger.retry(tenant, job_id, step)

    async def resume(self, tenant: str, job_id: str) -> JobRecord:
        """Put a paused job back in line, by its age; a queued or running one is left as it is."""

        async def step(stored: StoredJob) -> JobRecord:
            job = stored.job
            if job.state in (JobState.QUEUED, JobState.RUNNING):
                return job
            queued = job.moved(JobState.QUEUED, self._clock())
            return await self._ledger.move(stored, queued, [state_event(JobState.QUEUED, "The job is resumed")])

        return await self._ledger.retry(tenant, job_id, step)

    async def delete(self, tenant: str, job_id: str) -> None:
        """Forget an ended job with its events; its prompt stays. Raises `ConflictError` for one that has not ended."""

        async def step(stored: StoredJob) -> None:
            job = stored.job
            if not job.state.is_ended:
                raise ConflictError(f"job {job.id!r} is {job.state.value}; cancel it first", code="job_state_conflict")
            await forget_job(self._store, job, stored.etag)

        await self._ledger.retry(tenant, job_id, step)

    async def events(
        self, tenant: str, job_id: str, *, before: int | None = None, limit: int = MAX_LISTED_EVENTS
    ) -> Sequence[JobEvent]:
        """Return a job's last events, or the last ones before a seq; newest first."""
        await self._ledger.read(tenant, job_id)
        found = await self._store.read_tail(job_log(tenant, job_id), before=before, limit=limit)
        return [JobEvent.from_log(event) for event in found]

    async def follow(self, tenant: str, job_id: str, *, after: int | None = None) -> AsyncIterator[JobEvent]:
        """Yield a job's events behind a seq (None: its last thousand), then new ones, until the job has ended."""
        last = after or 0
        past = await self.events(tenant, job_id)
        for event in reversed(past):
            if event.seq > last:
                last = event.seq
                yield event
        if not past or past[0].ends_job:  # none: the job is being forgotten
            return
        subscription = await self._store.subscribe(job_log(tenant, job_id), after=last)
        try:
            async for entry in subscription:
                event = JobEvent.from_log(entry)
                yield event
                if event.ends_job:
                    return
        finally:
            await subscription.aclose()

    async def _fault(self, tenant: str, spec: JobSpec) -> PromptdError | StoreError | None:
        """Return why no job can be made of this, whatever the queue looks like."""
        try:
            if spec.name is not None:
                check_name(spec.name)
            num_sources = (spec.training_file is not None) + (spec.rows_digest is not None)
            if num_sources > 1 or (num_sources == 0 and spec.distill is None):
                raise InvalidRequestError("give either training_file or rows", param="training_file")
            self._check(spec)
            for param, file_id in (("training_file", spec.training_file), ("validation_file", spec.validation_file)):
                if file_id is not None:
                    await self._existing(tenant, param, file_id)
        except (PromptdError, StoreError) as error:
            return error
        return None

    async def _existing(self, tenant: str, param: str, file_id: str) -> None:
        try:
            await self._files.get(tenant, file_id)
        except NotFoundError as error:
            raise InvalidRequestError(f"{param}: {error}", param=param, code=error.code) from None

    async def _drafted(
        self, tenant: str, requests: Sequence[JobRequest], faults: Sequence[PromptdError | StoreError | None]
    ) -> tuple[Outcomes, Jobs]:
        """Return a result for each request, and which of them are new jobs still to be stored."""
        now = self._clock()
        results: Outcomes = []
        fresh: dict[str, JobRecord] = {}
        for number, (request, fault) in enumerate(zip(requests, faults, strict=True)):
            key = request.idempotency_key
            known = None if key is None else fresh.get(key) or await self.created_before(tenant, key)
            if known is not None:
                results.append(known if known.wish_digest == request.digest else _reused(key))
            elif fault is not None:
                results.append(fault)
            else:
                created_at = now + number * 1e-6  # keeps the order of one call
                job = JobRecord(
                    new_id("ftjob", created_at), tenant, self._base_fingerprint, request.spec, created_at,
                    idempotency_key=key, wish_digest=request.digest, key_id=request.key_id, user=request.user,
                )  # fmt: skip
                fresh[key or job.id] = job
                results.append(job)
        return results, list(fresh.values())


def _reused(idempotency_key: str | None) -> ConflictError:
    return ConflictError(f"idempotency key {idempotency_key!r} has created another job", code="idempotency_key_reused")
