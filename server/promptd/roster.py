"""Which servers share this store: each writes every few seconds what it does now, and reads what the others wrote.

With it stands up to which erasure the server has forgotten what is erased: that is its acknowledgement.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from promptd_store import Put, Store, StoreError
from promptd_store.names import PUBLIC_TENANT

import promptd
from promptd.engine.async_engine import AsyncEngine

WRITE_SECONDS = 5.0
HOLD_SECONDS = 3 * WRITE_SECONDS
"""A server that has not written for so long is not listed: it was killed, or cannot reach the store."""
REMEMBER_SECONDS = 600.0
"""One that cannot reach the store serves on what it has in memory (`--outage-seconds`, 300): so long it counts among
those that erasures are to be acknowledged by."""
Entries = list[dict[str, Any]]
_PREFIX = f"{{{PUBLIC_TENANT}}}:server:"


class Roster:
    """Owner of this server's entry. All methods run on one event loop."""

    def __init__(
        self,
        store: Store,
        server_id: str,
        describe: Callable[[], Mapping[str, Any]],
        *,
        is_shared: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`describe` returns what this server says of itself, as JSON values.

        A store that is not shared is not written to: its only server reads itself.
        """
        self._store = store
        self._id = server_id
        self._describe = describe
        self._is_shared = is_shared
        self._clock = clock
        self._forgotten = 0
        self._turn = asyncio.Lock()

    async def list(self) -> Entries:
        """Return every server's entry, `id` and `at` (seconds since 1970) in each; this one's is read now."""
        return [entry for entry in await self._entries() if not self._is_silent(entry)]

    async def acknowledge(self, erasure: int) -> None:
        """Tell that this server has forgotten what all erasures up to this one of their log name."""
        self._forgotten = erasure
        await self.write()

    async def acknowledged(self, erasure: int) -> Entries:
        """Return every server that may have had in memory what an erasure names, and whether it `has_forgotten` it."""
        return [
            {
                **{name: entry[name] for name in ("id", "host", "pid")},
                "is_silent": self._is_silent(entry),
                "has_forgotten": entry.get("forgotten", 0) >= erasure,  # a release that knew of none has forgotten none
            }
            for entry in await self._entries()
        ]

    async def keep(self) -> None:
        """Write every few seconds, until cancelled."""
        while self._is_shared:
            with contextlib.suppress(StoreError):  # its absence tells it
                await self.write()
            await asyncio.sleep(WRITE_SECONDS)

    async def close(self) -> None:
        """Leave the list at once."""
        if self._is_shared:
            await self._store.transact(deletes=[_PREFIX + self._id])

    async def write(self) -> None:
        """Write this server's entry, and delete those of servers that have been silent for long."""
        if not self._is_shared:
            return
        async with self._turn:  # the entry that is written last is the newest
            now = self._clock()
            records = await self._store.scan(_PREFIX)
            gone = [record.key for record in records if now - json.loads(record.value)["at"] > REMEMBER_SECONDS]
            entry = Put(_PREFIX + self._id, json.dumps(self._entry()).encode())
            await self._store.transact(puts=[entry], deletes=[key for key in gone if key != entry.key])

    async def _entries(self) -> Entries:
        """Return all, oldest server first; a store of its own has none to read."""
        records = await self._store.scan(_PREFIX) if self._is_shared else ()
        others = [entry for entry in (json.loads(record.value) for record in records) if entry["id"] != self._id]
        return sorted([self._entry(), *others], key=lambda entry: (entry["started_at"], entry["id"]))

    def _is_silent(self, entry: Mapping[str, Any]) -> bool:
        return bool(self._clock() - entry["at"] >= HOLD_SECONDS)

    def _entry(self) -> dict[str, Any]:
        return {"id": self._id, "at": self._clock(), "forgotten": self._forgotten, **self._describe()}


def describe_server(served: AsyncEngine) -> Callable[[], Mapping[str, Any]]:
    """Return what tells of a server: its process, its model, and what its engine does now."""
    model, config = served.engine.model, served.engine.config
    fixed = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "version": promptd.__version__,
        "started_at": time.time(),
        "model": model.served_name,
        "fingerprint": model.spec.fingerprint,
        "max_num_seqs": config.max_num_seqs,
    }

    def describe() -> Mapping[str, Any]:
        stats = served.stats()
        return {
            **fixed,
            "num_requests_running": stats.num_requests_running,
            "num_requests_waiting": stats.num_requests_waiting,
            "kv_cache_usage_ratio": stats.kv_cache_usage_ratio,
            "prompts_resident": stats.prompts_resident,
            "prompt_cache_bytes": stats.prompt_cache_bytes,
            "generation_tokens": stats.generation_tokens,
            "requests_finished": stats.requests_finished,
        }

    return describe
