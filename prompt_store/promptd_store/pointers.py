"""Where names point: to a new version, back to an earlier one, to nothing. Each move is one atomic step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from promptd_store.artifact import BaseModelSpec
from promptd_store.base import Append, Condition, Put
from promptd_store.draft import Draft
from promptd_store.errors import PromptNotFoundError
from promptd_store.namebook import NameBook, StoredName
from promptd_store.names import check_name, check_tenant, digest_key, parse_pin, version_key
from promptd_store.preconditions import check_preconditions
from promptd_store.publication import is_same_publication
from promptd_store.record import ANY_BASE, PromptName, PromptRecord
from promptd_store.visible import VisiblePrompts


class Pointers:
    """Made for one base model: a name points to one version for each."""

    def __init__(
        self, names: NameBook, visible: VisiblePrompts, spec: BaseModelSpec, clock: Callable[[], float]
    ) -> None:
        self._names = names
        self._visible = visible
        self._spec = spec
        self._clock = clock

    def check(self, state: PromptName, if_match: str | None, if_none_match: str | None = None) -> None:
        """Raise `PreconditionFailedError` where a name is not in the state that a caller wants it to be in."""
        current = state.current_for(self._spec.fingerprint)
        check_preconditions(current.etag if current else None, if_match, if_none_match)

    async def to_draft(
        self,
        draft: Draft,
        if_match: str | None,
        if_none_match: str | None,
        checks: Sequence[Condition],
        note: Callable[[PromptRecord], Append] | None,
    ) -> PromptRecord:
        """Make a draft the name's next version; nothing changes where the name points to just that."""
        tenant, name = draft.record.tenant, draft.record.name
        base = draft.record.base_fingerprint or ANY_BASE

        async def step(stored: StoredName) -> PromptRecord:
            current = stored.state.current_for(self._spec.fingerprint)
            self.check(stored.state, if_match, if_none_match)
            if current is not None and current.version == draft.record.version:
                present = await self._names.version(tenant, name, current.number)
                if present is not None and is_same_publication(present, draft.record):
                    return current.applied_to(present)
            number = stored.state.next_number
            moved = stored.state.moved(base, number, draft.record.version, draft.record.visibility)
            record = replace(draft.record, number=number, etag=moved.current[base].etag)
            puts = [
                Put(version_key(tenant, name, number), record.to_bytes()),
                Put(digest_key(tenant, name, record.version), str(number).encode()),
            ]
            event = self._event("prompt.published", record)
            size = record.held_bytes
            noted = () if note is None else (note(record),)
            await self._names.move(stored, moved, event, puts=puts, checks=checks, appends=noted, num_bytes=size)
            return record

        return await self._names.retry(tenant, name, step)

    async def back(self, tenant: str, name: str, to: int | str, if_match: str | None) -> PromptRecord:
        """Point a name to an earlier version, `3` or `sha256:…`, of this base model."""
        number, version = parse_pin(str(to))
        _check_owned(tenant, name)

        async def step(stored: StoredName) -> PromptRecord:
            record = await self._visible.find(tenant, name, number, version, viewer=tenant)
            current = stored.state.current_for(self._spec.fingerprint)
            if record is None:
                raise PromptNotFoundError(f"no prompt '{name}@{to}'", param="prompt")
            self.check(stored.state, if_match)
            if current is not None and current.number == record.number:
                return current.applied_to(record)
            base = record.base_fingerprint or ANY_BASE
            moved = stored.state.moved(base, record.number, record.version, record.visibility)
            await self._names.move(stored, moved, self._event("prompt.rolled_back", record))
            return moved.current[base].applied_to(record)

        return await self._names.retry(tenant, name, step)

    async def to_nothing(self, tenant: str, name: str, if_match: str | None) -> list[PromptRecord]:
        """Delete a name with all its versions, for every base model; return them."""
        _check_owned(tenant, name)

        async def step(stored: StoredName) -> list[PromptRecord]:
            if not stored.state.current:
                raise PromptNotFoundError(f"no prompt {name!r}", param="prompt")
            self.check(stored.state, if_match)
            records = await self._names.versions(tenant, name)
            await self._names.remove(stored, records, self._event("prompt.deleted", records[-1]))
            return records

        return await self._names.retry(tenant, name, step)

    def _event(self, what: str, record: PromptRecord) -> dict[str, object]:
        return {
            "type": what,
            "version": record.version,
            "number": record.number,
            "base_fingerprint": record.base_fingerprint,
            "at": int(self._clock()),
        }


def _check_owned(tenant: str, name: str) -> None:
    check_tenant(tenant)
    check_name(name)
