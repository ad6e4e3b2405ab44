"""Ended jobs are kept for a while, for people to look at; then they are forgotten with their logs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from promptd_store import Check, CheckFailedError, Record, Store, trim_events

from promptd.jobs.keys import SIGNALS, job_key, job_log, once_key
from promptd.jobs.record import JobRecord

KEEP_JOBS_SECONDS = 30 * 24 * 3600.0
KEEP_SIGNALS_SECONDS = 3600.0
"""Far longer than a worker that reads them falls behind; one that did looks at its jobs with each heartbeat."""
PAGE = 1000


class OldJobs:
    """Finds a tenant's jobs that ended longer ago than this. Show it all records."""

    def __init__(
        self, tenant: str, *, keep_seconds: float = KEEP_JOBS_SECONDS, clock: Callable[[], float] = time.time
    ) -> None:
        self._jobs = job_key(tenant, "")
        self._oldest_kept = clock() - keep_seconds
        self._old: list[tuple[JobRecord, str]] = []

    def see(self, record: Record) -> None:
        """Look at one record."""
        if record.key.startswith(self._jobs):
            job = JobRecord.from_bytes(record.value)
            if job.finished_at is not None and job.finished_at < self._oldest_kept:
                self._old.append((job, record.etag))

    async def forget(self, store: Store) -> int:
        """Delete them; return how many. The prompts that they made stay."""
        num_forgotten = 0
        for job, etag in self._old:
            with contextlib.suppress(CheckFailedError):  # another process forgets it too
                await forget_job(store, job, etag)
                num_forgotten += 1
        return num_forgotten


async def forget_job(store: Store, job: JobRecord, etag: str) -> None:
    """Delete an ended job with its log; the prompt that it made stays. Raises `CheckFailedError`."""
    await store.trim_log(job_log(job.tenant, job.id), before_seq=1 << 62)  # first: a log without a job stays for ever
    key = job_key(job.tenant, job.id)
    deletes = [key] if job.idempotency_key is None else [key, once_key(job.tenant, job.idempotency_key)]
    await store.transact([Check(key, etag)], deletes=deletes)


async def trim_signals(store: Store, *, clock: Callable[[], float] = time.time) -> int:
    """Delete old signals to workers; return how many."""
    logs = {event.log for event in await store.read_log(SIGNALS, limit=PAGE)}
    return sum([await trim_events(store, log, keep_seconds=KEEP_SIGNALS_SECONDS, clock=clock) for log in sorted(logs)])
