"""Old versions of prompts: how many of each are kept."""

from __future__ import annotations

from promptd_store.base import Check, Store
from promptd_store.errors import CheckFailedError
from promptd_store.garbage import scan_tenants
from promptd_store.holdings import STORED_BYTES, hold
from promptd_store.names import digest_key, prompt_key, version_key
from promptd_store.record import PromptName, PromptRecord

PAGE = 500


async def prune_versions(store: Store, tenant: str, *, keep: int) -> list[str]:
    """Delete all but the newest `keep` versions of each of a tenant's names; return what went, as `name@number`.

    What a name points to for any base model stays, and so does what another prompt stands behind. A name that moves
    meanwhile is left for the next time.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    needed = await _stood_behind(store)
    gone = []
    prefix = after = prompt_key(tenant, "")
    while page := await store.scan(prefix, after=after, limit=PAGE):
        for stored in page:
            name, state = stored.key.removeprefix(prefix), PromptName.from_bytes(stored.value)
            current = {one.number for one in state.current.values()}
            found = await store.scan(f"{{{tenant}}}:version:{name}:")
            for record in (PromptRecord.from_bytes(one.value) for one in found[:-keep]):
                if record.number in current or f"{tenant}/{name}@{record.version}" in needed:
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
        after = page[-1].key
    return gone


async def _stood_behind(store: Store) -> set[str]:
    """Return the exact names that any prompt of any tenant stands behind."""
    needed: set[str] = set()
    async for tenant in scan_tenants(store):
        prefix = after = f"{{{tenant}}}:version:"
        while page := await store.scan(prefix, after=after, limit=PAGE):
            for stored in page:
                needed.update(PromptRecord.from_bytes(stored.value).behind)
            after = page[-1].key
    return needed
