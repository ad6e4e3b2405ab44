"""Issues, rotates and revokes keys. A key in the clear leaves here once and is kept nowhere."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from promptd_store import Put

from promptd.errors import ConflictError, InvalidRequestError, NotFoundError
from promptd.tenancy.api_keys import ApiKey, new_key
from promptd.tenancy.book import Deed
from promptd.tenancy.directory import TenantDirectory
from promptd.tenancy.scopes import GRANTABLE_SCOPES, Scope
from promptd.tenancy.store_keys import owner_key
from promptd.tenancy.tenant import MAX_ACTIVE_KEYS, KeyRecord, Tenant

DEFAULT_GRACE_SECONDS = 24 * 3600.0
"""How long a rotated key still works: time to bring its successor to wherever it is used."""


@dataclass(frozen=True, slots=True)
class Issued:
    """A new key: the text is known to nobody else."""

    tenant: str
    key: ApiKey
    record: KeyRecord


class KeyOffice:
    """What admins do with keys."""

    def __init__(self, directory: TenantDirectory, key_secret: bytes) -> None:
        self._directory = directory
        self._book = directory.book
        self._key_secret = key_secret

    async def issue(
        self,
        tenant: str,
        scopes: Collection[str],
        *,
        by: str,
        expires_in_seconds: float | None = None,
        label: str = "",
    ) -> Issued:
        """Make a key; raises `ConflictError` where the tenant has two that work."""
        granted = _granted(scopes)
        key, now = new_key(), self._book.clock()
        expires_at = None if expires_in_seconds is None else now + expires_in_seconds
        record = KeyRecord(key.id, key.digest(self._key_secret), granted, now, expires_at, label=label)

        def step(before: Tenant) -> tuple[Tenant, Deed]:
            _check_room(before, now)
            details = {"key_id": key.id, "scopes": granted, "expires_at": expires_at}
            owned = Put(owner_key(key.id), tenant.encode())
            return before.with_key(record, now), Deed("key.issued", details, [owned])

        await self._directory.change(tenant, by, step)
        return Issued(tenant, key, record)

    async def rotate(self, key_id: str, *, by: str, grace_seconds: float = DEFAULT_GRACE_SECONDS) -> Issued:
        """Make a successor with the same scopes; the old key works on for a while."""
        tenant = await self._owner(key_id)
        key, now = new_key(), self._book.clock()
        issued: list[KeyRecord] = []

        def step(before: Tenant) -> tuple[Tenant, Deed]:
            old = _existing(before, key_id)
            if not old.is_active(now):
                raise ConflictError(f"key {key_id!r} has ended", param="key_id", code="key_ended")
            ends_at = now + grace_seconds if old.expires_at is None else min(old.expires_at, now + grace_seconds)
            retired = before.with_key(replace(old, expires_at=ends_at), now)
            _check_room(retired, now)
            record = KeyRecord(key.id, key.digest(self._key_secret), old.scopes, now, label=old.label)
            issued[:] = [record]
            details = {"key_id": key_id, "successor_id": key.id, "old_ends_at": ends_at}
            owned = Put(owner_key(key.id), tenant.encode())
            return retired.with_key(record, now), Deed("key.rotated", details, [owned])

        await self._directory.change(tenant, by, step)
        return Issued(tenant, key, issued[0])

    async def revoke(self, key_id: str, *, by: str) -> tuple[str, KeyRecord]:
        """End a key, here at once and everywhere within a second; revoking again changes nothing."""
        tenant, now = await self._owner(key_id), self._book.clock()

        def step(before: Tenant) -> tuple[Tenant, Deed] | None:
            old = _existing(before, key_id)
            if old.revoked_at is not None:
                return None
            ended = before.with_key(replace(old, revoked_at=now), now)
            return ended, Deed("key.revoked", {"key_id": key_id})

        changed = await self._directory.change(tenant, by, step)
        return tenant, _existing(changed, key_id)

    async def list(self, tenant: str | None = None) -> list[tuple[str, KeyRecord]]:
        """Return (tenant, key) of one tenant or of all, oldest first within a tenant."""
        tenants = await self._book.list() if tenant is None else [await self._book.read(tenant)]
        return [(one.name, key) for one in tenants for key in one.keys]

    def state(self, key: KeyRecord) -> str:
        """Return `active`, `expired` or `revoked`."""
        if key.revoked_at is not None:
            return "revoked"
        return "active" if key.is_active(self._book.clock()) else "expired"

    async def _owner(self, key_id: str) -> str:
        tenant = await self._directory.owner_of(key_id)
        if tenant is None:
            raise _no_key(key_id)
        return tenant


def _granted(scopes: Collection[str]) -> tuple[Scope, ...]:
    unknown = sorted(set(scopes) - GRANTABLE_SCOPES)
    if unknown or not scopes:
        raise InvalidRequestError(
            f"scopes must be some of {', '.join(sorted(GRANTABLE_SCOPES))}, got {list(scopes)!r}", param="scopes"
        )
    return tuple(sorted(map(Scope, set(scopes))))


def _check_room(tenant: Tenant, now: float) -> None:
    active = tenant.active_keys(now)
    if len(active) >= MAX_ACTIVE_KEYS:
        raise ConflictError(
            f"tenant {tenant.name!r} has {len(active)} keys that work ({', '.join(key.id for key in active)}): "
            "revoke one first",
            param="tenant",
            code="too_many_keys",
        )


def _existing(tenant: Tenant, key_id: str) -> KeyRecord:
    record = tenant.key(key_id)
    if record is None:
        raise _no_key(key_id)
    return record


def _no_key(key_id: str) -> NotFoundError:
    return NotFoundError(f"no key {key_id[:80]!r}", param="key_id", code="key_not_found")
