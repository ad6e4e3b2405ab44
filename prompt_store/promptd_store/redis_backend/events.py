"""Subscriptions: the logs are the truth, a short feed of what was appended where says when to look."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from promptd_store.base import Event
from promptd_store.errors import StoreUnavailableError
from promptd_store.redis_backend.link import RedisLink

LOOK_SECONDS = 1.0
"""How often a log is looked at that the feed is silent about."""
PAUSE_SECONDS = 0.05
"""After a failed look, also where Redis is there but refuses."""
PAGE = 1000

ReadLog = Callable[[str, int, int], Awaitable[tuple[list[Event], int]]]


class RedisSubscription:
    """Reads logs from a cursor. Where Redis goes away it waits, and goes on behind the last event it gave."""

    def __init__(self, prefix: str, after: int, feed: Feed, read_log: ReadLog) -> None:
        self.prefix = prefix
        self._after = after
        self._feed = feed
        self._read_log = read_log
        self._pending: deque[Event] = deque()
        self._woken = asyncio.Event()
        self._ended = False

    def __aiter__(self) -> RedisSubscription:
        return self

    async def __anext__(self) -> Event:
        while not self._ended:
            if self._pending:
                return self._pending.popleft()
            self._woken.clear()
            try:
                # Cursor and buffer change together after the await: a cancelled reader loses nothing.
                events, self._after = await self._read_log(self.prefix, self._after, PAGE)
            except StoreUnavailableError:
                await self._feed.link.until_up()
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            self._pending.extend(events)
            if not events:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):  # wait_for can swallow a cancellation
                        await self._woken.wait()
        raise StopAsyncIteration

    def wake(self) -> None:
        """Look at the logs now."""
        self._woken.set()

    async def aclose(self) -> None:
        """End the iteration."""
        self._ended = True
        self._feed.discard(self)
        self._woken.set()


class Feed:
    """One blocking reader for all subscriptions of a process; runs while there are any."""

    def __init__(self, link: RedisLink, key: str, newest: Callable[[], Awaitable[int]]) -> None:
        self.link = link
        self._key = key
        self._newest = newest
        self._subscriptions: set[RedisSubscription] = set()
        self._reader: asyncio.Task[None] | None = None

    def add(self, subscription: RedisSubscription) -> None:
        """Wake a subscription from now on."""
        self._subscriptions.add(subscription)
        if self._reader is None:
            self._reader = asyncio.create_task(self._read())

    def discard(self, subscription: RedisSubscription) -> None:
        """Stop waking it."""
        self._subscriptions.discard(subscription)
        if not self._subscriptions and self._reader is not None:
            self._reader.cancel()
            self._reader = None

    async def close(self) -> None:
        """End every subscription."""
        reader = self._reader
        for subscription in list(self._subscriptions):
            await subscription.aclose()
        if reader is not None:
            reader.cancel()
            await asyncio.wait({reader})

    async def _read(self) -> None:
        last: bytes | str | None = None
        milliseconds = max(1, round(self.link.block_seconds * 1000))

        def command(client: Any) -> Awaitable[Any]:
            return client.xread({self._key: last}, count=PAGE, block=milliseconds)  # type: ignore[no-any-return]

        while True:
            try:
                if last is None:
                    last = f"{await self._newest()}-0"
                    self._wake_all()  # what came before is read from the logs
                for _, entries in await self.link.block(command) or ():
                    self._wake({fields[b"l"].decode() for _, fields in entries})
                    last = entries[-1][0]
            except StoreUnavailableError:
                last = None
                with contextlib.suppress(StoreUnavailableError):
                    await self.link.until_up()
                await asyncio.sleep(PAUSE_SECONDS)

    def _wake(self, logs: set[str]) -> None:
        for subscription in self._subscriptions:
            if any(log.startswith(subscription.prefix) for log in logs):
                subscription.wake()

    def _wake_all(self) -> None:
        for subscription in self._subscriptions:
            subscription.wake()
