"""Rates and slots: exact over several servers, few steps in the store, nothing lost for long."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from promptd_store import EmbeddedStore, Record

from promptd.errors import QuotaError, RateLimitError
from promptd.tenancy import RateMeter, SlotPool
from promptd.tenancy.parted import HOLD_SECONDS, LOOK_SECONDS
from promptd.tenancy.rates import NUM_PARTS
from tests.tenancy.conftest import Clock, counted, is_given, opened, with_store


def test_a_burst_over_two_servers_gets_exactly_the_limit(tmp_path: Path, clock: Clock) -> None:
    """Of 10,000 requests at once exactly 1,000 pass, at the cost of a few dozen steps in the store."""

    async def run(store: EmbeddedStore) -> None:
        async with opened(tmp_path) as second:
            steps = [counted(store), counted(second)]
            meters = [RateMeter(store, clock), RateMeter(second, clock)]

            refused: list[RateLimitError] = []

            async def ask(number: int) -> bool:
                try:
                    await meters[number % 2].take("acme", "requests", 1000, 1)
                except RateLimitError as error:
                    refused.append(error)
                    return False
                return True

            passed = sum(await asyncio.gather(*map(ask, range(10_000))))
            print(f"passed {passed} of 10,000 at a limit of 1,000; steps in the store {steps}")
            assert passed == 1000
            assert {error.headers["x-ratelimit-limit-requests"] for error in refused} == {"1000"}
            assert all(1 <= (error.retry_after_seconds or 0) <= 60 for error in refused)
            assert sum(count for (count,) in steps) <= 3 * NUM_PARTS
            await meters[0].take("other", "requests", 1000, 1)  # another tenant's are its own
            clock.now += 60
            assert sum(await asyncio.gather(*map(ask, range(4000)))) == 1000

    with_store(tmp_path, run)


def test_tokens_are_reserved_and_given_back(tmp_path: Path, clock: Clock) -> None:
    """What was not used is there for the next in the same minute, and for nobody after it."""

    async def run(store: EmbeddedStore) -> None:
        meter = RateMeter(store, clock)
        reading = await meter.take("acme", "tokens", 1000, 900)
        assert reading.remaining == 100
        with pytest.raises(RateLimitError) as refused:
            await meter.take("acme", "tokens", 1000, 200)
        assert not isinstance(refused.value, QuotaError)
        assert refused.value.headers["x-ratelimit-remaining-tokens"] == "100"
        meter.give_back("acme", "tokens", 850, reading.minute)
        assert (await meter.take("acme", "tokens", 1000, 900)).remaining == 50
        clock.now += 60
        meter.give_back("acme", "tokens", 900, reading.minute)  # too late
        assert (await meter.take("acme", "tokens", 1000, 600)).remaining == 400
        meter.give_back("acme", "tokens", 600, reading.minute)  # nor is it of the minute that has begun
        assert (await meter.take("acme", "tokens", 1000, 400)).remaining == 0
        with pytest.raises(QuotaError):  # no waiting will help
            await meter.take("acme", "tokens", 1000, 1001)

    with_store(tmp_path, run)


def test_no_step_in_the_store_while_a_part_lasts(tmp_path: Path, clock: Clock) -> None:
    """Sixteen parts a minute at most, however many requests."""

    async def run(store: EmbeddedStore) -> None:
        steps, meter = counted(store), RateMeter(store, clock)
        for _ in range(16_000):
            await meter.take("acme", "requests", 16_000, 1)
        assert steps[0] == NUM_PARTS
        for _ in range(100):
            with pytest.raises(RateLimitError):
                await meter.take("acme", "requests", 16_000, 1)
        assert steps[0] == NUM_PARTS

    with_store(tmp_path, run)


def test_clocks_that_differ_by_a_second(tmp_path: Path, clock: Clock) -> None:
    """Where one server's minute has begun and the other's has not, both take of that one: the limit, and no more."""

    async def run(store: EmbeddedStore) -> None:
        async with opened(tmp_path) as second:
            late = Clock()
            clock.now, late.now = 60_000.5, 59_999.5
            meters = [RateMeter(store, clock), RateMeter(second, late)]
            asked = [meters[number % 2].take("acme", "requests", 100, 1) for number in range(1000)]
            assert sum([await is_given(one) for one in asked]) == 100
            late.now += 1
            for meter in meters:
                assert not await is_given(meter.take("acme", "requests", 100, 1))
            clock.now += 60
            late.now += 3600  # a clock that is wrong by far does not take the others' minutes away
            for meter in (*meters[::-1], meters[0]):
                assert await is_given(meter.take("acme", "requests", 100, 1))

    with_store(tmp_path, run)


def test_a_limit_that_is_changed_within_a_minute(tmp_path: Path, clock: Clock) -> None:
    """A higher one is there at once, a lower one also where more than that was taken from the store."""

    async def run(store: EmbeddedStore) -> None:
        meter = RateMeter(store, clock)

        async def passed(limit: int) -> int:
            return sum([await is_given(meter.take("acme", "requests", limit, 1)) for _ in range(50)])

        assert [await passed(limit) for limit in (10, 20, 5, 1600)] == [10, 10, 0, 50]
        assert [await passed(limit) for limit in (80, 70, 75)] == [10, 0, 0]

    with_store(tmp_path, run)


def test_slots_over_two_servers(tmp_path: Path, clock: Clock) -> None:
    """Of 500 at once exactly ten are in; each that leaves lets one in; a killed server's come back by themselves."""

    async def run(store: EmbeddedStore) -> None:
        async with opened(tmp_path) as second:
            pools = [SlotPool(store, "one", clock), SlotPool(second, "two", clock)]

            async def enter(number: int) -> bool:
                return await is_given(pools[number % 2].enter("acme", 10))

            results = await asyncio.gather(*map(enter, range(500)))
            inside = [sum(results[0::2]), sum(results[1::2])]
            assert sum(inside) == 10
            for number, count in enumerate(inside):
                for _ in range(count):
                    pools[number].leave("acme")
            await pools[0].settle()
            await pools[1].settle()
            assert [await enter(0) for _ in range(11)] == [True] * 10 + [False]  # all of them on one server
            pools[0].leave("acme")
            assert not await enter(1)  # it is that server's until it settles
            await pools[0].settle()
            assert not await enter(1)  # it has looked just now
            clock.now += 2 * LOOK_SECONDS
            assert await enter(1)
            assert not await enter(0)
            pools[0] = SlotPool(store, "restarted", clock)  # killed: nobody says good-bye
            assert not await enter(0)
            await pools[1].settle()
            clock.now += HOLD_SECONDS + 1
            assert sum([await enter(0) for _ in range(20)]) >= 9

    with_store(tmp_path, run)


