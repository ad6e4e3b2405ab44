"""Prompts that are shared with named tenants, who may use and read them as `owner/name`, and never change them.

The name's own record says with whom, and is read with every look at the name: what is withdrawn is gone at once. Under
each of these tenants lies an entry for its lists, written and deleted in the same step.
"""

from __future__ import annotations

from dataclasses import replace

from promptd_store.base import Put
from promptd_store.errors import PromptNotFoundError, SharingError
from promptd_store.namebook import NameBook, StoredName
from promptd_store.names import PUBLIC_TENANT, check_name, check_tenant, granted_key

MAX_SHARES = 1000
"""Tenants that one prompt is shared with: they lie in its record."""


class PromptShares:
    """The owner's side of sharing. Absent and foreign prompts look the same."""

    def __init__(self, names: NameBook) -> None:
        self._names = names

    async def list(self, tenant: str, name: str) -> tuple[str, ...]:
        """Return whom a prompt is shared with, by name."""
        stored = await self._names.read(check_tenant(tenant), check_name(name))
        return _existing(stored).state.shared_with

    async def were_made(self, tenant: str, name: str) -> bool:
        """Return whether a prompt ever was shared."""
        return (await self._names.read(tenant, name)).state.was_shared

    async def add(self, tenant: str, name: str, grantee: str) -> None:
        """Share all versions of a name, and those to come. Again changes nothing; nobody is told whether it exists."""
        if check_tenant(grantee) in (PUBLIC_TENANT, tenant):
            raise SharingError(f"a prompt cannot be shared with {grantee!r}", param="tenant")

        async def step(stored: StoredName) -> None:
            state = _existing(stored).state
            if grantee in state.shared_with:
                return
            if len(state.shared_with) >= MAX_SHARES:
                raise SharingError(f"prompt {name!r} is shared with {MAX_SHARES} tenants already", param="tenant")
            all_grantees = tuple(sorted({*state.shared_with, grantee}))
            shared = replace(state, revision=state.revision + 1, shared_with=all_grantees, was_shared=True)
            entry = Put(granted_key(grantee, tenant, name), b"")
            await self._names.move(stored, shared, {"type": "prompt.shared", "with": grantee}, puts=[entry])

        await self._names.retry(check_tenant(tenant), check_name(name), step)

    async def remove(self, tenant: str, name: str, grantee: str) -> None:
        """Share no longer. Again changes nothing."""
        check_tenant(grantee)

        async def step(stored: StoredName) -> None:
            state = _existing(stored).state
            if grantee not in state.shared_with:
                return
            left = tuple(one for one in state.shared_with if one != grantee)
            entry = granted_key(grantee, tenant, name)
            withdrawn = replace(state, revision=state.revision + 1, shared_with=left)
            await self._names.move(stored, withdrawn, {"type": "prompt.withdrawn", "with": grantee}, deletes=[entry])

        await self._names.retry(check_tenant(tenant), check_name(name), step)


def _existing(stored: StoredName) -> StoredName:
    if not stored.state.current:
        raise PromptNotFoundError(f"no prompt {stored.name!r}", param="prompt")
    return stored
