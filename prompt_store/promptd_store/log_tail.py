"""A log that is followed by looking at it now and then: what has been appended since the last look."""

from __future__ import annotations

from collections.abc import AsyncIterator

from promptd_store.base import Event, Store

PAGE = 1000


class LogTail:
    """Begins at the log's present end. Belongs to one event loop."""

    def __init__(self, log: str) -> None:
        self._log = log
        self.seq: int | None = None
        """Up to where it was read; None before the first look: what is appended then may be missed."""

    async def begin(self, store: Store) -> bool:
        """Find the end; return whether this was the first look."""
        if self.seq is not None:
            return False
        newest = await store.read_tail(self._log, limit=1)
        self.seq = newest[0].seq if newest else 0
        return True

    async def news(self, store: Store) -> AsyncIterator[Event]:
        """Yield what is new, in order; a page that its reader did not get through comes again."""
        await self.begin(store)
        while page := await store.read_log(self._log, after=self.seq or 0, limit=PAGE):
            for event in page:
                yield event
            self.seq = page[-1].seq
