"""What each tenant holds, counted in the very step that changes it; a quota is a record beside the count.

So a quota is exact however many servers write, holds from the step that sets it, and no writer has to be told of it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

from promptd_store.base import Add, Check, Put, Record, Store
from promptd_store.errors import CheckFailedError, LimitReachedError
from promptd_store.names import prompt_key, versions_prefix
from promptd_store.record import PromptName, PromptRecord

PROMPTS = "prompts"
"""Names that point to something."""
STORED_BYTES = "stored_bytes"
"""Of all versions of prompts, of files, and of what open jobs keep."""


def held_key(tenant: str, what: str) -> str:
    """Key of a count."""
    return f"{{{tenant}}}:held:{what}"


def quota_key(tenant: str, what: str) -> str:
    """Key of the most that a count may be; the name up to a colon counts, so that each day's count has one quota."""
    return f"{{{tenant}}}:quota:{what.partition(':')[0]}"


def hold(tenant: str, what: str, amount: int, *, is_limited: bool = True) -> Add:
    """Count so much more, or less; raises `LimitReachedError` in the step where that is more than the quota."""
    return Add(held_key(tenant, what), amount, quota_key(tenant, what) if is_limited else None)


def day_of(at: float) -> str:
    """Return 2026-11-21, in UTC, for seconds since 1970."""
    return time.strftime("%Y-%m-%d", time.gmtime(at))


async def check_room(store: Store, tenant: str, amounts: Mapping[str, int]) -> None:
    """Raise `LimitReachedError` where there clearly is no room: asked before bytes are written, decided by the step."""
    wanted = {what: amount for what, amount in amounts.items() if amount > 0}
    keys = [key(tenant, what) for what in wanted for key in (quota_key, held_key)]
    found = [None if one is None else int(one.value) for one in await store.get_many(keys)]
    for (what, amount), quota, held in zip(wanted.items(), found[::2], found[1::2], strict=True):
        if quota is not None and (held or 0) + amount > quota:
            raise LimitReachedError(held_key(tenant, what), held or 0, amount, quota)


async def number_held(store: Store, tenant: str, what: str) -> int:
    """Return a count."""
    stored = await store.get(held_key(tenant, what))
    return 0 if stored is None else int(stored.value)


class PromptsHeld:
    """Counts a tenant's prompts and the bytes of their versions. Show it all records."""

    def __init__(self, tenant: str) -> None:
        self.held: Counter[str] = Counter()
        self._names = prompt_key(tenant, "")
        self._versions = versions_prefix(tenant)

    def see(self, record: Record) -> None:
        """Count one record."""
        if record.key.startswith(self._names):
            self.held[PROMPTS] += bool(PromptName.from_bytes(record.value).current)
        elif record.key.startswith(self._versions):
            self.held[STORED_BYTES] += PromptRecord.from_bytes(record.value).held_bytes


class Recount:
    """Puts counts right that were not kept: of records older than the counting. Begin it before anything is read."""

    def __init__(self, store: Store, tenant: str, before: Mapping[str, tuple[str | None, int]]) -> None:
        self._store = store
        self._tenant = tenant
        self._before = before

    @classmethod
    async def begin(cls, store: Store, tenant: str, names: tuple[str, ...]) -> Recount:
        """Remember the counts."""
        before = {}
        for what in names:
            stored = await store.get(held_key(tenant, what))
            before[what] = (None, 0) if stored is None else (stored.etag, int(stored.value))
        return cls(store, tenant, before)

    async def end(self, counted: Mapping[str, int]) -> bool:
        """Write what was counted, where it differs and nothing was written in between; return whether it did."""
        wrong = [what for what, (_, held) in self._before.items() if counted.get(what, 0) != held]
        if not wrong:
            return False
        checks = [Check(held_key(self._tenant, what), etag) for what, (etag, _) in self._before.items()]
        puts = [Put(held_key(self._tenant, what), b"%d" % counted[what]) for what in wrong if counted.get(what)]
        gone = [held_key(self._tenant, what) for what in wrong if not counted.get(what)]
        try:
            await self._store.transact(checks, puts, gone)
        except CheckFailedError:
            return False  # the next time
        return True
