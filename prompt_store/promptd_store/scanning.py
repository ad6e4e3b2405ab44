"""Walks through a store, a page at a time: never all of it in memory. What is written ahead of the walker comes too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from promptd_store.base import Record, Store

PAGE = 500
SHOWN_AT_ONCE = 32
"""Records that are looked at before the event loop's other tasks have their turn."""
_LAST_CHAR = "\U0010ffff"


async def scan_tenants(store: Store) -> AsyncIterator[str]:
    """Yield every tenant that has a record, in order; one look-up each."""
    after = ""
    while page := await store.scan("{", after=after, limit=1):
        tenant = page[0].key[1:].partition("}")[0]
        yield tenant
        after = f"{{{tenant}}}{_LAST_CHAR}"


async def scan_records(store: Store, prefix: str, *, after: str = "") -> AsyncIterator[Record]:
    """Yield the records whose key starts with `prefix` and is greater than `after`, in order."""
    while page := await store.scan(prefix, after=after, limit=PAGE):
        for record in page:
            yield record
        after = page[-1].key


async def show_records(store: Store, tenant: str, *viewers: Callable[[Record], None], share: float = 1.0) -> None:
    """Show all records of a tenant to everybody who has to see them: each is read once.

    With a `share` below 1 this takes no more than that part of the time, and leaves the rest to whoever is served.
    """
    num_shown, began = 0, time.monotonic()
    async for record in scan_records(store, f"{{{tenant}}}:"):
        for see in viewers:
            see(record)
        num_shown += 1
        if num_shown % SHOWN_AT_ONCE == 0:
            await asyncio.sleep((time.monotonic() - began) * (1 / share - 1))
            began = time.monotonic()
