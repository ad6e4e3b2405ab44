"""Ended jobs are kept for a while, for people to look at; then they are forgotten with their logs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from promptd_store import Check, CheckFailedError, Store, scan_records, trim_events

from promptd.jobs.keys import SIGNALS, job_key, job_log, once_key
from promptd.jobs.record import JobRecord

KEEP_JOBS_SECONDS = 30 * 24 * 3600.0
KEEP_SIGNALS_SECONDS = 3600.0
"""Far longer than a worker that reads them falls behind; one that did looks at its jobs with each heartbeat."""
PAGE = 1000


async def forget_old_jobs(
    store: Store, tenant: str, *, keep_seconds: float = KEEP_JOBS_SECONDS, clock: Callable[[], float] = time.time
) -> int:
    """Delete a tenant's jobs that ended longer ago than this; return how many. The prompts that they made stay."""
    oldest_kept, num_forgotten = clock() - keep_seconds, 0
    async for stored in scan_records(store, job_key(tenant, "")):
        job = JobRecord.from_bytes(stored.value)
        if job.finished_at is None or job.finished_at >= oldest_kept:
            continue
        with contextlib.suppress(CheckFailedError):  # another process forgets it too
            await forget_job(store, job, stored.etag)
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
