"""Which prompts a tenant sees, in order: its own by name, then by name the public ones and those that others share.

A page reads what it shows. Of names it reads as many more as hide something, of grants all: their keys are not in the
order of the names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from promptd_store.artifact import BaseModelSpec
from promptd_store.namebook import NameBook, StoredName
from promptd_store.names import PromptRef, check_tenant
from promptd_store.record import PromptRecord
from promptd_store.visible import as_seen

CHUNK = 500
"""Names that are read at a time."""


class PromptListing:
    """Lists what fits one base model; reads no blob."""

    def __init__(self, names: NameBook, spec: BaseModelSpec) -> None:
        self._names = names
        self._spec = spec

    async def page(
        self,
        tenant: str,
        *,
        limit: int | None = None,
        after: PromptRef | None = None,
        search: str = "",
        include_others: bool = True,
    ) -> tuple[list[PromptRecord], bool]:
        """Return up to `limit` prompts behind `after`, which may be gone, and whether there are more.

        With `search` only those whose name has these characters, ASCII letters in either case.
        """
        check_tenant(tenant)
        sources: list[_Source] = []
        if after is None or after.owner in (None, tenant):
            sources.append(_OwnNames(self._names, tenant, "" if after is None else after.name, search))
            after = None
        if include_others:
            sources.append(_OthersNames(self._names, tenant, after, search))
        found: list[PromptRecord] = []
        for source in sources:
            num_hidden = 0
            while names := await source.next(_chunk(limit, len(found), num_hidden)):
                seen = await self._seen(tenant, names)
                found += seen
                num_hidden += len(names) - len(seen)
                if limit is not None and len(found) > limit:
                    return found[:limit], True
        return found, False

    async def _seen(self, tenant: str, names: Sequence[StoredName]) -> list[PromptRecord]:
        """Return what names mean, where they mean something to the tenant."""
        usable = [(one, current) for one in names if (current := one.state.current_for(self._spec.fingerprint))]
        records = await self._names.read_versions([(one, current.number) for one, current in usable])
        seen = []
        for (one, current), record in zip(usable, records, strict=True):
            visible = None if record is None else as_seen(tenant, one.state, record)
            if visible is not None:
                seen.append(current.applied_to(visible))
        return seen


class _Source(Protocol):
    """Names in order."""

    async def next(self, num: int) -> list[StoredName]:
        """Return up to `num` further ones; none at the end."""
        ...


class _OwnNames:
    """A tenant's own."""

    def __init__(self, names: NameBook, tenant: str, after: str, search: str) -> None:
        self._names = names
        self._tenant = tenant
        self._passed = after
        self._search = search
        self._is_whole = False

    async def next(self, num: int) -> list[StoredName]:
        if self._is_whole:  # a search that found few has looked at all
            return []
        found = await self._names.names(self._tenant, after=self._passed, limit=num, search=self._search)
        self._is_whole = len(found) < num
        self._passed = found[-1].name if found else self._passed
        return found


class _OthersNames:
    """Public names and granted ones, merged; each once, ordered by name and then by owner."""

    def __init__(self, names: NameBook, tenant: str, after: PromptRef | None, search: str) -> None:
        self._names = names
        self._tenant = tenant
        self._after = ("", "") if after is None else (after.name, after.owner or "")
        self._search = search
        self._passed = self._after[0]
        self._rest: set[tuple[str, str]] | None = None
        """What is known and not yet reached: (name, owner)."""
        self._ready: list[tuple[str, str]] = []
        self._is_whole = False

    async def next(self, num: int) -> list[StoredName]:
        num_public = num
        while not self._ready and not self._is_whole:
            await self._fill(num_public)
            num_public = min(2 * num_public, CHUNK)  # they may all be the tenant's own
        batch, self._ready = self._ready[:num], self._ready[num:]
        return await self._names.read_many([(owner, name) for name, owner in batch])

    async def _fill(self, num: int) -> None:
        """Read public names; what is known lies ready as far as they reach."""
        if self._rest is None:
            self._rest = await self._first()
        found = await self._names.public_names(after=self._passed, limit=num, search=self._search)
        self._is_whole = len(found) < num
        self._passed = found[-1][1] if found else self._passed
        reached = {one for one in self._rest if self._is_whole or one[0] <= self._passed}
        self._rest -= reached
        reached |= {(name, owner) for owner, name in found if owner != self._tenant}
        self._ready = sorted(reached)

    async def _first(self) -> set[tuple[str, str]]:
        """Read the granted names, and who has the public name that the page begins behind."""
        known = {(name, owner) for owner, name in await self._names.granted_names(self._tenant)}
        owner = await self._names.public_owner(self._passed) if self._passed else None
        if owner not in (None, self._tenant):
            known.add((self._passed, owner))
        wanted = self._search.lower()
        return {one for one in known if one > self._after and wanted in one[0].lower()}


def _chunk(limit: int | None, num_found: int, num_hidden: int) -> int:
    """How many names to read: what is missing, and as many more as there were that showed nothing."""
    return CHUNK if limit is None else min(CHUNK, limit + 1 - num_found + num_hidden)
