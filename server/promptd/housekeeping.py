"""The background task that throws away what the store no longer needs."""

from __future__ import annotations

import asyncio
import os
import secrets

import structlog
from promptd_store import Store, StoreError, collect_garbage, events_log, scan_tenants, trim_changes, trim_events
from promptd_store.names import PUBLIC_TENANT

from promptd.jobs.retention import forget_old_jobs, trim_signals
from promptd.metrics import HousekeepingMetrics

FIRST_RUN_SECONDS = 5.0
"""After the start, so that a server that is restarted often still gets to it."""
TURN = f"{{{PUBLIC_TENANT}}}:housekeeping"

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
    ) -> None:
        self._store = store
        self._owner = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._metrics = metrics
        self._interval_seconds = interval_seconds
        self._min_age_seconds = min_age_seconds
        self._keep_jobs_seconds = keep_jobs_seconds

    async def run(self) -> None:
        """Clean up until cancelled."""
        wait_seconds = min(FIRST_RUN_SECONDS, self._interval_seconds)
        while True:
            await asyncio.sleep(wait_seconds)
            if await self._has_turn():
                await self.clean_up()
            wait_seconds = self._interval_seconds

    async def _has_turn(self) -> bool:
        """Of all servers over one store, one cleans up in an interval."""
        try:
            return await self._store.acquire_lease(TURN, self._owner, 0.9 * self._interval_seconds) is not None
        except StoreError:
            self._metrics.count_failure()
            return False

    async def clean_up(self) -> None:
        """Go through all tenants once; what goes wrong with one is logged and counted, and the others follow."""
        tenants = scan_tenants(self._store)
        while True:
            try:
                tenant = await anext(tenants, None)
                if tenant is None:
                    return await self._store.erase()
                deleted = await collect_garbage(self._store, tenant, unused_for_seconds=self._min_age_seconds)
                await self._store.sweep_blobs(tenant, older_than_seconds=self._min_age_seconds)
                num_trimmed = await trim_events(self._store, events_log(tenant))
                num_jobs = await forget_old_jobs(self._store, tenant, keep_seconds=self._keep_jobs_seconds)
                if tenant == PUBLIC_TENANT:
                    num_trimmed += await trim_signals(self._store) + await trim_changes(self._store)
            except Exception as error:  # noqa: BLE001 - serving never depends on a clean-up
                _log.warning("housekeeping_failed", exc_info=error)
                self._metrics.count_failure()
            else:
                self._metrics.count(len(deleted), num_trimmed, num_jobs)
