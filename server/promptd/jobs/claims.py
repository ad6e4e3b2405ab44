"""The workers' side of training jobs: claim, keep alive, save, report, end. Every write is fenced by the lease.

A worker that sleeps through its lease loses the job to another one; whatever it tries then raises `LeaseLostError`
and changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace

from promptd_store import (
    BlobCorruptError,
    BlobNotFoundError,
    Check,
    Lease,
    LeaseLostError,
    Store,
    TenantErasedError,
    drop_unnamed,
)

from promptd.errors import ConflictError, NotFoundError, RateLimitError
from promptd.jobs.events import JobEvent, state_event
from promptd.jobs.files import TrainingFiles
from promptd.jobs.keys import job_key, signals_log
from promptd.jobs.ledger import JobLedger, JobLimits, JobRef, StoredJob, Tally
from promptd.jobs.record import Checkpoint, JobError, JobProgress, JobRecord, JobResult, JobState

LEASE_SECONDS = 12.0
HEARTBEAT_SECONDS = 4.0
"""How often `heartbeat` must be called, also while training blocks everything else."""
MAX_ATTEMPTS = 5
MAX_SHARED_ATTEMPTS = 2
"""After so many in a row without a checkpoint a job is suspected of taking its workers down: see `Claim.is_suspect`."""
MAX_LOOKED_AT = 64
"""Queued jobs of one tenant that a claim looks at: those in front may still be held by the worker they left."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to run a job, and the job as it was when this was made."""

    lease: Lease
    job: JobRecord

    @property
    def has_saved(self) -> bool:
        """Whether the job has got further since it was claimed, so that the death of its worker costs no attempt."""
        return self.job.attempts == 0

    @property
    def is_suspect(self) -> bool:
        """Whether the job may be what takes workers down: it runs where all others have saved, until it has, too."""
        return self.job.attempts > MAX_SHARED_ATTEMPTS


@dataclass(frozen=True, slots=True)
class JobData:
    """The rows of a job, as JSON lines."""

    training: bytes
    validation: bytes | None


