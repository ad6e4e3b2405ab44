"""Delete what nobody needs: blobs that no record names (of deleted prompts and killed publishers), and old events."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Sequence

from promptd_store.base import BlobInfo, Record, Store
from promptd_store.names import CHANGES_LOG
from promptd_store.scanning import show_records

UNUSED_FOR_SECONDS = 24 * 3600.0
KEEP_EVENTS_SECONDS = 7 * 24 * 3600.0
KEEP_CHANGES_SECONDS = 3600.0
"""A server that has not read the store for so long has forgotten what it remembered."""
PAGE = 1000

_DIGEST = re.compile(rb"sha256:[0-9a-f]{64}")


def digests_of(value: bytes) -> set[str]:
    """Return every digest that a record's value contains, of blobs and of other things."""
    return {match.decode() for match in _DIGEST.findall(value)}


class Garbage:
    """Finds a tenant's blobs that no record names, in whatever part of the server. Begin it, then show it all records.

    A writer puts the blob first and the record last; the age limit covers the time in between, because every put
    renews it.
    """

    def __init__(self, store: Store, tenant: str, blobs: Sequence[BlobInfo]) -> None:
        self._store = store
        self._tenant = tenant
        self._unnamed = {blob.digest: blob.last_put for blob in blobs}

    @classmethod
    async def begin(cls, store: Store, tenant: str) -> Garbage:
        """Look which blobs there are."""
        return cls(store, tenant, await store.scan_blobs(tenant))

    def see(self, record: Record) -> None:
        """Keep what a record names."""
        for digest in digests_of(record.value):
            self._unnamed.pop(digest, None)

    async def collect(self, *, unused_for_seconds: float = UNUSED_FOR_SECONDS) -> list[str]:
        """Delete what is left, old enough, and was not put since; return the digests."""
        return [
            digest
            for digest, last_put in self._unnamed.items()
            if await self._store.delete_blob(
                self._tenant, digest, unused_for_seconds=unused_for_seconds, last_put=last_put
            )
        ]


async def collect_garbage(store: Store, tenant: str, *, unused_for_seconds: float = UNUSED_FOR_SECONDS) -> list[str]:
    """Delete a tenant's unreferenced blobs and return their digests."""
    garbage = await Garbage.begin(store, tenant)
    await show_records(store, tenant, garbage.see)
    return await garbage.collect(unused_for_seconds=unused_for_seconds)


async def drop_unnamed(store: Store, tenant: str, digests: Collection[str]) -> int:
    """Delete those of some blobs that no record of the tenant names, now and not when they are old; return how many.

    One that is put or named meanwhile stays. What was set aside of them goes, too.
    """
    last_puts = {digest: info.last_put for digest in digests if (info := await store.find_blob(tenant, digest))}
    unnamed = set(digests)
    await show_records(store, tenant, lambda record: unnamed.difference_update(digests_of(record.value)))
    num_deleted = 0
    for digest in sorted(unnamed):
        if digest in last_puts:
            num_deleted += await store.delete_blob(tenant, digest, last_put=last_puts[digest])
        await store.clear_quarantine(tenant, digest)
    return num_deleted


async def trim_events(
    store: Store,
    log: str,
    *,
    keep_seconds: float = KEEP_EVENTS_SECONDS,
    keep_newest: bool = False,
    clock: Callable[[], float] = time.time,
) -> int:
    """Delete a log's events that are older than this; return how many.

    With `keep_newest` the last of these stays: whoever comes then learns how far the log has come.
    """
    oldest_kept, after = clock() - keep_seconds, 0
    while page := await store.read_log(log, after=after, limit=PAGE):
        old = [event for event in page if event.at < oldest_kept]
        if old:
            after = old[-1].seq
        if len(old) < len(page):
            break
    return await store.trim_log(log, before_seq=after if keep_newest else after + 1)


async def trim_changes(store: Store, *, clock: Callable[[], float] = time.time) -> int:
    """Delete old names of moved prompts, which servers read within seconds; return how many."""
    return await trim_events(store, CHANGES_LOG, keep_seconds=KEEP_CHANGES_SECONDS, clock=clock)
