"""Which servers share this store: each writes every few seconds what it does now, and reads what the others wrote."""

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

    async def list(self) -> list[dict[str, Any]]:
        """Return every server's entry, `id` and `at` (seconds since 1970) in each; this one's is read now."""
        others = []
        if self._is_shared:
            now = self._clock()
            entries = [json.loads(record.value) for record in await self._store.scan(_PREFIX)]
            others = [entry for entry in entries if entry["id"] != self._id and now - entry["at"] < HOLD_SECONDS]
        return sorted([self._entry(), *others], key=lambda entry: (entry["started_at"], entry["id"]))

    async def keep(self) -> None:
        """Write every few seconds, until cancelled."""
        if not self._is_shared:
            return
        while True:
            with contextlib.suppress(StoreError):  # its absence tells it
                await self.write()
            await asyncio.sleep(WRITE_SECONDS)

    async def close(self) -> None:
        """Leave the list at once."""
        if self._is_shared:
            await self._store.transact(deletes=[_PREFIX + self._id])

    async def write(self) -> None:
        """Write this server's entry, and delete those of servers that have been silent for long."""
        now = self._clock()
        records = await self._store.scan(_PREFIX)
        gone = [record.key for record in records if now - json.loads(record.value)["at"] > 2 * HOLD_SECONDS]
        entry = Put(_PREFIX + self._id, json.dumps(self._entry()).encode())
        await self._store.transact(puts=[entry], deletes=[key for key in gone if key != entry.key])

    def _entry(self) -> dict[str, Any]:
        return {"id": self._id, "at": self._clock(), **self._describe()}


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
