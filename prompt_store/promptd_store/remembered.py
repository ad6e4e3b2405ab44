"""What names meant when the store last answered: prompts that are in memory are served on while it is away.

Every request asks the store, so this is never looked at while the store answers. Every move of a name is an entry of
one log, which this server reads twice a second: what was deleted or moved before the store went away is not served
after.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable

from promptd_store.base import Store
from promptd_store.errors import StoreUnavailableError
from promptd_store.log_tail import LogTail
from promptd_store.names import CHANGES_LOG
from promptd_store.record import PromptRecord

POLL_SECONDS = 0.5
OUTAGE_SECONDS = 300.0
MAX_NAMES = 50_000


class RememberedNames:
    """Lives on one event loop. Knows nothing until `follow` runs."""

    def __init__(self, outage_seconds: float = OUTAGE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._outage_seconds = outage_seconds
        self._clock = clock
        self._records: OrderedDict[tuple[str, str], PromptRecord] = OrderedDict()
        self._by_name: dict[str, set[tuple[str, str]]] = {}
        self._changes = LogTail(CHANGES_LOG)
        self._heard_at = float("-inf")
        self.num_changes = 0
        """Grows with every change that was heard of; `keep` compares it."""

    def keep(self, viewer: str, ref: str, record: PromptRecord, num_changes: int) -> None:
        """Remember what a reference meant; not where a change was heard of since `num_changes`."""
        if self._changes.seq is None or num_changes != self.num_changes:
            return
        key = (viewer, ref)
        self._records[key] = record
        self._records.move_to_end(key)
        self._by_name.setdefault(record.name, set()).add(key)
        if len(self._records) > MAX_NAMES:
            self._drop(*self._records.popitem(last=False))

    def recall(self, viewer: str, ref: str) -> PromptRecord | None:
        """Return what a reference meant, unless the store was last heard of too long ago."""
        if self._clock() - self._heard_at > self._outage_seconds:
            return None
        return self._records.get((viewer, ref))

    def forget(self, tenant: str, name: str, revision: int) -> None:
        """Drop every meaning of a name that is older than this move; whose name is meant may have changed, too."""
        self.num_changes += 1
        for key in list(self._by_name.get(name, ())):
            record = self._records[key]
            if record.tenant == tenant and record.is_current and int(record.etag.partition("-")[0]) >= revision:
                continue  # read after the move, of which this server hears only now
            del self._records[key]
            self._drop(key, record)

    def forget_tenant(self, tenant: str) -> None:
        """Drop all that a tenant's names meant, and what it saw."""
        self.num_changes += 1
        for key in [key for key, record in self._records.items() if tenant in (record.tenant, key[0])]:
            self._drop(key, self._records.pop(key))

    async def follow(self, store: Store) -> None:
        """Forget what others change, until cancelled."""
        while True:
            with contextlib.suppress(StoreUnavailableError):
                await self.poll(store)
            await asyncio.sleep(POLL_SECONDS)

    async def poll(self, store: Store) -> None:
        """Read the log of changes once."""
        began = self._clock()
        async for event in self._changes.news(store):
            tenant, name, revision = event.payload.decode().split("/")
            self.forget(tenant, name, int(revision))
        self._heard_at = began

    def _drop(self, key: tuple[str, str], record: PromptRecord) -> None:
        keys = self._by_name.get(record.name, set())
        keys.discard(key)
        if not keys:
            self._by_name.pop(record.name, None)