class JobClaims:
    """What one worker holds of one base model's queue. `owner` is this worker's alone, also after a restart."""

    def __init__(
        self,
        store: Store,
        base_fingerprint: str,
        owner: str,
        *,
        limits: JobLimits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.owner = owner
        self._store = store
        self._base_fingerprint = base_fingerprint
        self._clock = clock
        self._ledger = JobLedger(store, limits or JobLimits(), clock)
        self._files = TrainingFiles(store, clock=clock)

    async def claim(self, max_jobs: int, beside: Sequence[Claim] = ()) -> list[Claim]:
        """Take up to so many jobs: first those whose worker is gone, then queued ones, tenant by tenant.

        The tenant is next whose turn was longest ago; within a tenant priority and then age decide. `beside` is what
        this worker has already: a job that may take it down comes only where the others lose nothing by that, alone.
        """
        if any(claim.is_suspect for claim in beside):
            return []
        claims: list[Claim] = []
        for ref in await self._ledger.active(self._base_fingerprint):
            is_safe = not claims and all(claim.has_saved for claim in beside)
            if len(claims) < max_jobs and (claim := await self._take(ref, also_suspects=is_safe)):
                if claim.is_suspect:
                    return [claim]
                claims.append(claim)
        while len(claims) < max_jobs:
            taken = 0
            for tally in await self._ledger.tallies(self._base_fingerprint):
                if len(claims) < max_jobs and (claim := await self._take_next(tally)):
                    claims.append(claim)
                    taken += 1
            if not taken:
                break
        return claims

    async def heartbeat(self, claim: Claim) -> Claim:
        """Keep the claim alive and look at the job: where it is no longer running, stop and `release` it."""
        lease = await self._store.renew_lease(claim.lease, LEASE_SECONDS)
        return Claim(lease, (await self._read(claim)).job)

    async def data(self, claim: Claim) -> JobData:
        """Return the job's rows, none where a teacher writes them; raises `NotFoundError` where a file was deleted."""
        job, spec = claim.job, claim.job.spec
        if spec.rows_digest is None and spec.training_file is None:
            training = b""
        elif spec.rows_digest is not None:
            training = await self._store.get_blob(job.tenant, spec.rows_digest)
        else:
            training = await self._file(job, "training_file", spec.training_file)
        validation = None
        if spec.validation_file is not None:
            validation = await self._file(job, "validation_file", spec.validation_file)
        return JobData(training, validation)

    async def save_checkpoint(self, claim: Claim, data: bytes, step: int) -> Claim:
        """Store where the job continues, durable on return; the checkpoint before it is deleted.

        A checkpoint of a later step shows that the job gets on: its attempts count from there.
        """
        header = _header(claim.job)  # equal checkpoints of two jobs are two blobs: each may delete its own
        digest = await self._store.put_blob(claim.job.tenant, header + data)  # raises where the tenant was erased
        checkpoint = Checkpoint(digest, step, len(data), self._clock())

        def changed(job: JobRecord) -> JobRecord:
            gets_on = step > (job.checkpoint.step if job.checkpoint else 0)
            return replace(job, checkpoint=checkpoint, attempts=0 if gets_on else job.attempts)

        try:
            return await self._write(claim, changed)
        except (LeaseLostError, ConflictError):  # the job may have been erased: nobody would ever find this
            await drop_unnamed(self._store, claim.job.tenant, [digest])
            raise

    async def load_checkpoint(self, claim: Claim) -> bytes | None:
        """Return what was saved last; None where nothing was, or where the disk has lost it (the log says so)."""
        checkpoint = claim.job.checkpoint
        if checkpoint is None:
            return None
        try:
            stored = await self._store.get_blob(claim.job.tenant, checkpoint.digest)
        except (BlobNotFoundError, BlobCorruptError):
            message = f"The checkpoint of step {checkpoint.step} is not readable; training starts over"
            await self.report(claim, events=[JobEvent(message, "warn")])
            return None
        return stored.removeprefix(_header(claim.job))

    async def report(self, claim: Claim, progress: JobProgress | None = None, events: Sequence[JobEvent] = ()) -> Claim:
        """Show how far the job is, and add to its log; progress is logged as a `metrics` event."""
        entries = list(events)
        if progress is not None:
            message = f"Step {progress.step} of {progress.num_steps}"
            entries.append(JobEvent(message, kind="metrics", data=asdict(progress)))
        return await self._write(claim, lambda job: replace(job, progress=progress or job.progress), entries)

    async def publication_checks(self, claim: Claim) -> tuple[Check | Lease, ...]:
        """Return checks for `PromptCatalog.publish`: the job is this worker's and as it is now.

        Raises `ConflictError` where the job is no longer running. A report in between makes them fail: ask again.
        """
        stored = await self._read(claim)
        if stored.job.state is not JobState.RUNNING:
            raise ConflictError(f"job {stored.job.id!r} is {stored.job.state.value}", code="job_state_conflict")
        return claim.lease, Check(job_key(stored.job.tenant, stored.job.id), stored.etag)

    async def finish(self, claim: Claim, result: JobResult) -> JobRecord:
        """End with a published prompt."""
        event = state_event(JobState.SUCCEEDED, f"The job has published {result.prompt}@{result.number}")
        return await self._end(claim, event, result=result)

    async def fail(self, claim: Claim, error: JobError) -> JobRecord:
        """End without one, for a reason that another attempt would meet too."""
        return await self._end(claim, state_event(JobState.FAILED, error.message, "error"), error=error)

    async def release(self, claim: Claim) -> JobRecord:
        """Let go of a job that this worker has stopped: what was to be cancelled is, what was running waits again.

        The attempt does not count. Save a checkpoint before.
        """

        async def step(stored: StoredJob) -> JobRecord:
            job = stored.job
            if job.state is JobState.CANCELLING:
                return await self._cancelled(stored, claim.lease)
            if job.state is not JobState.RUNNING:
                return job
            queued = job.moved(JobState.QUEUED, self._clock(), attempts=max(0, job.attempts - 1))
            event = state_event(JobState.QUEUED, "The worker was stopped; the job waits for the next one")
            return await self._ledger.move(stored, queued, [event], lease=claim.lease)

        job = await self._retry(claim, step)
        await self._store.release_lease(claim.lease)
        return job

    @property
    def signals_log(self) -> str:
        """Log of every change of state on this queue: subscribe to it to claim and to stop without delay."""
        return signals_log(self._base_fingerprint)

    async def _take_next(self, tally: Tally) -> Claim | None:
        if not tally.num_queued or tally.num_running >= self._ledger.limits.max_running:
            return None
        for ref in await self._ledger.waiting(self._base_fingerprint, tally.tenant, MAX_LOOKED_AT):
            if claim := await self._take(ref):
                return claim
        return None

    async def _take(self, ref: JobRef, *, also_suspects: bool = True) -> Claim | None:
        """Claim one job, or end one that nobody may run any more; None where there is nothing to run."""
        lease = await self._store.acquire_lease(job_key(ref.tenant, ref.id), self.owner, LEASE_SECONDS)
        if lease is None:
            return None

        async def step(stored: StoredJob) -> JobRecord | None:
            job = stored.job
            if job.state is JobState.CANCELLING:
                await self._cancelled(stored, lease)
            elif job.state in (JobState.QUEUED, JobState.RUNNING):
                if job.attempts >= MAX_ATTEMPTS:
                    await self._poisoned(stored, lease)
                elif also_suspects or job.attempts < MAX_SHARED_ATTEMPTS:
                    running = job.moved(JobState.RUNNING, self._clock(), attempts=job.attempts + 1)
                    return await self._ledger.move(stored, running, [_started(running)], lease=lease)
            return None

        try:
            job = await self._ledger.retry(ref.tenant, ref.id, step)
        except (LeaseLostError, NotFoundError, TenantErasedError, RateLimitError):
            # Slept too long; gone; going, and not yet out of the queue; another worker filled the cap.
            job = None
        if job is None:
            await self._store.release_lease(lease)
            return None
        return Claim(lease, job)

    async def _cancelled(self, stored: StoredJob, lease: Lease) -> JobRecord:
        cancelled = stored.job.moved(JobState.CANCELLED, self._clock())
        event = state_event(JobState.CANCELLED, "The job is cancelled")
        return await self._ledger.move(stored, cancelled, [event], lease=lease)

    async def _poisoned(self, stored: StoredJob, lease: Lease) -> None:
        message = f"The job took its worker down {stored.job.attempts} times in a row without getting any further"
        failed = stored.job.moved(JobState.FAILED, self._clock(), error=JobError("poison", message))
        await self._ledger.move(stored, failed, [state_event(JobState.FAILED, message, "error")], lease=lease)

    async def _write(
        self, claim: Claim, changed: Callable[[JobRecord], JobRecord], events: Sequence[JobEvent] = ()
    ) -> Claim:
        async def step(stored: StoredJob) -> JobRecord:
            if stored.job.state.is_ended:
                raise ConflictError(f"job {stored.job.id!r} is {stored.job.state.value}", code="job_state_conflict")
            return await self._ledger.move(stored, changed(stored.job), events, lease=claim.lease)

        return Claim(claim.lease, await self._retry(claim, step))

    async def _end(self, claim: Claim, event: JobEvent, **changes: JobError | JobResult) -> JobRecord:
        async def step(stored: StoredJob) -> JobRecord:
            ended = stored.job.moved(JobState(event.data["state"]), self._clock(), **changes)
            return await self._ledger.move(stored, ended, [event], lease=claim.lease)

        job = await self._retry(claim, step)
        await self._store.release_lease(claim.lease)
        return job

    async def _retry(self, claim: Claim, step: Callable[[StoredJob], Awaitable[JobRecord]]) -> JobRecord:
        try:
            return await self._ledger.retry(claim.job.tenant, claim.job.id, step)
        except (NotFoundError, TenantErasedError):
            raise _erased(claim) from None

    async def _read(self, claim: Claim) -> StoredJob:
        try:
            return await self._ledger.read(claim.job.tenant, claim.job.id)
        except NotFoundError:
            raise _erased(claim) from None

    async def _file(self, job: JobRecord, param: str, file_id: str | None) -> bytes:
        try:
            return await self._files.content(job.tenant, file_id or "")
        except NotFoundError:
            raise NotFoundError(f"{param} {file_id!r} was deleted", param=param, code="file_not_found") from None


def _erased(claim: Claim) -> LeaseLostError:
    return LeaseLostError(f"job {claim.job.id!r} was erased", param=claim.lease.key)


def _header(job: JobRecord) -> bytes:
    return f"{job.id}\n".encode()


def _started(job: JobRecord) -> JobEvent:
    where = f"continuing after step {job.checkpoint.step}" if job.checkpoint else "from the beginning"
    return state_event(JobState.RUNNING, f"A worker has started the job, {where} (attempt {job.attempts})")
