"""What is erased leaves this server's memory: files of prompts, resident keys and values, running requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog
from promptd_store import LogTail, PromptCatalog, StoreError

from promptd.engine.async_engine import AsyncEngine
from promptd.tenancy import ERASURES_LOG, Erasure, salt_of

POLL_SECONDS = 0.2
AGAIN_SECONDS = (2.0, 10.0, 60.0, 600.0)
"""Each erasure is made again: a request that had found the prompt before may have come to the engine since."""

_log = structlog.get_logger("promptd.erasures")


class Forgetter:
    """Follows the log of erasures. A server that starts later has nothing in memory to forget."""

    def __init__(
        self,
        catalog: PromptCatalog,
        engine: AsyncEngine,
        acknowledge: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        """`acknowledge` is told up to which erasure of the log all is forgotten."""
        self._catalog = catalog
        self._engine = engine
        self._acknowledge = acknowledge
        self._acknowledged: int | None = None
        self._news = asyncio.Event()
        self._tail = LogTail(ERASURES_LOG)
        self._again: list[tuple[float, Erasure]] = []

    async def forget(self, erasure: Erasure) -> int:
        """Drop at once what this server itself erases, and return how many prompts were resident."""
        num_resident = await self._drop(erasure)
        self._news.set()
        return num_resident

    async def _drop(self, erasure: Erasure) -> int:
        self._catalog.forget(erasure.tenant, None if erasure.is_whole else (*erasure.versions, *erasure.spread))
        versions = None if erasure.is_whole else erasure.versions
        return await self._engine.erase(salt_of(erasure.tenant), versions, erasure.spread)

    async def follow(self) -> None:
        """Forget what others erase, until cancelled; while the store is away, later."""
        while True:
            try:
                await self.poll()
                await self._repeat()
            except StoreError as error:
                _log.debug("erasures_not_read", error=error.message)
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._news.wait()

    async def poll(self) -> None:
        """Read the log once, and acknowledge what is new in it."""
        self._news.clear()
        async for event in self._tail.news(self._catalog.store):
            erasure = Erasure.from_bytes(event.payload)
            num_resident = await self._drop(erasure)
            self._again += [(time.monotonic() + seconds, erasure) for seconds in AGAIN_SECONDS]
            _log.info("erased", tenant=erasure.tenant, is_whole=erasure.is_whole, num_resident=num_resident)
        if self._acknowledge is not None and self._acknowledged != self._tail.seq:
            await self._acknowledge(self._tail.seq or 0)
            self._acknowledged = self._tail.seq

    async def _repeat(self) -> None:
        now = time.monotonic()
        due = [erasure for at, erasure in self._again if at <= now]
        self._again = [one for one in self._again if one[0] > now]
        for erasure in due:
            await self._drop(erasure)
