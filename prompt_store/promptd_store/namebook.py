"""How names and versions lie in the store: every move of a name is one atomic, compare-and-swap step."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TypeVar

from promptd_store.base import Append, Check, Condition, Put, Record, Store
from promptd_store.errors import CheckFailedError, StoreUnavailableError
from promptd_store.holdings import PROMPTS, STORED_BYTES, hold
from promptd_store.names import (
    CHANGES_LOG,
    digest_key,
    events_log,
    granted_key,
    granted_prefix,
    prompt_key,
    public_key,
    version_key,
    versions_prefix,
)
from promptd_store.record import PromptName, PromptRecord
from promptd_store.strict_json import canonical_json

MAX_ATTEMPTS = 100

_T = TypeVar("_T")


class StoredName:
    """A name as read: `etag` is the store's, None where there is no record yet."""

    def __init__(self, tenant: str, name: str, etag: str | None, state: PromptName) -> None:
        self.tenant = tenant
        self.name = name
        self.etag = etag
        self.state = state


class NameBook:
    """Reads and moves names. Which moves are allowed is the catalog's business."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def read(self, tenant: str, name: str) -> StoredName:
        """Read a name; one that never was has the empty state."""
        return _stored(tenant, name, await self._store.get(prompt_key(tenant, name)))

    async def read_many(self, names: Sequence[tuple[str, str]]) -> list[StoredName]:
        """Read names, each a (tenant, name)."""
        records = await self._store.get_many([prompt_key(*one) for one in names])
        return [_stored(*one, record) for one, record in zip(names, records, strict=True)]

    async def names(
        self, tenant: str, *, after: str = "", limit: int | None = None, search: str = ""
    ) -> list[StoredName]:
        """Read names of a tenant, deleted ones too, ordered; with `search` those that have these characters."""
        prefix = prompt_key(tenant, "")
        found = await self._store.scan(prefix, after=prefix + after, limit=limit, containing=search)
        return [_stored(tenant, record.key.removeprefix(prefix), record) for record in found]

    async def version(self, tenant: str, name: str, number: int) -> PromptRecord | None:
        """Read one version."""
        stored = await self._store.get(version_key(tenant, name, number))
        return None if stored is None else PromptRecord.from_bytes(stored.value)

    async def read_versions(self, wanted: Sequence[tuple[StoredName, int]]) -> list[PromptRecord | None]:
        """Read versions by name and number."""
        keys = [version_key(one.tenant, one.name, number) for one, number in wanted]
        found = await self._store.get_many(keys)
        return [None if one is None else PromptRecord.from_bytes(one.value) for one in found]

    async def versions(self, tenant: str, name: str) -> list[PromptRecord]:
        """Read all versions of a name, oldest first."""
        found = await self._store.scan(versions_prefix(tenant, name))
        return [PromptRecord.from_bytes(record.value) for record in found]

    async def number_of(self, tenant: str, name: str, version: str) -> int | None:
        """Return the number that a content digest was last published under."""
        stored = await self._store.get(digest_key(tenant, name, version))
        return None if stored is None else int(stored.value)

    async def public_owner(self, name: str) -> str | None:
        """Return the tenant that a bare public name belongs to."""
        stored = await self._store.get(public_key(name))
        return None if stored is None else stored.value.decode()

    async def public_names(self, *, after: str = "", limit: int, search: str = "") -> list[tuple[str, str]]:
        """Return (owner, name) of bare public names, ordered by name; with `search` as `names` does."""
        prefix = public_key("")
        found = await self._store.scan(prefix, after=prefix + after, limit=limit, containing=search)
        return [(one.value.decode(), one.key.removeprefix(prefix)) for one in found]

    async def granted_names(self, tenant: str) -> list[tuple[str, str]]:
        """Return (owner, name) of all that others share with a tenant, in no order."""
        prefix = granted_prefix(tenant)
        found = [one.key.removeprefix(prefix).split(":") for one in await self._store.scan(prefix)]
        return [(owner, name) for name, owner in found]

    async def move(
        self,
        stored: StoredName,
        moved: PromptName,
        event: dict[str, object],
        *,
        puts: Sequence[Put] = (),
        deletes: Sequence[str] = (),
        checks: Collection[Condition] = (),
        appends: Sequence[Append] = (),
        num_bytes: int = 0,
    ) -> None:
        """Write the moved name, its versions, the public index, the event and `appends` in one transaction.

        `num_bytes` come to what the tenant holds, or go from it. Raises `LimitReachedError`.
        """
        tenant, name = stored.tenant, stored.name
        index_key = public_key(name)
        index = await self._store.get(index_key)
        is_mine = index is not None and index.value.decode() == tenant
        all_checks: list[Condition] = [*checks, Check(prompt_key(tenant, name), stored.etag)]
        all_puts = [*puts, Put(prompt_key(tenant, name), moved.to_bytes())]
        all_deletes = list(deletes)
        if moved.is_public and index is None:
            all_checks.append(Check(index_key, None))
            all_puts.append(Put(index_key, tenant.encode()))
        elif not moved.is_public and index is not None and is_mine:
            all_checks.append(Check(index_key, index.etag))
            all_deletes.append(index_key)
        payload = canonical_json({"tenant": tenant, "name": name, **event}).encode()
        change = f"{tenant}/{name}/{moved.revision}".encode()
        all_appends = [Append(events_log(tenant), payload), Append(CHANGES_LOG, change), *appends]
        amounts = {PROMPTS: bool(moved.current) - bool(stored.state.current), STORED_BYTES: num_bytes}
        adds = [hold(tenant, what, amount) for what, amount in amounts.items() if amount]
        await self._store.transact(all_checks, all_puts, all_deletes, all_appends, adds)

    async def remove(self, stored: StoredName, records: Sequence[PromptRecord], event: dict[str, object]) -> None:
        """Delete a name with all its versions, and leave a tombstone."""
        tenant, name = stored.tenant, stored.name
        deletes = [version_key(tenant, name, record.number) for record in records]
        deletes += sorted({digest_key(tenant, name, record.version) for record in records})
        deletes += [granted_key(grantee, tenant, name) for grantee in stored.state.shared_with]
        size = sum(record.held_bytes for record in records)
        await self.move(stored, stored.state.tombstone(), event, deletes=deletes, num_bytes=-size)

    async def retry(self, tenant: str, name: str, step: Callable[[StoredName], Awaitable[_T]]) -> _T:
        """Run read-check-move until no other writer came in between. Writers of this process queue up."""
        own_keys = (prompt_key(tenant, name), public_key(name))
        lock = self._locks.setdefault(own_keys[0], asyncio.Lock())
        async with lock:
            for _ in range(MAX_ATTEMPTS):
                try:
                    return await step(await self.read(tenant, name))
                except CheckFailedError as error:
                    if error.key not in own_keys:
                        raise
        raise StoreUnavailableError(f"prompt {name!r} is being changed by too many writers at once", param="name")


def _stored(tenant: str, name: str, record: Record | None) -> StoredName:
    if record is None:
        return StoredName(tenant, name, None, PromptName())
    return StoredName(tenant, name, record.etag, PromptName.from_bytes(record.value))
