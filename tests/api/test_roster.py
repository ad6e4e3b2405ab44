"""Who shares a store, and whose work an engine has."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from promptd_store import EmbeddedStore

from promptd.roster import HOLD_SECONDS, Roster
from tests.api.conftest import LiveServer


def test_servers_find_each_other_and_the_silent_are_forgotten(tmp_path: Path) -> None:
    """Each lists all; one that stops writing leaves the list, and then the store; one that closes leaves at once."""

    async def run() -> None:
        store, now = EmbeddedStore(tmp_path), [1000.0]

        def roster(name: str) -> Roster:
            return Roster(store, name, lambda: {"started_at": 1.0, "n": name}, is_shared=True, clock=lambda: now[0])

        async def listed(one: Roster) -> list[str]:
            return [entry["id"] for entry in await one.list()]

        first, second, third = roster("a"), roster("b"), roster("c")
        for each in (first, second, third):
            await each.write()
        assert await listed(first) == await listed(second) == ["a", "b", "c"]
        await third.close()
        assert await listed(first) == ["a", "b"]
        now[0] += HOLD_SECONDS - 1
        await first.write()
        assert await listed(first) == ["a", "b"]
        now[0] += 1
        assert await listed(first) == ["a"] and await listed(second) == ["a", "b"], "each reads itself"
        now[0] += HOLD_SECONDS + 1
        await first.write()
        assert len(await store.scan("{public}:server:")) == 1
        await store.close()

    asyncio.run(run())


def test_a_store_of_its_own_is_not_written(tmp_path: Path) -> None:
    """A server alone lists itself and writes nothing."""

    async def run() -> None:
        store = EmbeddedStore(tmp_path)
        alone = Roster(store, "a", lambda: {"started_at": 1.0}, is_shared=False)
        await alone.keep()
        assert [entry["id"] for entry in await alone.list()] == ["a"]
        assert await store.scan("{public}:") == []
        await store.close()

    asyncio.run(run())


def test_what_a_server_says_of_itself_and_its_tenants(server: LiveServer) -> None:
    """The list names this server; while a request runs, the engine tells whose it is."""
    body = {"model": "p0", "prompt": "the", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with server.http() as http:
        with http.stream("POST", "/v1/completions", json=body) as reply:
            next(reply.iter_lines())
            shares = http.get("/admin/engine").json()["shares"]
        assert [(share["key"], share["num_running"]) for share in shares] == [("default", 1)]
        (own,) = http.get("/admin/servers").json()["data"]
        assert (own["model"], own["pid"]) == (server.model.served_name, os.getpid())
        assert own["generation_tokens"] > 0 and own["at"] >= own["started_at"]
