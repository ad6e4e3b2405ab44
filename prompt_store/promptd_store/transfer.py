"""Everything in one store into another: moving from a folder to Redis, backups, restores. The source may be in use.

Blobs go first, then the records that name them, then the events; what is in the target already is not sent again. Each
pass takes over what the one before missed, deletions too, until one finds nothing: then the target is what the source
was at that moment. Whoever moves for good stops the writers before the last run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from promptd_store.base import Append, Check, Put, Record, Store
from promptd_store.errors import BlobNotFoundError, StoreNotEmptyError
from promptd_store.garbage import digests_of
from promptd_store.names import PUBLIC_TENANT
from promptd_store.scanning import PAGE, scan_tenants

CURSOR = f"{{{PUBLIC_TENANT}}}:copied-events"
"""In the target: the seq of the source up to which events were copied. Its being there says that this is a copy."""
MAX_PASSES = 10


@dataclass(frozen=True, slots=True)
class Transferred:
    """What one pass has done."""

    num_blobs: int = 0
    num_records: int = 0
    num_deleted: int = 0
    num_events: int = 0
    num_missing: int = 0
    """Blobs that a record of the source names and that the source does not have, or has only damaged."""

    @property
    def is_still(self) -> bool:
        """Whether nothing had to be done."""
        return not (self.num_blobs or self.num_records or self.num_deleted or self.num_events)


async def copy_store(
    source: Store, target: Store, *, on_pass: Callable[[Transferred], None] = lambda done: None
) -> Transferred:
    """Make the target a copy of the source; return what the last pass did.

    `is_still` False means that the source was written to faster than it could be copied. Raises `StoreNotEmptyError`
    for a target that holds records and is no copy: nothing of it is overwritten.
    """
    if await target.get(CURSOR) is None:
        if await target.scan("{", limit=1):
            raise StoreNotEmptyError("the target has records of its own: copy into an empty store, or an older copy")
        await target.transact([Check(CURSOR, None)], [Put(CURSOR, b"0")])
    for _ in range(MAX_PASSES):
        done = await _one_pass(source, target)
        on_pass(done)
        if done.is_still:
            break
    return done


async def _one_pass(source: Store, target: Store) -> Transferred:
    num_blobs = num_records = num_deleted = num_missing = 0
    tenants = [tenant async for tenant in scan_tenants(source)]
    for tenant in tenants:
        held = {blob.digest for blob in await target.scan_blobs(tenant)}
        after = ""
        while page := await source.scan(f"{{{tenant}}}:", after=after, limit=PAGE):
            for digest in sorted({digest for record in page for digest in digests_of(record.value)} - held):
                try:
                    if (
                        await source.find_blob(tenant, digest) is not None
                    ):  # a digest may name no blob: a version, a base model
                        await target.put_blob(tenant, await source.get_blob(tenant, digest))
                        num_blobs += 1
                    held.add(digest)
                except BlobNotFoundError:
                    num_missing += 1
            num_records += await _put_changed(target, page)
            after = page[-1].key
    for tenant in [tenant async for tenant in scan_tenants(target)]:
        num_deleted += await _drop_gone(source, target, tenant)
    return Transferred(num_blobs, num_records, num_deleted, await _copy_events(source, target), num_missing)


async def _put_changed(target: Store, page: Sequence[Record]) -> int:
    """Write those records of a page that the target has not, or has otherwise, in one step."""
    first, last = page[0].key, page[-1].key
    theirs = {record.key: record for record in await _between(target, first, last)}
    changed = [
        record
        for record in page
        if record.key != CURSOR and (record.key not in theirs or theirs[record.key].value != record.value)
    ]
    if changed:
        await target.transact(puts=[Put(record.key, record.value) for record in changed])
    return len(changed)


async def _between(store: Store, first: str, last: str) -> list[Record]:
    """Read the records from one key to another, both of one tenant."""
    tenant = first[: first.index("}") + 1]
    found = [record] if (record := await store.get(first)) is not None else []
    after = first
    while page := await store.scan(tenant, after=after, limit=PAGE):
        inside = [record for record in page if record.key <= last]
        found += inside
        if len(inside) < len(page):
            break
        after = page[-1].key
    return found


async def _drop_gone(source: Store, target: Store, tenant: str) -> int:
    """Delete the target's records that the source no longer has."""
    num_deleted, after = 0, ""
    while page := await target.scan(f"{{{tenant}}}:", after=after, limit=PAGE):
        ours = {record.key for record in await _between(source, page[0].key, page[-1].key)}
        gone = [record for record in page if record.key not in ours and record.key != CURSOR]
        if gone:
            checks = [Check(record.key, record.etag) for record in gone]
            await target.transact(checks, deletes=[record.key for record in gone])
        num_deleted += len(gone)
        after = page[-1].key
    return num_deleted


async def _copy_events(source: Store, target: Store) -> int:
    """Append what happened since; the cursor moves in the same step, so that no event comes twice."""
    num_events = 0
    while True:
        cursor = await target.get(CURSOR)
        if cursor is None:
            raise StoreNotEmptyError("the copy's own mark has gone: another process writes to the target")
        events = await source.read_log("{", after=int(cursor.value), limit=PAGE)
        if not events:
            return num_events
        await target.transact(
            [Check(CURSOR, cursor.etag)],
            [Put(CURSOR, str(events[-1].seq).encode())],
            appends=[Append(event.log, event.payload) for event in events],
        )
        num_events += len(events)
