"""Places for those that wait: one number over several servers, none held for nobody, none lost for long."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from promptd_store import EmbeddedStore

from promptd.tenancy import PlacePool
from promptd.tenancy.parted import HOLD_SECONDS, LOOK_SECONDS
from tests.tenancy.conftest import Clock, counted, opened, refuse, with_store

LIMIT = 4


class Server:
    """A pool of places and the line in front of it, without an engine."""

    def __init__(self, store: EmbeddedStore, name: str, clock: Clock) -> None:
        self.pool = PlacePool(store, name, lambda tenant: self.num_waiting, clock)
        self.num_waiting = 0
        self.num_refused = 0

    def step(self, limit: int = LIMIT) -> None:
        """What the engine does after each of its steps."""
        surplus = self.pool.surplus("acme", self.num_waiting, limit) if self.num_waiting else 0
        self.num_waiting -= surplus
        self.num_refused += surplus

    async def arrive(self, count: int, limit: int = LIMIT) -> int:
        """Let so many come, and step until the store has answered; return how many wait then."""
        self.num_waiting += count
        self.step(limit)
        while (line := self.pool._lines.get("acme")) is not None and line.is_asking:
            await asyncio.sleep(0.001)
            self.step(limit)
        self.step(limit)
        return self.num_waiting


async def flood(servers: list[Server]) -> int:
    """Let 20 come to each server at once; return how many wait in all."""
    found = sum(await asyncio.gather(*(server.arrive(20) for server in servers)))
    assert sum(server.num_refused for server in servers) == 20 * len(servers) - found
    return found


def test_one_number_over_two_servers(tmp_path: Path, clock: Clock) -> None:
    """Of 40 that would wait on two servers four do; where each has a store of its own (the control) eight do."""

    async def run(store: EmbeddedStore) -> None:
        async with opened(tmp_path) as second, opened(tmp_path / "apart") as apart:
            assert await flood([Server(store, "one", clock), Server(second, "two", clock)]) == LIMIT
            clock.now += HOLD_SECONDS + 1  # these were killed: what they held comes back
            assert await flood([Server(store, "three", clock), Server(apart, "four", clock)]) == 2 * LIMIT

    with_store(tmp_path, run)


def test_places_go_where_they_are_needed(tmp_path: Path, clock: Clock) -> None:
    """All on one server; those that run from now on leave their places to another; who waits keeps one."""

    async def run(store: EmbeddedStore) -> None:
        async with opened(tmp_path) as second:
            one, two = Server(store, "one", clock), Server(second, "two", clock)
            assert await one.arrive(LIMIT) == LIMIT and not one.num_refused
            assert await two.arrive(1) == 0
            one.num_waiting = 1  # three run
            await one.pool.settle()
            clock.now += 2 * LOOK_SECONDS
            assert await two.arrive(LIMIT) == LIMIT - 1
            assert await one.arrive(1) == 1  # the newest went
            for _ in range(3):  # renewed for as long as somebody waits
                clock.now += HOLD_SECONDS - 1
                await one.pool.settle()
            clock.now += HOLD_SECONDS - 1
            assert await two.arrive(1) == LIMIT - 1
            one.num_waiting = two.num_waiting = 0
            await one.pool.settle()
            await two.pool.settle()
            assert one.pool._lines == two.pool._lines == {}
            assert not await store.scan("")

    with_store(tmp_path, run)


def test_nobody_waits_nobody_asks(tmp_path: Path, clock: Clock) -> None:
    """What runs at once, and a limit of 0, cost the store nothing; a flood of refusals one look."""

    async def run(store: EmbeddedStore) -> None:
        looks = counted(store, "get")
        server = Server(store, "one", clock)
        assert await server.arrive(0) == 0
        assert await server.arrive(5, limit=0) == 0
        assert looks == [0] and server.num_refused == 5
        await server.arrive(LIMIT)
        assert looks == [1]
        for _ in range(50):
            assert await server.arrive(3) == LIMIT
        assert looks == [1]
        assert await server.arrive(0, limit=2) == 2  # a lowered limit holds at once

    with_store(tmp_path, run)


def test_a_store_that_is_away(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each server lets the limit wait, whatever places it had; then those that still wait have theirs in the store."""

    async def run(store: EmbeddedStore) -> None:
        async with opened(tmp_path) as second:
            one, two = Server(store, "one", clock), Server(second, "two", clock)
            assert [await one.arrive(1), await two.arrive(LIMIT)] == [1, LIMIT - 1]
            clock.now += 2 * LOOK_SECONDS
            with monkeypatch.context() as away:
                for broken in (store, second):
                    away.setattr(broken, "get", refuse)
                assert [await server.arrive(LIMIT + 1) for server in (one, two)] == [LIMIT, LIMIT]
                clock.now += HOLD_SECONDS + 1
                one.step()
                assert one.num_waiting == LIMIT
                one.num_waiting = two.num_waiting = 1  # the others run
                one.step()
                assert [await one.arrive(1), await one.arrive(LIMIT)] == [2, LIMIT]
            one.num_waiting = 3
            await one.pool.settle()
            await two.pool.settle()
            assert await two.arrive(LIMIT) == 1

    with_store(tmp_path, run)
