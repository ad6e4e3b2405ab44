"""Reads and changes the records of tenants: each change is one atomic step with its audit entry."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from promptd_store import (
    Append,
    Check,
    CheckFailedError,
    Put,
    Store,
    StoreUnavailableError,
    TenantErasedError,
    check_tenant,
)
from promptd_store.names import PUBLIC_TENANT

from promptd.errors import ConflictError
from promptd.tenancy.audit import AuditEntry, digest_of, is_unbroken, read_payloads
from promptd.tenancy.store_keys import CHANGES_LOG, KEY_SECRET, audit_log, owner_key, tenant_key
from promptd.tenancy.tenant import Tenant

MAX_TRIES = 100


@dataclass(frozen=True, slots=True)
class Deed:
    """What a change does beside the tenant's record, and how the audit log tells it."""

    action: str
    details: Mapping[str, Any]
    puts: Sequence[Put] = ()
    deletes: Sequence[str] = ()


class TenantBook:
    """The one writer of tenants' records."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self.store = store
        self.clock = clock

    async def read(self, name: str) -> Tenant:
        """Return a tenant; one that was never mentioned has nothing."""
        stored = await self.store.get(tenant_key(name))
        return Tenant(name) if stored is None else Tenant.from_bytes(stored.value)

    async def list(self) -> list[Tenant]:
        """Return all tenants that have a record, by name."""
        return [Tenant.from_bytes(stored.value) for stored in await self.store.scan(tenant_key(""))]

    async def owner_of(self, key_id: str) -> str | None:
        """Return the tenant that a key was issued to."""
        stored = await self.store.get(owner_key(key_id))
        return None if stored is None else stored.value.decode()

    async def change(self, name: str, by: str, step: Callable[[Tenant], tuple[Tenant, Deed] | None]) -> Tenant:
        """Change a record; `step` gets the present one and may be asked again. None: there is nothing to change."""
        if check_tenant(name) == PUBLIC_TENANT:
            raise ConflictError(f"tenant {name!r} is reserved", param="tenant", code="tenant_reserved")
        for _ in range(MAX_TRIES):
            stored = await self.store.get(tenant_key(name))
            before = Tenant(name) if stored is None else Tenant.from_bytes(stored.value)
            done = step(before)
            if done is None:
                return before
            if before.erased_at is not None:
                raise TenantErasedError(name)
            after, deed = done
            entry = AuditEntry(self.clock(), by, deed.action, name, deed.details, before.audit_head).to_bytes()
            after = replace(after, audit_head=digest_of(entry))
            try:
                await self.store.transact(
                    [Check(tenant_key(name), None if stored is None else stored.etag)],
                    [*deed.puts, Put(tenant_key(name), after.to_bytes())],
                    deed.deletes,
                    [Append(CHANGES_LOG, name.encode()), Append(audit_log(name), entry)],
                )
            except CheckFailedError:
                continue
            return after
        raise StoreUnavailableError(f"tenant {name!r} is being changed by too many writers at once", param="tenant")

    async def is_intact(self, name: str) -> bool:
        """Return whether a tenant's audit log is what was written: nothing changed, missing or added."""
        for _ in range(MAX_TRIES):
            head = (await self.read(name)).audit_head
            payloads = await read_payloads(self.store, name)
            if (await self.read(name)).audit_head == head:  # else a deed came in between
                return is_unbroken(payloads, head)
        raise StoreUnavailableError(f"tenant {name!r} is being changed too often to be checked", param="tenant")

    async def has_keys(self) -> bool:
        """Return whether any key was ever issued."""
        return bool(await self.store.scan(owner_key(""), limit=1))

    async def key_secret(self) -> bytes:
        """Return the secret that keys are hashed under; the first server to ask makes it."""
        for _ in range(MAX_TRIES):
            stored = await self.store.get(KEY_SECRET)
            if stored is not None:
                return stored.value
            try:
                await self.store.transact([Check(KEY_SECRET, None)], [Put(KEY_SECRET, secrets.token_bytes(32))])
            except CheckFailedError:  # another server made it
                continue
        raise StoreUnavailableError("the secret of the API keys cannot be read")
