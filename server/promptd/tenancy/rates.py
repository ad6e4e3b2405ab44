"""Rates over all servers, exact and cheap: each server takes a part of a minute's allowance from the store at a time.

An allowance belongs to a minute of the clock. What a server has taken it gives out without asking anybody; the sum of
what all have taken never exceeds the limit, so neither does what is given out. What a server has not given out by the
end of the minute is lost with it. While the store is away each server counts alone, up to the whole limit.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from promptd_store import Check, CheckFailedError, Put, Store, StoreUnavailableError

from promptd.errors import QuotaError, RateLimitError
from promptd.tenancy.store_keys import rate_key

WINDOW_SECONDS = 60
NUM_PARTS = 16
"""A server takes at least a sixteenth of the limit: at most so many steps in the store a minute and tenant."""
MAX_TRIES = 1000
MAX_WINDOWS = 20_000


@dataclass(frozen=True, slots=True)
class RateReading:
    """What is left, for the headers of an answer."""

    limit: int
    remaining: int
    reset_seconds: float
    minute: int


@dataclass(slots=True)
class _Window:
    """One minute of one allowance on this server."""

    minute: int
    taken: int = 0
    """From the store, by this server."""
    given: int = 0
    gone: int = 0
    """From the store, by all servers, when last looked; it only grows."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class RateMeter:
    """Gives out requests and tokens. All methods run on one event loop."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._windows: OrderedDict[tuple[str, str], _Window] = OrderedDict()

    async def take(self, tenant: str, kind: str, limit: int, amount: int) -> RateReading:
        """Take so much of this minute's allowance; takes nothing and raises `RateLimitError` where it is not there."""
        if amount > limit:
            raise QuotaError(
                f"this request takes up to {amount} {kind}, the limit is {limit} {kind} per minute",
                code=f"too_many_{kind}_at_once",
            )
        window = self._window(tenant, kind)
        if window.taken - window.given < amount:  # no await between the look and the taking where there is enough
            async with window.lock:
                try:
                    window = await self._refill(tenant, kind, limit, amount)
                except StoreUnavailableError:
                    window = self._window(tenant, kind)
                    if window.given + amount <= limit:
                        window.taken = max(window.taken, window.given + amount)
        if window.given + amount > limit:  # this server counts alone, or the limit was lowered below what it had taken
            raise self._exceeded(kind, limit, window)
        window.given += amount
        return self._reading(window, limit)

    def give_back(self, tenant: str, kind: str, amount: int, minute: int) -> None:
        """Return what was taken of a minute and not used; where it is over it is lost."""
        window = self._windows.get((tenant, kind))
        if window is not None and window.minute == minute:
            window.given = max(0, window.given - amount)

    def reading(self, tenant: str, kind: str, limit: int) -> RateReading:
        """Return what is left now."""
        return self._reading(self._window(tenant, kind), limit)

    def _window(self, tenant: str, kind: str) -> _Window:
        key, minute = (tenant, kind), int(self._clock() // WINDOW_SECONDS)
        window = self._windows.get(key)
        if window is None or window.minute != minute:
            window = self._windows[key] = _Window(minute)
            if len(self._windows) > MAX_WINDOWS:
                self._windows.popitem(last=False)
        self._windows.move_to_end(key)
        return window

    def _reading(self, window: _Window, limit: int) -> RateReading:
        remaining = min(limit, window.taken - window.given + max(0, limit - window.gone))
        return RateReading(limit, max(0, remaining), self._seconds_left(), window.minute)

    def _seconds_left(self) -> float:
        return WINDOW_SECONDS - self._clock() % WINDOW_SECONDS

    async def _refill(self, tenant: str, kind: str, limit: int, amount: int) -> _Window:
        """Return a window with room for the amount, taking a part of the allowance from the store."""
        key = rate_key(tenant, kind)
        for _ in range(MAX_TRIES):
            window = self._window(tenant, kind)  # another request may have refilled it, or the minute is over
            missing = amount - (window.taken - window.given)
            if missing <= 0:
                return window
            if limit - window.gone < missing:
                raise self._exceeded(kind, limit, window)
            stored = await self._store.get(key)
            plain = {"number": 0, "taken": 0} if stored is None else json.loads(stored.value)
            # Where another server's next minute has begun already this one takes of that: none is counted anew.
            minute = window.minute + (plain["number"] == window.minute + 1)
            window.gone = plain["taken"] if plain["number"] == minute else 0
            if limit - window.gone < missing:
                raise self._exceeded(kind, limit, window)
            part = min(limit - window.gone, max(missing, math.ceil(limit / NUM_PARTS)))
            value = json.dumps({"number": minute, "taken": window.gone + part}).encode()
            try:
                await self._store.transact([Check(key, None if stored is None else stored.etag)], [Put(key, value)])
            except CheckFailedError:
                continue
            window.gone += part
            window.taken += part
        raise StoreUnavailableError(f"the {kind} of tenant {tenant!r} are taken by too many servers at once")

    def _exceeded(self, kind: str, limit: int, window: _Window) -> RateLimitError:
        wait = self._seconds_left()
        return RateLimitError(
            f"the limit of {limit} {kind} per minute is reached",
            code=f"{kind}_per_minute_exceeded",
            retry_after_seconds=max(1, math.ceil(wait)),
            headers=rate_headers(kind, self._reading(window, limit)),
        )


def rate_headers(kind: str, reading: RateReading) -> dict[str, str]:
    """Return the headers that OpenAI's clients know."""
    return {
        f"x-ratelimit-limit-{kind}": str(reading.limit),
        f"x-ratelimit-remaining-{kind}": str(reading.remaining),
        f"x-ratelimit-reset-{kind}": f"{reading.reset_seconds:.3f}s",
    }
