"""The background task that throws away what the store no longer needs."""

from __future__ import annotations

import asyncio
import os
import secrets
import time

import structlog
from promptd_store import (
    PROMPTS,
    STORED_BYTES,
    Garbage,
    PromptsHeld,
    Recount,
    Store,
    StoreError,
    day_of,
    events_log,
    held_key,
    scan_tenants,
    show_records,
    trim_changes,
    trim_events,
)
from promptd_store.names import ERASED, PUBLIC_TENANT

from promptd.jobs import TRAINING_JOBS, TRAINING_STEPS, JobsHeld, steps_of
from promptd.jobs.retention import OldJobs, trim_signals
from promptd.metrics import HousekeepingMetrics
from promptd.retention import Retention
from promptd.tenancy import ERASURES_LOG, note_stored_bytes, trim_calls

RETENTION_SECONDS = 86400.0
"""Whether prompts are kept is looked at once a day: it reads what was used on all days that count."""
_SHARE = 0.02
"""Of the time, while records are looked through: 100,000 prompts take minutes, and requests no longer than ever."""
FIRST_RUN_SECONDS = 5.0
"""After the start, so that a server that is restarted often still gets to it."""
TURN = f"{{{PUBLIC_TENANT}}}:housekeeping"
RETENTION_TURN = f"{{{PUBLIC_TENANT}}}:retention"

_log = structlog.get_logger("promptd.housekeeping")


class Housekeeper:
    """Deletes unreferenced blobs, old events and old jobs of every tenant, again and again.

    A failure waits for the next round. Several processes may do so over one store: each deletion stands by itself.
    """

    def __init__(
        self,
        store: Store,
        metrics: HousekeepingMetrics,
        *,
        interval_seconds: float,
        min_age_seconds: float,
        keep_jobs_seconds: float,
        keep_versions: int | None = None,
        unused_days: int | None = None,
    ) -> None:
        self._store = store
        self._owner = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._metrics = metrics
        self._interval_seconds = interval_seconds
        self._min_age_seconds = min_age_seconds
        self._keep_jobs_seconds = keep_jobs_seconds
        self._keep_versions = keep_versions
        self._unused_days = unused_days

    async def run(self) -> None:
        """Clean up until cancelled."""
        wait_seconds = min(FIRST_RUN_SECONDS, self._interval_seconds)
        while True:
            await asyncio.sleep(wait_seconds)
            if await self._has_turn(TURN, self._interval_seconds):
                keeping = asyncio.create_task(self._keep_turn())
                try:
                    await self.clean_up()
                finally:
                    keeping.cancel()
            wait_seconds = self._interval_seconds

    async def _has_turn(self, what: str, interval_seconds: float) -> bool:
        """Of all servers over one store, one cleans up in an interval."""
        try:
            return await self._store.acquire_lease(what, self._owner, 0.9 * interval_seconds) is not None
        except StoreError:
            self._metrics.count_failure()
            return False

    async def _keep_turn(self) -> None:
        """Ask for the turn again and again: going through very many records takes longer than an interval."""
        while True:
            await asyncio.sleep(self._interval_seconds / 3)
            await self._has_turn(TURN, self._interval_seconds)

    async def clean_up(self) -> None:
        """Go through all tenants once; what goes wrong with one is logged and counted, and the others follow."""
        retention: Retention | None = None
        try:
            retention = await self._retention()
        except StoreError as error:
            self._failed(error)
        try:
            async for tenant in scan_tenants(self._store):
                try:
                    await self._clean_up_tenant(tenant, retention)
                except Exception as error:  # noqa: BLE001 - serving never depends on a clean-up
                    self._failed(error)
            await self._store.erase()
        except Exception as error:  # noqa: BLE001 - not even its tenants are told: the rest waits for the next round
            self._failed(error)

    async def _clean_up_tenant(self, tenant: str, retention: Retention | None) -> None:
        if await self._store.get(ERASED + tenant) is not None:  # a server died while it erased
            await self._store.erase_tenant(tenant)
            return
        if retention is not None:
            await self._prune(retention, tenant)
        recount = await Recount.begin(self._store, tenant, (PROMPTS, STORED_BYTES, TRAINING_JOBS))
        garbage = await Garbage.begin(self._store, tenant)
        prompts, jobs = PromptsHeld(tenant), JobsHeld(tenant)
        old_jobs = OldJobs(tenant, keep_seconds=self._keep_jobs_seconds)
        await show_records(self._store, tenant, garbage.see, prompts.see, jobs.see, old_jobs.see, share=_SHARE)
        if await recount.end(prompts.held + jobs.held):
            _log.info("recounted", tenant=tenant)
        deleted = await garbage.collect(unused_for_seconds=self._min_age_seconds)
        await self._store.sweep_blobs(tenant, older_than_seconds=self._min_age_seconds)
        num_trimmed = await trim_events(self._store, events_log(tenant))
        await self._note_day(tenant)
        num_jobs = await old_jobs.forget(self._store)
        if tenant == PUBLIC_TENANT:
            num_trimmed += await trim_signals(self._store) + await trim_changes(self._store)
            num_trimmed += await trim_events(self._store, ERASURES_LOG, keep_newest=True)
            num_trimmed += await trim_calls(self._store)
        self._metrics.count(len(deleted), num_trimmed, num_jobs)

    async def _note_day(self, tenant: str) -> None:
        """Note what lies in the store today, drop the counts of days gone by."""
        today = day_of(time.time())
        await note_stored_bytes(self._store, tenant, today)
        days = await self._store.scan(held_key(tenant, f"{TRAINING_STEPS}:"))
        past = [one.key for one in days if one.key < held_key(tenant, steps_of(today))]
        if past:
            await self._store.transact(deletes=past)

    async def _retention(self) -> Retention | None:
        """Return what prompts are held against in this round; None where all are kept, or it was looked at today."""
        if self._keep_versions is None and self._unused_days is None:
            return None
        if not await self._has_turn(RETENTION_TURN, RETENTION_SECONDS):
            return None
        retention = Retention(self._store, keep_versions=self._keep_versions, unused_days=self._unused_days)
        await retention.look()
        return retention

    async def _prune(self, retention: Retention, tenant: str) -> None:
        pruned = await retention.apply(tenant)
        if pruned.names or pruned.versions:
            _log.info("pruned", tenant=tenant, prompts=len(pruned.names), versions=len(pruned.versions))

    def _failed(self, error: Exception) -> None:
        _log.warning("housekeeping_failed", exc_info=error)
        self._metrics.count_failure()
