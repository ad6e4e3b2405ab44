"""One request of a tenant: what it took is given back at its end, all of it and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from promptd_store import EmbeddedStore

from promptd.errors import InvalidRequestError
from promptd.tenancy import (
    Claim,
    Counts,
    Gate,
    PlacePool,
    Principal,
    RateMeter,
    ServerBudgets,
    SlotPool,
    TenantBook,
    TenantDirectory,
    UsageLedger,
    set_limits,
)
from tests.tenancy.conftest import Clock, with_store

CALLER = Principal("acme", frozenset(), "key")
LIMIT = 1000


def directory_on(store: EmbeddedStore, clock: Clock) -> TenantDirectory:
    """What a server knows of tenants."""
    return TenantDirectory(TenantBook(store, clock), clock)


def gate_on(directory: TenantDirectory, clock: Clock) -> Gate:
    """A server's gate: ten requests, 10,000 tokens and 1,000 bytes in all."""
    store = directory.book.store
    budgets = ServerBudgets.of(max_waiting_or_running=8, max_model_len=1000, max_open_upload_bytes=1000)
    places = PlacePool(store, "one", lambda tenant: 0, clock)
    slots, usage = SlotPool(store, "one", clock), UsageLedger(store, "one", clock)
    return Gate(directory, budgets, RateMeter(store, clock), slots, places, usage)


def held(gate: Gate) -> list[int]:
    """What is in use of each of the server's budgets."""
    budgets = gate.budgets
    kinds = (budgets.requests, budgets.tokens, budgets.upload_bytes, budgets.event_streams)
    return [one.reading().used for one in kinds]


def test_what_is_held_goes_back(tmp_path: Path, clock: Clock) -> None:
    """What the headers claimed, what is taken later beyond that, and of a request that is refused half-way."""

    async def run(store: EmbeddedStore) -> None:
        gate = gate_on(directory_on(store, clock), clock)
        visit = await gate.enter(CALLER, Claim(is_inference=True, num_tokens=10))
        visit.hold_tokens(8)  # claimed already
        visit.hold_tokens(8)  # six more
        visit.free_tokens(8)
        visit.hold_tokens(8)  # those of the part that has ended
        visit.hold_bytes(0)
        visit.hold_bytes(5000)  # as many as one may have
        visit.hold_stream()
        assert held(gate) == [1, 16, 800, 1]
        with pytest.raises(InvalidRequestError):
            await gate.enter(CALLER, Claim(is_inference=True, num_tokens=9000))
        assert held(gate) == [1, 16, 800, 1]
        visit.leave()
        assert held(gate) == [0, 0, 0, 0]

    with_store(tmp_path, run)


@pytest.mark.parametrize(("seconds", "num_used", "left"), [(0, 100, 800), (60, 100, 200), (60, 500, 0)])
def test_tokens_of_a_minute_that_is_over_do_not_come_back(
    tmp_path: Path, clock: Clock, seconds: int, num_used: int, left: int
) -> None:
    """A request of 600 tokens and, later, 300 ends where others have all the rest: what it did not use is there again.
    But not what was of the minute before: the new one would have more than there is."""

    async def run(store: EmbeddedStore) -> None:
        directory = directory_on(store, clock)
        gate = gate_on(directory, clock)
        await set_limits(directory, "acme", {"tokens_per_minute": LIMIT}, by="root")
        visit, other = [await gate.enter(CALLER, Claim()) for _ in range(2)]
        visit.watch(lambda: ("", Counts(prompt_tokens=num_used)))
        await visit.reserve_tokens(600)
        clock.now += seconds
        await visit.reserve_tokens(300)
        await other.reserve_tokens(gate.rates.reading("acme", "tokens", LIMIT).remaining)
        visit.leave()
        assert gate.rates.reading("acme", "tokens", LIMIT).remaining == left

    with_store(tmp_path, run)
