"""Is everything there that the records promise, and is it what it was?"""

from __future__ import annotations

from collections.abc import AsyncIterator

from promptd_store.base import Record, Store
from promptd_store.errors import StoreError
from promptd_store.names import prompt_key, version_key, versions_prefix
from promptd_store.record import PromptName, PromptRecord
from promptd_store.scanning import scan_records, scan_tenants


async def find_faults(store: Store) -> AsyncIterator[str]:
    """Yield one line for each fault: unreadable records, names that point nowhere, blobs that are lost or damaged.

    Every blob is read and checked, so this takes as long as reading the store does; a damaged one is set aside.
    """
    async for tenant in scan_tenants(store):
        bad: set[str] = set()
        for blob in await store.scan_blobs(tenant):
            try:
                await store.get_blob(tenant, blob.digest)
            except StoreError as error:
                bad.add(blob.digest)
                yield f"{tenant}: {error.message}"
        held = {blob.digest for blob in await store.scan_blobs(tenant)}
        names, versions = prompt_key(tenant, ""), versions_prefix(tenant)
        async for record in scan_records(store, f"{{{tenant}}}:"):
            if record.key.startswith(names):
                async for fault in _name_faults(store, tenant, record, record.key.removeprefix(names)):
                    yield fault
            elif record.key.startswith(versions):
                for fault in _version_faults(record, held | bad):
                    yield f"{tenant}: {fault}"


async def _name_faults(store: Store, tenant: str, record: Record, name: str) -> AsyncIterator[str]:
    try:
        state = PromptName.from_bytes(record.value)
    except (ValueError, KeyError, TypeError, StoreError) as error:
        yield f"{tenant}: prompt {name!r} cannot be read: {error}"
        return
    for current in state.current.values():
        if await store.get(version_key(tenant, name, current.number)) is None:
            yield f"{tenant}: prompt {name!r} points to version {current.number}, which is not there"


def _version_faults(record: Record, held: set[str]) -> list[str]:
    try:
        version = PromptRecord.from_bytes(record.value)
    except (ValueError, KeyError, TypeError, StoreError) as error:
        return [f"{record.key} cannot be read: {error}"]
    return [
        f"{version.name}@{version.number} needs blob {digest}, which is not there"
        for digest in sorted(version.digests - held)
    ]
