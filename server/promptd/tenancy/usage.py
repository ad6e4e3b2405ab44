"""The ledger of use: what each tenant was served, by day, key and prompt. Durable, and no step in the store a request.

Counts are gathered in memory and written together, every second and at the end: one transaction for up to `BATCH`
entries. With each batch goes its number under this server's name, so that a batch whose answer was lost is neither
written twice nor left out. A server that is killed loses what it gathered since its last batch, a second at most.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

from promptd_store import (
    STORED_BYTES,
    Check,
    CheckFailedError,
    Put,
    Store,
    StoreUnavailableError,
    TenantErasedError,
    day_of,
    number_held,
)
from promptd_store.names import PUBLIC_TENANT
from promptd_store.schema import NOTHING, read_fields, stamped, unknown_fields

from promptd.jobs import trained_prefix
from promptd.tenancy.rounds import keep_doing

FLUSH_SECONDS = 1.0
BATCH = 200
MAX_TRIES = 100


@dataclass(frozen=True, slots=True)
class Counts:
    """What was served. Text tokens of the prompt are counted apart from the virtual tokens in front of them."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    virtual_tokens: int = 0
    cached_tokens: int = 0
    training_tokens: int = 0
    stored_byte_days: int = 0
    """What lay in the store that day; over several days the sum."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(Counts)))


@dataclass(frozen=True, slots=True, order=True)
class UsageKey:
    """What counts are kept apart by."""

    tenant: str
    day: str
    """2026-11-21, in UTC."""
    key_id: str
    prompt: str
    """The prompt that was asked, the last of a chain; empty for the bare model."""


class UsageLedger:
    """Gathers and writes counts. All methods run on one event loop."""

    def __init__(self, store: Store, server_id: str, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._writer_key = f"{{{PUBLIC_TENANT}}}:usage-writer:{server_id}"
        self._clock = clock
        self._gathered: dict[UsageKey, Counts] = {}
        self._batch: dict[UsageKey, Counts] = {}
        """What is being written; after a failure it is written again as it was, whatever has come since."""
        self._lock = asyncio.Lock()
        self._num_written = 0

    def add(self, tenant: str, key_id: str, prompt: str, counts: Counts) -> None:
        """Gather what a request was served."""
        key = UsageKey(tenant, day_of(self._clock()), key_id, prompt)
        self._gathered[key] = self._gathered.get(key, Counts()) + counts

    async def keep(self) -> None:
        """Write every second, until cancelled."""
        await keep_doing(self.flush, FLUSH_SECONDS)  # it stays gathered

    async def flush(self) -> None:
        """Write all that is gathered by now; raises the store's error, and then keeps what was not written."""
        async with self._lock:
            waiting = list(self._gathered)  # what comes meanwhile is written the next time: under load there is no end
            while self._batch or waiting:
                if not self._batch:
                    some, waiting = waiting[:BATCH], waiting[BATCH:]
                    self._batch = {key: self._gathered.pop(key) for key in some}
                await self._write(self._batch)
                self._batch = {}

    async def close(self) -> None:
        """Write the rest and forget this server's name."""
        await self.flush()
        await self._store.transact(deletes=[self._writer_key])

    async def read(self, tenant: str, first_day: str, last_day: str) -> list[tuple[UsageKey, Counts]]:
        """Return a tenant's counts of some days, by day, key and prompt; what this server has gathered is in."""
        await self.flush()
        found: dict[UsageKey, Counts] = {}
        for prefix_of, read in _KINDS:
            start = prefix_of(tenant)
            for stored in await self._store.scan(start, after=f"{start}{first_day}"):
                day, key_id, prompt = stored.key.removeprefix(start).split(":", 2)
                if day > last_day:
                    break
                key = UsageKey(tenant, day, key_id, prompt)
                found[key] = found.get(key, Counts()) + read(stored.value)
        # A line without counts is of a prompt that only stood in front of another one.
        return sorted((key, counts) for key, counts in found.items() if counts != Counts())

    async def _write(self, batch: dict[UsageKey, Counts]) -> None:
        number = str(self._num_written + 1).encode()
        for _ in range(MAX_TRIES):
            writer = await self._store.get(self._writer_key)
            if writer is not None and writer.value == number:
                break  # a try before this one was written, and its answer was lost
            checks: list[Check] = [Check(self._writer_key, None if writer is None else writer.etag)]
            puts = [Put(self._writer_key, number)]
            for key, counts in batch.items():
                name = f"{usage_key_prefix(key.tenant)}{key.day}:{key.key_id}:{key.prompt}"
                stored = await self._store.get(name)
                before, unknown = Counts(), NOTHING
                if stored is not None:
                    before = Counts(**read_fields(Counts, stored.value))
                    unknown = unknown_fields(Counts, json.loads(stored.value))  # a newer release's: left as they are
                checks.append(Check(name, None if stored is None else stored.etag))
                puts.append(Put(name, json.dumps(stamped(asdict(before + counts), unknown)).encode()))
            try:
                await self._store.transact(checks, puts)
            except TenantErasedError as error:  # nothing is written for it, and nobody else waits for that
                for key in [one for one in batch if one.tenant == error.tenant]:
                    del batch[key]
                continue
            except CheckFailedError:  # another server writes the same counts
                continue
            break
        else:
            raise StoreUnavailableError("the usage ledger is written by too many servers at once")
        self._num_written += 1


async def note_stored_bytes(store: Store, tenant: str, day: str) -> None:
    """Write down what a tenant has in the store; of several times a day the most counts."""
    held, key = await number_held(store, tenant, STORED_BYTES), f"{_stored_prefix(tenant)}{day}::"
    before = await store.get(key)
    if held > (0 if before is None else int(before.value)):
        await store.transact(puts=[Put(key, b"%d" % held)])


def usage_key_prefix(tenant: str) -> str:
    """What the keys of a tenant's counts begin with."""
    return f"{{{tenant}}}:usage:"


def _stored_prefix(tenant: str) -> str:
    return f"{{{tenant}}}:stored:"


_KINDS: Sequence[tuple[Callable[[str], str], Callable[[bytes], Counts]]] = (
    (usage_key_prefix, lambda value: Counts(**read_fields(Counts, value))),
    (trained_prefix, lambda value: Counts(training_tokens=int(value))),
    (_stored_prefix, lambda value: Counts(stored_byte_days=int(value))),
)
"""Where counts lie, each under `day:key id:prompt`: this ledger's, the training jobs', the store's own size."""
