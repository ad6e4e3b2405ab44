"""Admins' servers are killed amid deeds: no deed is without its entry, and no entry without its deed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from promptd_store import EmbeddedStore, Put

from promptd.tenancy import TenantBook, read_audit
from promptd.tenancy.audit import MAX_LISTED
from promptd.tenancy.store_keys import tenant_key
from tests.store.forge import Forge
from tests.tenancy.conftest import with_store


@pytest.fixture(scope="module")
def workers() -> Iterator[Forge]:
    """Processes on order."""
    made = Forge()
    yield made
    made.close()


async def fault(store: EmbeddedStore, num_acknowledged: int) -> str | None:
    """What is wrong with a tenant whose limit was raised by one again and again; None where nothing is."""
    book = TenantBook(store)
    number = (await book.read("acme")).limits.max_prompts
    told: list[object] = []
    after = 0
    while page := await read_audit(store, "acme", after=after, limit=MAX_LISTED):
        told += [entry.details["max_prompts"] for _, entry in page]
        after = page[-1][0]
    if told != list(range(1, (number or 0) + 1)):
        return f"the limit is {number}, the entries tell of {told[-3:]}, {len(told)} in all"
    if not await book.is_intact("acme"):
        return "the log is not intact"
    return None if (number or 0) >= num_acknowledged else f"{num_acknowledged} was acknowledged, the limit is {number}"


@pytest.mark.parametrize("num_deeds", [20, pytest.param(1000, marks=pytest.mark.long)])
def test_deeds_and_entries_are_one(workers: Forge, tmp_path: Path, num_deeds: int) -> None:
    """Two at once, killed again and again until there are so many deeds. The control changes a record alone."""
    dice, last, kills = random.Random(1), 0, 0
    while last < num_deeds:
        said = workers.write_and_kill(
            tmp_path, kills, num_acks=dice.randint(1, 4), delay_seconds=dice.random() * 0.02, do="govern"
        )
        last, kills = max([last, *(message["number"] for message in said)]), kills + 2
        assert with_store(tmp_path, lambda store: fault(store, last)) is None  # noqa: B023 - called at once
    print(json.dumps({"deeds": last, "kills": kills}))

    async def change_alone(store: EmbeddedStore) -> str | None:
        tenant = await TenantBook(store).read("acme")
        changed = replace(tenant, limits=tenant.limits.changed({"max_prompts": last + 1}))
        await store.transact(puts=[Put(tenant_key("acme"), changed.to_bytes())])
        return await fault(store, last)

    assert with_store(tmp_path, change_alone) is not None
