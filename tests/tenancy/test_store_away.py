"""While the store is away: what was known of tenants stays good, and each server counts by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from promptd_store import EmbeddedStore, StoreUnavailableError

from promptd.tenancy import KeyOffice, KeyRing, RateMeter, SlotPool, TenantBook, TenantDirectory, directory
from promptd.tenancy.parted import HOLD_SECONDS
from tests.tenancy.conftest import Clock, is_given, opened, refuse, with_store

SECRET = b"a secret of the server"
LIMIT = 100
HOUR = 3600.0


async def passed(count: int, meter: RateMeter) -> int:
    """How many of so many requests are let through."""
    return sum([await is_given(meter.take("acme", "requests", LIMIT, 1)) for _ in range(count)])


def test_what_was_known_stays_good(tmp_path: Path, clock: Clock) -> None:
    """A server that has run for hours knows its tenants when the store goes: their keys for half a minute from then,
    their limits as long as it is away. Nobody else is let in."""

    async def run(store: EmbeddedStore) -> None:
        tenants = TenantDirectory(TenantBook(store, clock), clock)
        ring = KeyRing({}, "the-admin-key", "default", key_secret=SECRET, clock=clock)
        await ring.connect(tenants)
        office = KeyOffice(tenants, SECRET)
        header = f"Bearer {(await office.issue('acme', ['infer'], by='root')).key.text}"
        await tenants.poll()
        await ring.authenticate(header)
        for _ in range(10):
            clock.now += HOUR
            await tenants.poll()
        await store.close()
        for seconds in (1.0, directory.MAX_OUTAGE_SECONDS - 2):
            clock.now += seconds
            assert (await ring.authenticate(header)).tenant == "acme"
        clock.now += 2
        with pytest.raises(StoreUnavailableError):
            await ring.authenticate(header)
        clock.now += HOUR
        assert (await tenants.tenant("acme", max_outage_seconds=2 * HOUR)).name == "acme"
        with pytest.raises(StoreUnavailableError):
            await tenants.tenant("eve", max_outage_seconds=2 * HOUR)

    with_store(tmp_path, run)


def test_rates_are_counted_alone(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each server lets the limit through and no more, whatever part it had taken; then they are exact again."""

    async def run(store: EmbeddedStore) -> None:
        async with opened(tmp_path) as second:
            meters = [RateMeter(store, clock), RateMeter(second, clock)]
            assert [await passed(5, meter) for meter in meters] == [5, 5]
            with monkeypatch.context() as away:
                for one in (store, second):
                    away.setattr(one, "get", refuse)
                assert [5 + await passed(LIMIT, meter) for meter in meters] == [LIMIT, LIMIT]
                clock.now += 60
                assert [await passed(2 * LIMIT, meter) for meter in meters] == [LIMIT, LIMIT]
            with monkeypatch.context() as away:
                clock.now += 60
                away.setattr(store, "transact", refuse)
                assert await passed(2 * LIMIT, meters[0]) == LIMIT
            clock.now += 60
            assert sum([await passed(LIMIT, meter) for meter in meters]) == LIMIT

    with_store(tmp_path, run)


def test_slots_are_counted_alone(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each server has as many open as the limit says, whatever it held; what it has open then is its own again."""

    async def run(store: EmbeddedStore) -> None:
        async with opened(tmp_path) as second:
            pools = [SlotPool(store, "one", clock), SlotPool(second, "two", clock)]

            async def enter(number: int) -> bool:
                return await is_given(pools[number].enter("acme", 10))

            assert [await enter(number % 2) for number in range(6)] == [True] * 6
            clock.now += HOLD_SECONDS + 1
            with monkeypatch.context() as away:
                for one in (store, second):
                    away.setattr(one, "get", refuse)
                assert sum([await enter(0) for _ in range(20)]) == 7
                pools[0].leave("acme")
                assert [await enter(0), await enter(0)] == [True, False]
            await pools[0].settle()
            assert [await enter(0), await enter(1)] == [False, False]
            for _ in range(5):
                pools[0].leave("acme")
            await pools[0].settle()
            clock.now += 1
            assert sum([await enter(1) for _ in range(20)]) == 2

    with_store(tmp_path, run)
