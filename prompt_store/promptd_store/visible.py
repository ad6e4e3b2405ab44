"""Prompts as a tenant sees them: its own, public ones, and what others share with it. The rest looks absent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

from promptd_store.artifact import BaseModelSpec
from promptd_store.errors import PromptModelMismatchError, PromptNotFoundError
from promptd_store.namebook import NameBook
from promptd_store.names import PUBLIC_TENANT, PromptRef, check_tenant, parse_name, parse_ref
from promptd_store.record import PromptName, PromptRecord

MAX_READS = 20
"""How often a read is repeated whose name moved between its two look-ups."""


class VisiblePrompts:
    """Finds records by name for one base model; changes nothing."""

    def __init__(self, names: NameBook, spec: BaseModelSpec) -> None:
        self._names = names
        self._spec = spec

    async def resolve(self, tenant: str, ref: str) -> PromptRecord:
        """Find `[owner/]name[@N|@sha256:…]`: the tenant's own, then the public one; a shared one by its owner alone."""
        parsed = parse_ref(ref)
        async for owner in self._owners(check_tenant(tenant), parsed):
            found = await self.find(owner, parsed.name, parsed.number, parsed.version, viewer=tenant)
            if found is not None:
                return found
        raise PromptNotFoundError(f"no prompt {ref!r}", param="prompt")

    async def find(
        self, owner: str, name: str, number: int | None, version: str | None, *, viewer: str
    ) -> PromptRecord | None:
        """Read one version of an owner's name as a viewer may see it; None is the same for absent and foreign."""
        for _ in range(MAX_READS):
            state = (await self._names.read(owner, name)).state
            if not _may_see_name(viewer, owner, state):
                return None
            current = state.current_for(self._spec.fingerprint)
            chosen = number
            if version is not None:
                chosen = await self._names.number_of(owner, name, version)
            elif number is None:
                if current is None:
                    raise self._mismatch(name)
                chosen = current.number
            if chosen is None:
                return None
            record = await self._names.version(owner, name, chosen)
            if record is None and number is None and version is None:
                continue  # deleted between the two reads: look again
            record = None if record is None else as_seen(viewer, state, record)
            if record is None:
                return None
            self.check_base(record)
            return current.applied_to(record) if current else replace(record, is_current=False)
        return None

    async def versions(self, tenant: str, ref: str) -> list[PromptRecord]:
        """Return the versions of `[owner/]name` that the tenant may see, newest first."""
        parsed = parse_name(ref)
        async for owner in self._owners(check_tenant(tenant), parsed):
            state = (await self._names.read(owner, parsed.name)).state
            records = await self._names.versions(owner, parsed.name) if _may_see_name(tenant, owner, state) else []
            visible = [as_seen(tenant, state, record) for record in reversed(records)]
            seen = [state.applied_to(record, self._spec.fingerprint) for record in visible if record is not None]
            if seen:
                return seen
        raise PromptNotFoundError(f"no prompt {ref!r}", param="prompt")

    def check_base(self, record: PromptRecord) -> None:
        """Raise `PromptModelMismatchError` for a version of another base model."""
        if record.base_fingerprint not in (None, self._spec.fingerprint):
            raise self._mismatch(record.name)

    async def _owners(self, tenant: str, parsed: PromptRef) -> AsyncIterator[str]:
        """Yield whose name a reference may mean: the tenant's own first, then the named owner's or the public one."""
        if parsed.owner in (None, tenant):
            yield tenant
        owner = parsed.owner
        if owner in (None, PUBLIC_TENANT):
            owner = await self._names.public_owner(parsed.name)
        if owner is not None and owner != tenant:
            yield owner

    def _mismatch(self, name: str) -> PromptModelMismatchError:
        return PromptModelMismatchError(
            f"prompt {name!r} has no version for the base model {self._spec.architecture} ({self._spec.fingerprint})",
            param="prompt",
        )


def _may_see_name(viewer: str, owner: str, state: PromptName) -> bool:
    return state.is_public or (bool(state.current) and (viewer == owner or viewer in state.shared_with))


def as_seen(viewer: str, state: PromptName, record: PromptRecord) -> PromptRecord | None:
    """Return a version as a tenant sees it; None where it may not."""
    if viewer == record.tenant or record.visibility == "public":
        return record
    return replace(record, granted_to=viewer) if viewer in state.shared_with else None
