"""The log of calls: durable before the answer, few entries in a flood, nothing lost while the store is away."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from promptd_store import EmbeddedStore, StoreUnavailableError

from promptd.tenancy import CallLog, trim_calls
from promptd.tenancy.calls import KEEP_SECONDS, MAX_KINDS, OTHERS
from tests.tenancy.conftest import Clock, with_store
from tests.tenancy.test_rates import counted


def test_calls_at_once_are_one_step(tmp_path: Path, clock: Clock) -> None:
    """A hundred that come together are written by a few transactions; each is there when it returns."""

    async def run(store: EmbeddedStore) -> None:
        log, steps = CallLog(store, clock), counted(store)

        async def change(number: int) -> None:
            await log.changed("acme", "acme/k", "PUT /x", 200, {"name": f"p{number}"})

        await asyncio.gather(*map(change, range(100)))
        assert steps[0] <= 3
        names = [entry["target"] for _, entry in await CallLog(store, clock).read("acme")]
        assert names == [{"name": f"p{number}"} for number in range(100)]

    with_store(tmp_path, run)


def test_a_flood_is_few_entries(tmp_path: Path, clock: Clock) -> None:
    """However many and however different; the numbers add up."""

    async def run(store: EmbeddedStore) -> None:
        log = CallLog(store, clock)
        for number in range(10_000):
            log.refused("", "", f"GET /route-{number % 500}", 401)
        log.refused("acme", "acme/k", "GET /admin/keys", 403)
        found = [entry for _, entry in await log.read(None)]
        assert len(found) == MAX_KINDS + 1
        assert sum(int(str(entry["count"])) for entry in found) == 10_001
        assert OTHERS in {entry["action"] for entry in found}
        assert await log.read("acme") == []  # it came when the counted kinds were full
        log.refused("acme", "acme/k", "GET /admin/keys", 403)
        ((_, entry),) = await log.read("acme")
        assert (entry["by"], entry["count"]) == ("acme/k", 1)

    with_store(tmp_path, run)


def test_nothing_is_lost_while_the_store_is_away(tmp_path: Path, clock: Clock) -> None:
    """The caller is told, and the entry is written with the next one."""

    async def run(store: EmbeddedStore) -> None:
        log, transact = CallLog(store, clock), store.transact

        async def away(*arguments: object, **options: object) -> dict[str, str]:
            raise StoreUnavailableError("away")

        store.transact = away  # type: ignore[method-assign]
        log.refused("acme", "", "GET /x", 401)
        with pytest.raises(StoreUnavailableError):
            await log.changed("acme", "acme/k", "PUT /x", 200, {"name": "first"})
        with pytest.raises(StoreUnavailableError):
            await log.flush()
        store.transact = transact  # type: ignore[method-assign]
        await log.changed("acme", "acme/k", "PUT /x", 200, {"name": "second"})
        found = [(entry["action"], entry["target"]) for _, entry in await log.read("acme")]
        assert found == [("PUT /x", {"name": "first"}), ("PUT /x", {"name": "second"}), ("GET /x", {})]

    with_store(tmp_path, run)


def test_old_calls_go(tmp_path: Path) -> None:
    """After ninety days, of every tenant."""

    async def run(store: EmbeddedStore) -> None:
        log = CallLog(store)
        for tenant in ("acme", "eve"):
            await log.changed(tenant, "", "PUT /x", 200, {})
        assert await trim_calls(store) == 0
        assert await trim_calls(store, clock=lambda: time.time() + KEEP_SECONDS + 1) == 2
        assert await log.read(None) == []

    with_store(tmp_path, run)
