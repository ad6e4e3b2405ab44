"""Counts and quotas: exact in one step, whoever else writes."""

from __future__ import annotations

import asyncio

import pytest
from promptd_store import Add, Check, CheckFailedError, LimitReachedError, Put, Store, hold
from promptd_store.holdings import held_key, number_held, quota_key

from tests.store.conftest import StoreFactory

pytestmark = pytest.mark.anyio

COUNT, LIMIT = held_key("acme", "things"), quota_key("acme", "things")


async def test_counts(store: Store) -> None:
    """They go up and down by any amount, below zero too; at zero there is no record."""
    for amount, after in ((5, 5), (-2, 3), (-4, -1), (1, 0), (1 << 50, 1 << 50)):
        await store.transact(adds=[Add(COUNT, amount)])
        assert await number_held(store, "acme", "things") == after
        assert (await store.get(COUNT) is None) == (after == 0)


async def test_a_count_is_a_record(store: Store) -> None:
    """Its etag is new with every addition, so that whoever read it before is told."""
    await store.transact(adds=[Add(COUNT, 1)])
    before = await store.get(COUNT)
    assert before is not None and before.value == b"1"
    await store.transact(adds=[Add(COUNT, 1)])
    with pytest.raises(CheckFailedError):
        await store.transact([Check(COUNT, before.etag)], [Put(COUNT, b"7")])
    await store.transact(puts=[Put(COUNT, b"7")])
    await store.transact(adds=[Add(COUNT, -6)])
    assert await number_held(store, "acme", "things") == 1


async def test_over_the_limit_nothing_is_done(store: Store) -> None:
    """Not the other additions, puts and appends of the step either; less is always allowed, and so is no limit."""
    other = held_key("acme", "others")
    await store.transact(puts=[Put(LIMIT, b"10")], adds=[Add(COUNT, 8)])
    step = {"puts": [Put("{acme}:x", b"x")], "adds": [Add(other, 1), hold("acme", "things", 3)]}
    with pytest.raises(LimitReachedError) as refused:
        await store.transact(**step)  # type: ignore[arg-type]
    error = refused.value
    assert (error.key, error.held, error.amount, error.limit) == (COUNT, 8, 3, 10)
    assert await store.get("{acme}:x") is None
    assert (await number_held(store, "acme", "things"), await number_held(store, "acme", "others")) == (8, 0)
    await store.transact(adds=[hold("acme", "things", 2)])
    await store.transact(puts=[Put(LIMIT, b"1")])
    await store.transact(adds=[hold("acme", "things", -1)])
    await store.transact(adds=[hold("acme", "things", 5, is_limited=False)])
    await store.transact(deletes=[LIMIT])
    await store.transact(**step)  # type: ignore[arg-type]
    assert await number_held(store, "acme", "things") == 17


async def test_a_failed_check_counts_nothing(store: Store) -> None:
    """All or nothing holds the other way round, too."""
    with pytest.raises(CheckFailedError):
        await store.transact([Check("{acme}:x", "1")], adds=[Add(COUNT, 1)])
    assert await number_held(store, "acme", "things") == 0


async def test_a_burst_over_two_connections_gets_exactly_the_limit(open_store: StoreFactory) -> None:
    """Of 60 at once ten succeed, whichever they are; those that came without a limit (the control) all do."""
    stores = [await open_store(), await open_store()]
    await stores[0].transact(puts=[Put(LIMIT, b"10")])

    async def take(number: int, *, is_limited: bool) -> bool:
        try:
            await stores[number % 2].transact(adds=[hold("acme", "things", 1, is_limited=is_limited)])
        except LimitReachedError:
            return False
        return True

    assert sum(await asyncio.gather(*(take(n, is_limited=True) for n in range(60)))) == 10
    assert await number_held(stores[1], "acme", "things") == 10
    assert sum(await asyncio.gather(*(take(n, is_limited=False) for n in range(15)))) == 15
    assert await number_held(stores[1], "acme", "things") == 25
