"""Requests of one tenant that may wait, beside those that run, on all servers together.

Who has to wait is known only between two steps of the engine. So the engine says how many of a tenant wait, and places
for them are taken from the tenant's one number then: while nobody waits, nobody asks. Until the store has answered all
of them wait, no more than the limit; then those without a place are refused, the newest first. While the store is away
each server counts alone, up to the whole limit.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from promptd_store import Store, StoreError

from promptd.tenancy.parted import Part, PartedNumber
from promptd.tenancy.rounds import keep_doing
from promptd.tenancy.slots import SETTLE_SECONDS
from promptd.tenancy.store_keys import places_key


@dataclass(slots=True)
class _Line:
    """A tenant's places on this server."""

    part: Part = field(default_factory=Part)
    num_places: int = 0
    is_asking: bool = False
    is_full: bool = False
    """Whether the last answer was less than asked for, and nobody was refused for it yet."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True, slots=True)
class Places:
    """What a request takes along into the engine: where its tenant's places are, and how many there may be."""

    limit: int
    _pool: PlacePool
    _tenant: str

    def surplus(self, num_waiting: int) -> int:
        """Return how many of those that wait have to go; from the engine's thread, after each of its steps."""
        return self._pool.surplus(self._tenant, num_waiting, self.limit)


class PlacePool:
    """Owner of this server's places. `num_waiting` tells how many of a tenant wait in its engine, from any thread."""

    def __init__(
        self,
        store: Store,
        server_id: str,
        num_waiting: Callable[[str], int],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._numbers = PartedNumber(store, server_id, places_key, clock)
        self._num_waiting = num_waiting
        self._clock = clock
        self._lines: dict[str, _Line] = {}
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._asking: set[asyncio.Task[None]] = set()

    def of(self, tenant: str, limit: int) -> Places:
        """Return what a request of a tenant takes along."""
        return Places(limit, self, tenant)

    def surplus(self, tenant: str, num_waiting: int, limit: int) -> int:
        """Return how many of those that wait have no place; more places are asked for where there may be some."""
        with self._lock:
            line = self._lines.setdefault(tenant, _Line())
            if self._clock() >= line.part.until:  # others may have them by now: this line only gets shorter
                line.num_places = min(line.num_places, num_waiting)
            num_over = num_waiting - min(line.num_places, limit)
            if num_over <= 0:
                return 0
            if line.num_places >= limit or line.is_full:
                line.is_full = False
                return num_over
            if line.is_asking:
                return max(0, num_waiting - limit)
            line.is_asking = True
        self._loop.call_soon_threadsafe(self._ask, tenant, line, min(num_waiting, limit), limit)
        return max(0, num_waiting - limit)

    async def settle(self) -> None:
        """Renew the places of those that wait, give the others back."""
        for tenant, line in list(self._lines.items()):
            async with line.turn:
                with self._lock:  # lowered first: what is given back nobody takes here any more
                    line.num_places = min(line.num_places, self._num_waiting(tenant))
                    line.is_full = line.is_full and self._num_waiting(tenant) > line.num_places
                if line.part.held or line.num_places:
                    await self._numbers.hold(tenant, line.part, line.num_places, line.num_places)
                with self._lock:
                    if not line.part.held and not line.is_asking and not line.is_full:
                        del self._lines[tenant]

    async def keep(self) -> None:
        """Settle every few seconds, until cancelled."""
        await keep_doing(self.settle, SETTLE_SECONDS)  # what is held runs out by itself

    async def close(self) -> None:
        """Give everything back; the engine has ended."""
        while self._asking:
            await asyncio.wait(self._asking)
        await self.settle()

    def _ask(self, tenant: str, line: _Line, wanted: int, limit: int) -> None:
        task = self._loop.create_task(self._grow(tenant, line, wanted, limit))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _grow(self, tenant: str, line: _Line, wanted: int, limit: int) -> None:
        async with line.turn:
            num_places = wanted
            with suppress(StoreError):  # else this server counts alone
                num_places = await self._numbers.hold(tenant, line.part, wanted, line.num_places, limit)
            with self._lock:
                line.num_places = num_places
                line.is_asking, line.is_full = False, min(wanted, self._num_waiting(tenant)) > num_places
