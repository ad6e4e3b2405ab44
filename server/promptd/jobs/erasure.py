"""Forgetting jobs whatever their state: of a tenant or a user that is erased. Their workers stop at the next look."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection

from promptd_store import Append, CheckFailedError, Store
from promptd_store.names import PUBLIC_TENANT

from promptd.errors import NotFoundError
from promptd.jobs.keys import job_key, job_log, signals_log
from promptd.jobs.ledger import JobLedger, JobLimits, StoredJob, ref_of
from promptd.jobs.record import JobRecord

MAX_ROUNDS = 10
"""A job may change while it is dropped: then it is looked at again."""


class JobEraser:
    """Drops jobs of all base models."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._ledger = JobLedger(store, JobLimits(), clock)

    async def forget_user(self, tenant: str, user: str, file_ids: Collection[str]) -> list[JobRecord]:
        """Drop the jobs of a user, and those that read some files; return them as they were last."""
        gone: dict[str, JobRecord] = {}
        for _ in range(MAX_ROUNDS):
            wanted = [job for job in await self._jobs(tenant) if job.user == user or not job.files.isdisjoint(file_ids)]
            if not wanted:
                break
            for job in wanted:
                gone[job.id] = await self._drop(job) or job
        return list(gone.values())

    async def forget_tenant(self, tenant: str) -> int:
        """Take a tenant's jobs out of the queue, whose records go with all others; return how many there were."""
        jobs = await self._jobs(tenant)
        prefix = f"{{{PUBLIC_TENANT}}}:job-"
        entries = [one.key for one in await self._store.scan(prefix) if json.loads(one.value).get("tenant") == tenant]
        signals = [Append(signals_log(job.base_fingerprint), ref_of(job)) for job in jobs if not job.state.is_ended]
        await self._store.transact(deletes=entries, appends=signals)
        return len(jobs)

    async def _jobs(self, tenant: str) -> list[JobRecord]:
        return [JobRecord.from_bytes(one.value) for one in await self._store.scan(job_key(tenant, ""))]

    async def _drop(self, job: JobRecord) -> JobRecord | None:
        last: list[JobRecord] = []

        async def step(stored: StoredJob) -> None:
            last[:] = [stored.job]
            await self._ledger.drop(stored)

        try:
            await self._ledger.retry(job.tenant, job.id, step)
        except (NotFoundError, CheckFailedError):
            return None
        await self._store.trim_log(job_log(job.tenant, job.id), before_seq=1 << 62)
        return last[0]
