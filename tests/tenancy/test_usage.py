"""The ledger: what was added is what is read, whatever happens in between."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from promptd_store import EmbeddedStore, Put, StoreUnavailableError
from promptd_store.names import ERASED

from promptd.tenancy import Counts, UsageLedger
from tests.tenancy.conftest import Clock, opened, with_store

DAYS = ("1970-01-01", "1970-12-31")


def test_two_servers_write_one_sum(tmp_path: Path, clock: Clock) -> None:
    """Counts of the same day, key and prompt, written by two servers at once again and again, add up exactly."""

    async def run(store: EmbeddedStore) -> None:
        async with opened(tmp_path) as second:
            ledgers = [UsageLedger(store, "one", clock), UsageLedger(second, "two", clock)]
            rng, expected = random.Random(1), Counts()

            async def server(ledger: UsageLedger) -> None:
                nonlocal expected
                for _ in range(40):
                    for _ in range(rng.randrange(5)):
                        counts = Counts(1, rng.randrange(100), rng.randrange(100), rng.randrange(9), rng.randrange(9))
                        ledger.add("acme", "key", rng.choice(("", "tone", "other/name")), counts)
                        expected += counts
                    await ledger.flush()

            await asyncio.gather(*map(server, ledgers))
            ledgers[0].add("acme2", "key", "tone", Counts(1))
            found = await ledgers[1].read("acme", *DAYS)
            assert {key.prompt for key, _ in found} == {"", "tone", "other/name"}
            assert sum((counts for _, counts in found), Counts()) == expected
            for ledger in ledgers:
                await ledger.close()

    with_store(tmp_path, run)


def test_what_comes_during_a_write_waits_for_the_next(tmp_path: Path, clock: Clock) -> None:
    """Under load a write would have no end: as soon as it is done more has come."""

    async def run(store: EmbeddedStore) -> None:
        ledger, transact, steps = UsageLedger(store, "one", clock), store.transact, 0

        async def busy(*arguments: object, **options: object) -> dict[str, str]:
            nonlocal steps
            steps += 1
            if steps < 50:
                ledger.add("acme", "key", "tone", Counts(1))
            return await transact(*arguments, **options)  # type: ignore[arg-type]

        store.transact = busy  # type: ignore[method-assign]
        ledger.add("acme", "key", "tone", Counts(1))
        for number in (1, 2):
            await ledger.flush()
            assert steps == number
        ((_, counts),) = await ledger.read("acme", *DAYS)
        assert counts.requests == steps == 3

    with_store(tmp_path, run)


def test_nobody_waits_for_an_erased_tenant(tmp_path: Path, clock: Clock) -> None:
    """What it was served in its last second is counted nowhere; what others were is, then and later."""

    async def run(store: EmbeddedStore) -> None:
        ledger = UsageLedger(store, "one", clock)
        for _ in range(2):
            for tenant in ("acme", "globex", "other"):
                ledger.add(tenant, "key", "tone", Counts(1))
            await store.transact(puts=[Put(ERASED + tenant, b"{}") for tenant in ("acme", "globex")])
            await ledger.flush()
        ((_, counts),) = await ledger.read("other", *DAYS)
        assert counts.requests == 2
        assert not await store.scan("{acme}:") and not await store.scan("{globex}:")
        ledger.add("acme", "key", "tone", Counts(1))
        await ledger.close()

    with_store(tmp_path, run)


def test_days_are_kept_apart(tmp_path: Path, clock: Clock) -> None:
    """A day is UTC's; a range has both its ends."""

    async def run(store: EmbeddedStore) -> None:
        ledger = UsageLedger(store, "one", clock)
        for at in (0, 86399, 86400, 5 * 86400):
            clock.now = at
            ledger.add("acme", "key", "", Counts(1))
        for first, last, number in (("1970-01-01", "1970-01-01", 2), ("1970-01-02", "1970-01-06", 2), (*DAYS, 4)):
            found = await ledger.read("acme", first, last)
            assert sum(counts.requests for _, counts in found) == number

    with_store(tmp_path, run)


@pytest.mark.parametrize("was_written", [True, False])
def test_a_lost_answer_counts_neither_twice_nor_never(tmp_path: Path, clock: Clock, was_written: bool) -> None:
    """The store fails before or after it has written: the next try knows which it was."""

    async def run(store: EmbeddedStore) -> None:
        ledger, transact = UsageLedger(store, "one", clock), store.transact
        ledger.add("acme", "key", "tone", Counts(1, 10, 5))
        await ledger.flush()

        async def failing(*arguments: object, **options: object) -> dict[str, str]:
            if was_written:
                await transact(*arguments, **options)  # type: ignore[arg-type]
            raise StoreUnavailableError("the answer was lost")

        ledger.add("acme", "key", "tone", Counts(1, 20, 7))
        store.transact = failing  # type: ignore[method-assign]
        with pytest.raises(StoreUnavailableError):
            await ledger.flush()
        store.transact = transact  # type: ignore[method-assign]
        ((_, counts),) = await ledger.read("acme", *DAYS)
        assert counts == Counts(2, 30, 12)

    with_store(tmp_path, run)


def test_what_is_added_while_a_batch_fails_is_its_own(tmp_path: Path, clock: Clock) -> None:
    """A batch whose answer was lost is not written again because more has come since."""

    async def run(store: EmbeddedStore) -> None:
        ledger, transact = UsageLedger(store, "one", clock), store.transact
        ledger.add("acme", "key", "tone", Counts(1, 10, 5))

        async def failing(*arguments: object, **options: object) -> dict[str, str]:
            await transact(*arguments, **options)  # type: ignore[arg-type]
            ledger.add("acme", "key", "tone", Counts(1, 1, 1))
            raise StoreUnavailableError("the answer was lost")

        store.transact = failing  # type: ignore[method-assign]
        with pytest.raises(StoreUnavailableError):
            await ledger.flush()
        store.transact = transact  # type: ignore[method-assign]
        ((_, counts),) = await ledger.read("acme", *DAYS)
        assert counts == Counts(2, 11, 6)

    with_store(tmp_path, run)
