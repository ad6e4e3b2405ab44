"""Admins' servers are killed amid deeds: no deed is without its entry in the audit log, no entry without its deed."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from promptd_store import EmbeddedStore, Put

from promptd.tenancy import TenantBook, read_audit
from promptd.tenancy.audit import MAX_LISTED
from promptd.tenancy.store_keys import tenant_key
from tests.store.forge import Forge

pytestmark = pytest.mark.anyio


async def fault(folder: Path, num_acknowledged: int) -> str | None:
    """What is wrong with a tenant whose limit was raised by one again and again; None where nothing is."""
    store = EmbeddedStore(folder)
    book, told, after = TenantBook(store), list[object](), 0
    try:
        number = (await book.read("acme")).limits.max_prompts or 0
        while page := await read_audit(store, "acme", after=after, limit=MAX_LISTED):
            told += [entry.details["max_prompts"] for _, entry in page]
            after = page[-1][0]
        if told != list(range(1, number + 1)):
            return f"the limit is {number}, {len(told)} entries tell of {told[-3:]} in the end"
        if not await book.is_intact("acme"):
            return "the log is not intact"
    finally:
        await store.close()
    return None if number >= num_acknowledged else f"{num_acknowledged} was acknowledged, the limit is {number}"


@pytest.mark.parametrize("num_deeds", [20, pytest.param(1000, marks=pytest.mark.long)])
async def test_deeds_and_entries_are_one(forge: Forge, tmp_path: Path, num_deeds: int) -> None:
    """Two at once, killed again and again until there are so many deeds. The control changes the record alone."""
    dice, last, kills = random.Random(1), 0, 0
    while last < num_deeds:
        delay = dice.random() * 0.02
        said = forge.write_and_kill(tmp_path, kills, num_acks=dice.randint(1, 4), delay_seconds=delay, do="govern")
        last, kills = max([last, *(message["number"] for message in said)]), kills + 2
        assert await fault(tmp_path, last) is None
    print(json.dumps({"deeds": last, "kills": kills}))
    store = EmbeddedStore(tmp_path)
    tenant = await TenantBook(store).read("acme")
    more = replace(tenant, limits=tenant.limits.changed({"max_prompts": (tenant.limits.max_prompts or 0) + 1}))
    await store.transact(puts=[Put(tenant_key("acme"), more.to_bytes())])
    await store.close()
    assert await fault(tmp_path, last) is not None
