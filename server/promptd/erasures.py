"""What is erased leaves this server's memory: files of prompts, resident keys and values, running requests."""

from __future__ import annotations

import asyncio
import time

import structlog
from promptd_store import PromptCatalog, StoreError

from promptd.engine.async_engine import AsyncEngine
from promptd.tenancy import ERASURES_LOG, Erasure, salt_of

POLL_SECONDS = 0.2
AGAIN_SECONDS = (2.0, 10.0, 60.0, 600.0)
"""Each erasure is made again: a request that had found the prompt before may have come to the engine since."""
PAGE = 1000

_log = structlog.get_logger("promptd.erasures")


class Forgetter:
    """Follows the log of erasures. A server that starts later has nothing in memory to forget; a worker no engine."""

    def __init__(self, catalog: PromptCatalog, engine: AsyncEngine | None) -> None:
        self._catalog = catalog
        self._engine = engine
        self._cursor: int | None = None
        self._again: list[tuple[float, Erasure]] = []

    async def forget(self, erasure: Erasure) -> int:
        """Drop it here; return how many prompts were resident."""
        self._catalog.forget(erasure.tenant, None if erasure.is_whole else (*erasure.versions, *erasure.spread))
        if self._engine is None:
            return 0
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
            await asyncio.sleep(POLL_SECONDS)

    async def poll(self) -> None:
        """Read the log once."""
        store = self._catalog.store
        if self._cursor is None:
            newest = await store.read_tail(ERASURES_LOG, limit=1)
            self._cursor = newest[0].seq if newest else 0
        while page := await store.read_log(ERASURES_LOG, after=self._cursor, limit=PAGE):
            for event in page:
                erasure = Erasure.from_bytes(event.payload)
                num_resident = await self.forget(erasure)
                self._again += [(time.monotonic() + seconds, erasure) for seconds in AGAIN_SECONDS]
                _log.info("erased", tenant=erasure.tenant, is_whole=erasure.is_whole, num_resident=num_resident)
            self._cursor = page[-1].seq

    async def _repeat(self) -> None:
        now = time.monotonic()
        due = [erasure for at, erasure in self._again if at <= now]
        self._again = [one for one in self._again if one[0] > now]
        for erasure in due:
            await self.forget(erasure)
