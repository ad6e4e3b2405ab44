"""What this server knows about tenants, kept in memory and never older than a second.

Every change of a tenant is an entry of one log. This server reads that log a few times a second, whatever the number of
tenants, and drops what was changed. While the log cannot be read, nothing is trusted longer than `MAX_STALE_SECONDS`
without being read again; and while the store does not answer at all, what was known stays good: keys for
`MAX_OUTAGE_SECONDS`, limits for as long as that lasts.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable

from promptd_store import LogTail, StoreUnavailableError

from promptd.tenancy.book import Deed, TenantBook
from promptd.tenancy.limits import NO_LIMITS
from promptd.tenancy.store_keys import CHANGES_LOG
from promptd.tenancy.tenant import Tenant

POLL_SECONDS = 0.2
MAX_STALE_SECONDS = 0.6
"""With the poll before it, a change is known everywhere in less than a second."""
MAX_OUTAGE_SECONDS = 30.0
MAX_KNOWN = 20_000


class TenantDirectory:
    """A cache of the book. All methods run on one event loop."""

    def __init__(self, book: TenantBook, clock: Callable[[], float] = time.monotonic) -> None:
        self.book = book
        self._clock = clock
        self._tenants: OrderedDict[str, tuple[Tenant, float]] = OrderedDict()  # with the time of reading
        self._owners: OrderedDict[str, str] = OrderedDict()  # never changes: ids of keys are not given twice
        self._num_changes = 0
        self._changes = LogTail(CHANGES_LOG)
        self._polled_at = float("-inf")

    async def tenant(self, name: str, *, max_outage_seconds: float = MAX_OUTAGE_SECONDS) -> Tenant:
        """Return a tenant as it was less than a second ago, or, for so long an outage of the store, before that."""
        known = self.known(name)
        if known is not None:
            return known
        now, num_changes = self._clock(), self._num_changes
        try:
            tenant = await self.book.read(name)
        except StoreUnavailableError:
            stale = self._tenants.get(name)
            if stale is None or now - max(stale[1], self._polled_at) > max_outage_seconds:
                raise
            return stale[0]
        if num_changes == self._num_changes:  # else it may have been read before a change that was dropped already
            self._tenants[name] = (tenant, now)
            self._tenants.move_to_end(name)
            if len(self._tenants) > MAX_KNOWN:
                self._tenants.popitem(last=False)
        return tenant

    def known(self, name: str) -> Tenant | None:
        """Return a tenant where no look into the store is needed."""
        found = self._tenants.get(name)
        if found is None or self._clock() - max(found[1], self._polled_at) > MAX_STALE_SECONDS:
            return None
        return found[0]

    def weight_of(self, name: str) -> float:
        """Return a tenant's part of the batch, as it is known here now."""
        known = self.known(name)
        return known.limits.weight if known is not None else NO_LIMITS.weight

    def known_owner(self, key_id: str) -> str | None:
        """Return the tenant that a key was issued to where no look into the store is needed."""
        return self._owners.get(key_id)

    async def owner_of(self, key_id: str) -> str | None:
        """Return the tenant that a key was issued to."""
        owner = self.known_owner(key_id)
        if owner is None:
            owner = await self.book.owner_of(key_id)
            if owner is not None:
                self._owners[key_id] = owner
                if len(self._owners) > MAX_KNOWN:
                    self._owners.popitem(last=False)
        return owner

    async def change(self, name: str, by: str, step: Callable[[Tenant], tuple[Tenant, Deed] | None]) -> Tenant:
        """Change a record as `TenantBook.change` does, and know it here at once."""
        changed = await self.book.change(name, by, step)
        self._forget(name)
        return changed

    async def follow(self) -> None:
        """Drop what others change, until cancelled."""
        while True:
            with contextlib.suppress(StoreUnavailableError):  # nothing is trusted for long without a poll
                await self.poll()
            await asyncio.sleep(POLL_SECONDS)

    async def poll(self) -> None:
        """Read the log of changes once."""
        began, store = self._clock(), self.book.store
        if await self._changes.begin(store):
            self._num_changes += 1
            self._tenants.clear()  # what was read before the log's end was known
        async for event in self._changes.news(store):
            self._forget(event.payload.decode())
        self._polled_at = began

    def _forget(self, name: str) -> None:
        self._num_changes += 1
        self._tenants.pop(name, None)
