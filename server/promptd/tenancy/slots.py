"""Requests that one tenant may have open at a time, on all servers together.

Each server holds some of a tenant's slots. Those that it does not need any more it gives back a little later, so that
steady work costs no step in the store. While the store is away each server counts alone, up to the whole limit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from promptd_store import Store, StoreUnavailableError

from promptd.errors import RateLimitError
from promptd.tenancy.parted import Part, PartedNumber
from promptd.tenancy.rounds import keep_doing
from promptd.tenancy.store_keys import slots_key

SETTLE_SECONDS = 2.0
"""How often slots are renewed and those not needed given back."""
NUM_PARTS = 16


@dataclass(slots=True)
class _Holding:
    """A tenant's slots on this server."""

    part: Part = field(default_factory=Part)
    used: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class SlotPool:
    """Owner of this server's slots. All methods run on one event loop."""

    def __init__(self, store: Store, server_id: str, clock: Callable[[], float] = time.time) -> None:
        self._numbers = PartedNumber(store, server_id, slots_key, clock)
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
                    with suppress(StoreUnavailableError):  # then this server counts alone
                        await self._take(tenant, holding, limit)
                break
        if holding.used >= limit:  # the store is away, or the limit was lowered below what is held
            raise _full(limit)
        holding.used += 1

    def leave(self, tenant: str) -> None:
        """Free a slot; it stays this server's for a while."""
        self._holdings[tenant].used -= 1

    async def settle(self) -> None:
        """Renew the slots in use, give the others back."""
        for tenant, holding in list(self._holdings.items()):
            async with holding.lock:
                part = holding.part
                if part.held or holding.used:
                    await self._numbers.hold(tenant, part, holding.used, holding.used)
                if not part.held and not holding.used and self._holdings.get(tenant) is holding:
                    del self._holdings[tenant]

    async def keep(self) -> None:
        """Settle every few seconds, until cancelled."""
        await keep_doing(self.settle, SETTLE_SECONDS)  # what is held runs out by itself

    def _has_free(self, holding: _Holding) -> bool:
        return holding.used < holding.part.held and self._clock() < holding.part.until

    async def _take(self, tenant: str, holding: _Holding, limit: int) -> None:
        wanted = holding.used + max(1, limit // NUM_PARTS)
        if await self._numbers.hold(tenant, holding.part, wanted, holding.used, limit) <= holding.used:
            raise _full(limit)


def _full(limit: int) -> RateLimitError:
    return RateLimitError(
        f"{limit} requests are open already, as many as there may be at a time",
        code="too_many_concurrent_requests",
        retry_after_seconds=1,
    )
