"""Who shares a store, and whose work an engine has."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from promptd_store import EmbeddedStore

from promptd.engine.request import GenerateRequest
from promptd.engine.share import Share
from promptd.roster import HOLD_SECONDS, REMEMBER_SECONDS, Roster
from tests.api.conftest import LiveServer
from tests.engine.harness import greedy, make_engine


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
        now[0] += REMEMBER_SECONDS
        await first.write()
        assert len(await store.scan("{public}:server:")) == 1
        await store.close()

    asyncio.run(run())


def test_who_has_forgotten_what_was_erased(tmp_path: Path) -> None:
    """Each tells how far it is; a silent one is not listed and still counts, until nobody can be served by it."""

    async def run() -> None:
        store, now = EmbeddedStore(tmp_path), [1000.0]

        def roster(name: str) -> Roster:
            told = {"started_at": 1.0, "host": "here", "pid": ord(name)}
            return Roster(store, name, lambda: told, is_shared=True, clock=lambda: now[0])

        async def seen(erasure: int) -> list[tuple[str, bool, bool]]:
            found = await first.acknowledged(erasure)
            return [(one["id"], one["has_forgotten"], one["is_silent"]) for one in found]

        first, second = roster("a"), roster("b")
        await first.acknowledge(7)
        await second.acknowledge(6)
        assert await seen(6) == [("a", True, False), ("b", True, False)]
        assert await seen(7) == [("a", True, False), ("b", False, False)]
        now[0] += HOLD_SECONDS
        assert await seen(7) == [("a", True, False), ("b", False, True)]
        await second.acknowledge(8)
        assert await seen(8) == [("a", False, False), ("b", True, False)]
        now[0] += REMEMBER_SECONDS + 1
        await first.acknowledge(9)
        assert await seen(9) == [("a", True, False)]
        await store.close()

    asyncio.run(run())


def test_a_store_of_its_own_is_not_written(tmp_path: Path) -> None:
    """A server alone lists itself and writes nothing."""

    async def run() -> None:
        store = EmbeddedStore(tmp_path)
        alone = Roster(store, "a", lambda: {"started_at": 1.0}, is_shared=False)
        await alone.keep()
        await alone.acknowledge(1)
        assert [entry["id"] for entry in await alone.list()] == ["a"]
        assert await store.scan("{public}:") == []
        await store.close()

    asyncio.run(run())


def test_whose_work_an_engine_has(tiny_models: dict[str, Path]) -> None:
    """Each share that has work is named with its rows, and no longer than it has some."""
    engine = make_engine(tiny_models["llama"], max_num_seqs=2)
    for share, count in ((Share("acme", 2.0), 3), (Share("globex"), 1)):
        for number in range(count):
            request = GenerateRequest(f"{share.key}-{number}", (5, 6, 7), greedy(4), share=share, salt=share.key)
            engine.add_request(request)

    def read() -> dict[str, tuple[float, int, int]]:
        readings = engine.scheduler.waiting.readings()
        return {one.key: (one.weight, one.num_running, one.num_waiting) for one in readings}

    assert read() == {"acme": (2.0, 0, 3), "globex": (1.0, 0, 1)}
    engine.step()
    assert read() == {"acme": (2.0, 1, 2), "globex": (1.0, 1, 0)}
    while engine.has_work:
        engine.step()
    assert read() == {}


def test_what_a_server_says_of_itself(server: LiveServer) -> None:
    """The list names this server, its process and what it has done."""
    with server.http() as http:
        body = {"model": "p0", "prompt": "the", "max_tokens": 2, "ignore_eos": True}
        assert http.post("/v1/completions", json=body).status_code == 200
        (own,) = http.get("/admin/servers").json()["data"]
        assert http.get("/admin/engine").json()["shares"] == []
    assert (own["model"], own["pid"]) == (server.model.served_name, os.getpid())
    assert own["generation_tokens"] > 0 and own["at"] >= own["started_at"]
