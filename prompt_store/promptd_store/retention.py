"""What is kept of prompts where there is too much: the newest versions, and what is used."""

from __future__ import annotations

import time
from collections.abc import Callable, Container

from promptd_store.base import Check, Store
from promptd_store.errors import CheckFailedError
from promptd_store.holdings import STORED_BYTES, hold
from promptd_store.namebook import NameBook
from promptd_store.names import digest_key, prompt_key, version_key, versions_prefix
from promptd_store.record import PromptName, PromptRecord
from promptd_store.scanning import scan_records, scan_tenants


async def prune_versions(store: Store, tenant: str, *, keep: int) -> list[str]:
    """Delete all but the newest `keep` versions of each of a tenant's names; return what went, as `name@number`.

    What a name points to for any base model stays, and so does what another prompt stands behind. A name that moves
    meanwhile is left for the next time.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    needed: set[str] | None = None
    gone = []
    prefix = prompt_key(tenant, "")
    async for stored in scan_records(store, prefix):
        name, state = stored.key.removeprefix(prefix), PromptName.from_bytes(stored.value)
        if state.next_number - 1 <= keep:  # it never had more
            continue
        current = {one.number for one in state.current.values()}
        found = await store.scan(versions_prefix(tenant, name))
        for record in (PromptRecord.from_bytes(one.value) for one in found[:-keep]):
            if record.number in current:
                continue
            if needed is None:  # read only where something may go: it takes a look at all prompts of all tenants
                needed = await _stood_behind(store)
            if f"{tenant}/{name}@{record.version}" in needed:
                continue
            deletes = [version_key(tenant, name, record.number)]
            number = await store.get(digest_key(tenant, name, record.version))
            if number is not None and int(number.value) == record.number:
                deletes.append(number.key)
            try:
                freed = hold(tenant, STORED_BYTES, -record.held_bytes)
                await store.transact([Check(stored.key, stored.etag)], deletes=deletes, adds=[freed])
            except CheckFailedError:
                break
            gone.append(f"{name}@{record.number}")
    return gone


async def prune_unused(
    store: Store,
    tenant: str,
    *,
    used: Container[str],
    not_since: float,
    clock: Callable[[], float] = time.time,
) -> list[str]:
    """Delete a tenant's names, all versions of each, that are of no use; return them.

    A name stays that is in `used`, that has a version published after `not_since` (seconds since 1970), or that
    another prompt stands behind. One that moves meanwhile is left for the next time.
    """
    book = NameBook(store)
    needed: set[str] | None = None
    gone = []
    for stored in await book.names(tenant):
        if not stored.state.current or stored.name in used:
            continue
        records = await book.versions(tenant, stored.name)
        if not records or any(record.created_at > not_since for record in records):
            continue
        if needed is None:  # as above
            needed = {one.rpartition("@")[0] for one in await _stood_behind(store)}
        if f"{tenant}/{stored.name}" in needed:
            continue
        event = {"type": "prompt.expired", "version": records[-1].version, "at": int(clock())}
        try:
            await book.remove(stored, records, event)
        except CheckFailedError:
            continue
        gone.append(stored.name)
    return gone


async def _stood_behind(store: Store) -> set[str]:
    """Return the exact names that any prompt of any tenant stands behind."""
    needed: set[str] = set()
    async for tenant in scan_tenants(store):
        async for stored in scan_records(store, versions_prefix(tenant)):
            needed.update(PromptRecord.from_bytes(stored.value).behind)
    return needed
