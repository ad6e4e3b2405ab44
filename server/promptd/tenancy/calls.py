"""Who called what that changes something, and who was turned away: one entry a call, names and numbers only.

What changed something is written before it is answered: publications in their own step, other calls at the same time
in one of theirs. Calls that were refused are gathered and counted, so that a flood of them makes no flood of entries.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

from promptd_store import Append, Store, StoreError, trim_events
from promptd_store.names import PUBLIC_TENANT

from promptd.tenancy.rounds import keep_doing

FLUSH_SECONDS = 10.0
MAX_KINDS = 20
"""Entries of refused calls in that time; all further kinds count as one."""
KEEP_SECONDS = 90 * 86400.0
CALL_LOGS = f"{{{PUBLIC_TENANT}}}:calls:"
OTHERS = "others"
PAGE = 1000


@dataclass(frozen=True, slots=True)
class Call:
    """One call, or several that were refused alike."""

    at: float
    """Seconds since 1970; of gathered ones when they were written."""
    tenant: str
    """Empty where nobody knows whose it was."""
    by: str
    """`tenant/key id`; empty without a good key."""
    action: str
    """Method and route, as the table of routes has it."""
    status: int
    target: Mapping[str, str] = field(default_factory=dict)
    """What the path names: prompts, files, jobs, tenants. Never users."""
    count: int = 1

    def to_bytes(self) -> bytes:
        """Write the entry."""
        return json.dumps(asdict(self)).encode()


def calls_log(tenant: str) -> str:
    """Log of a tenant's calls; no log's name is the beginning of another's."""
    return f"{CALL_LOGS}{tenant}:"


class CallLog:
    """Writes calls down. All methods run on one event loop."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._pending: list[Call] = []
        self._lock = asyncio.Lock()
        self._refused: Counter[tuple[str, str, str, int]] = Counter()

    async def changed(self, tenant: str, by: str, action: str, status: int, target: Mapping[str, str]) -> None:
        """Write down a call that changed something; durable on return."""
        self._pending.append(Call(self._clock(), tenant, by, action, status, target))
        async with self._lock:
            batch, self._pending = self._pending, []
            try:
                await self._write(batch)
            except StoreError:
                self._pending = batch + self._pending  # it has happened: it is written with the next one
                raise

    def entry(self, tenant: str, by: str, action: str, status: int, target: Mapping[str, str]) -> Append:
        """Return what writes such a call down, for the step that does it."""
        return _append(Call(self._clock(), tenant, by, action, status, target))

    def refused(self, tenant: str, by: str, action: str, status: int) -> None:
        """Count a call that was turned away."""
        kind = (tenant, by, action, status)
        if kind not in self._refused and len(self._refused) >= MAX_KINDS:
            kind = ("", "", OTHERS, 0)
        self._refused[kind] += 1

    async def flush(self) -> None:
        """Write what was counted, and what could not be written before."""
        async with self._lock:
            batch, now = self._pending, self._clock()
            self._pending = []
            refused, self._refused = self._refused, Counter()
            told = [Call(now, *kind, count=count) for kind, count in refused.items()]
            try:
                await self._write(batch + told)
            except StoreError:
                self._pending = batch + self._pending
                self._refused.update(refused)
                raise

    async def keep(self) -> None:
        """Flush every few seconds, until cancelled."""
        await keep_doing(self.flush, FLUSH_SECONDS)

    async def read(
        self, tenant: str | None, *, after: int = 0, limit: int = PAGE
    ) -> list[tuple[int, dict[str, object]]]:
        """Return (seq, entry) of one tenant or of all, oldest first; what this server has counted is in."""
        await self.flush()
        log = CALL_LOGS if tenant is None else calls_log(tenant)
        found = await self._store.read_log(log, after=after, limit=limit)
        return [(event.seq, json.loads(event.payload)) for event in found]

    async def _write(self, calls: list[Call]) -> None:
        if calls:
            await self._store.transact(appends=[_append(call) for call in calls])


def _append(call: Call) -> Append:
    return Append(calls_log(call.tenant), call.to_bytes())


async def trim_calls(store: Store, *, clock: Callable[[], float] = time.time) -> int:
    """Delete old entries; return how many."""
    logs = {event.log for event in await store.read_log(CALL_LOGS, limit=PAGE)}  # the oldest ones' logs
    return sum([await trim_events(store, log, keep_seconds=KEEP_SECONDS, clock=clock) for log in sorted(logs)])