def test_a_flood_of_refusals_costs_few_looks(tmp_path: Path, clock: Clock) -> None:
    """One look for all that come at about the same time; a slot of one's own that comes free is found without any."""

    async def run(store: EmbeddedStore) -> None:
        async with opened(tmp_path) as second:
            other, pool = SlotPool(store, "one", clock), SlotPool(second, "two", clock)
            for _ in range(2):
                await other.enter("acme", 3)
            await pool.enter("acme", 3)
            steps = counted(second)
            refused = await asyncio.gather(*(pool.enter("acme", 3) for _ in range(500)), return_exceptions=True)
            assert all(isinstance(one, RateLimitError) for one in refused) and steps[0] <= 1
            pool.leave("acme")
            await pool.enter("acme", 3)
            assert steps[0] <= 1

    with_store(tmp_path, run)


def test_who_comes_while_slots_go_back(tmp_path: Path, clock: Clock) -> None:
    """A slot that the store has back already is nobody's here: two servers together have never one too many."""

    async def run(store: EmbeddedStore) -> None:
        async with opened(tmp_path) as second:
            pool, other = SlotPool(store, "one", clock), SlotPool(second, "two", clock)
            await pool.enter("acme", 32)  # which takes a part of two
            transact, is_written, is_told = store.transact, asyncio.Event(), asyncio.Event()

            async def slow(*arguments: object, **options: object) -> dict[str, str]:
                etags = await transact(*arguments, **options)  # type: ignore[arg-type]
                is_written.set()
                await is_told.wait()
                return etags

            store.transact = slow  # type: ignore[method-assign]
            settling = asyncio.create_task(pool.settle())
            await is_written.wait()
            late = asyncio.create_task(pool.enter("acme", 32))
            num_others = sum([await is_given(other.enter("acme", 32)) for _ in range(40)])
            is_told.set()
            await settling
            assert 1 + num_others + await is_given(late) == 32

    with_store(tmp_path, run)


def test_a_lowered_limit_holds_at_once(tmp_path: Path, clock: Clock) -> None:
    """Also where the server still holds more slots than there may be now."""

    async def run(store: EmbeddedStore) -> None:
        pool = SlotPool(store, "one", clock)
        for _ in range(4):
            await pool.enter("acme", 160)
        with pytest.raises(RateLimitError):
            await pool.enter("acme", 4)
        await pool.enter("acme", 5)
        with pytest.raises(RateLimitError):
            await SlotPool(store, "two", clock).enter("zero", 0)

    with_store(tmp_path, run)


def test_a_request_that_waited_while_its_slots_were_forgotten(tmp_path: Path, clock: Clock) -> None:
    """It gets a slot that is free by then, and gives it back: what it took is not lost with what was forgotten."""

    async def run(store: EmbeddedStore) -> None:
        async with opened(tmp_path) as second:
            pool, other = SlotPool(store, "one", clock), SlotPool(second, "two", clock)
            await other.enter("acme", 1)
            read, is_free, num_reads = store.get, asyncio.Event(), 0

            async def counted_read(key: str) -> Record | None:
                nonlocal num_reads
                num_reads += 1
                if num_reads == 2:
                    await is_free.wait()
                return await read(key)

            store.get = counted_read  # type: ignore[method-assign]
            refused = asyncio.create_task(pool.enter("acme", 1))
            settling = asyncio.create_task(pool.settle())  # finds that nothing is held, and forgets the tenant
            waiting = asyncio.create_task(pool.enter("acme", 1))
            with pytest.raises(RateLimitError):
                await refused
            await settling
            other.leave("acme")
            await other.settle()
            is_free.set()
            await waiting
            with pytest.raises(RateLimitError):
                await other.enter("acme", 1)
            pool.leave("acme")
            await pool.settle()
            clock.now += 2 * LOOK_SECONDS
            await other.enter("acme", 1)

    with_store(tmp_path, run)
