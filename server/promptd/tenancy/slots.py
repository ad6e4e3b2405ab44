"""Requests that one tenant may have open at a time, on all servers together.

Each server holds some of a tenant's slots in one record, with a time until when: a server that is killed holds them no
longer than that. Slots that it does not need any more it gives back a little later, so that steady work costs no step.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from promptd_store import Check, CheckFailedError, Put, Store, StoreUnavailableError

from promptd.errors import RateLimitError
from promptd.tenancy.store_keys import slots_key

HOLD_SECONDS = 15.0
SETTLE_SECONDS = 2.0
"""How often slots are renewed and those not needed given back."""
NUM_PARTS = 16
MAX_TRIES = 1000


@dataclass(slots=True)
class _Holding:
    """A tenant's slots on this server."""

    held: int = 0
    used: int = 0
    until: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class SlotPool:
    """Owner of this server's slots. All methods run on one event loop."""

    def __init__(self, store: Store, server_id: str, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._server_id = server_id
        self._clock = clock
        self._holdings: dict[str, _Holding] = {}

    async def enter(self, tenant: str, limit: int) -> None:
        """Take a slot; raises `RateLimitError` where all are in use."""
        while True:
            holding = self._holdings.setdefault(tenant, _Holding())
            if self._has_free(holding):
                break
            async with holding.lock:
                if self._holdings.get(tenant) is not holding:
                    continue  # it was forgotten while this request waited
                if not self._has_free(holding):
                    await self._take(tenant, holding, limit)
                break
        if holding.used >= limit:  # the limit was lowered below what is held
            raise _full(limit)
        holding.used += 1

    def leave(self, tenant: str) -> None:
        """Free a slot; it stays this server's for a while."""
        self._holdings[tenant].used -= 1

    async def settle(self) -> None:
        """Renew the slots in use, give the others back."""
        for tenant, holding in list(self._holdings.items()):
            async with holding.lock:
                if holding.held or holding.used:
                    await self._write(tenant, holding, holding.used)
                if not holding.held and not holding.used and self._holdings.get(tenant) is holding:
                    del self._holdings[tenant]

    async def keep(self) -> None:
        """Settle every few seconds, until cancelled."""
        while True:
            await asyncio.sleep(SETTLE_SECONDS)
            try:
                await self.settle()
            except (StoreUnavailableError, CheckFailedError):
                continue  # what is held runs out by itself

    def _has_free(self, holding: _Holding) -> bool:
        return holding.used < holding.held and self._clock() < holding.until

    async def _take(self, tenant: str, holding: _Holding, limit: int) -> None:
        wanted = holding.used + max(1, limit // NUM_PARTS)
        if await self._write(tenant, holding, wanted, limit) <= holding.used:
            raise _full(limit)

    async def _write(self, tenant: str, holding: _Holding, wanted: int, limit: int | None = None) -> int:
        """Hold so many, or what others leave of the limit; return how many."""
        key = slots_key(tenant)
        for _ in range(MAX_TRIES):
            now = self._clock()
            stored = await self._store.get(key)
            plain: Mapping[str, tuple[int, float]] = {} if stored is None else json.loads(stored.value)
            others = {one: held for one, held in plain.items() if one != self._server_id and held[1] > now}
            free = wanted if limit is None else max(0, limit - sum(held[0] for held in others.values()))
            granted = max(min(wanted, free), min(holding.used, holding.held))
            until = now + HOLD_SECONDS
            mine = {self._server_id: (granted, until)} if granted else {}
            checks = [Check(key, None if stored is None else stored.etag)]
            try:
                if others or mine:
                    await self._store.transact(checks, [Put(key, json.dumps({**others, **mine}).encode())])
                elif stored is not None:
                    await self._store.transact(checks, deletes=[key])
            except CheckFailedError:
                continue
            holding.held, holding.until = granted, until
            return granted
        raise StoreUnavailableError(f"the slots of tenant {tenant!r} are taken by too many servers at once")


def _full(limit: int) -> RateLimitError:
    return RateLimitError(
        f"{limit} requests are open already, as many as there may be at a time",
        code="too_many_concurrent_requests",
        retry_after_seconds=1,
    )
