"""Acknowledged is durable: writers are killed with SIGKILL at random instants, and nothing they promised is lost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from promptd_store import EmbeddedStore, PromptCatalog, PromptNotFoundError, StoreError

from tests.store.files import SPEC
from tests.store.forge import Forge, Message

pytestmark = pytest.mark.anyio

KILLS = 20


async def is_kept(catalog: PromptCatalog, ack: Message) -> bool:
    """Whether a promise holds: a deleted name is gone, a published version is readable and not overtaken backwards."""
    try:
        if ack["op"] == "delete":
            await catalog.resolve("acme", ack["name"])
            return False
        current = await catalog.resolve("acme", ack["name"])
        record = await catalog.resolve("acme", f"{ack['name']}@{ack['version']}")
        return (await catalog.load(record)).version == ack["version"] and current.number >= ack["number"]
    except PromptNotFoundError:
        return bool(ack["op"] == "delete")
    except StoreError:
        return False


async def broken(folder: Path, acks: list[Message]) -> list[Message]:
    """The promises that a fresh process finds broken."""
    store = EmbeddedStore(folder)
    catalog = PromptCatalog(store, SPEC)
    found = [ack for ack in acks if not await is_kept(catalog, ack)]
    await store.close()
    return found


async def test_acknowledged_survives_kill_9(tmp_path: Path, forge: Forge) -> None:
    """Over many kills in the middle of writing, every acknowledged version is there and every deletion holds.

    The control: the same check reports exactly the version whose blob is taken away afterwards.
    """
    folder, dice = tmp_path / "store", random.Random(1)
    acks: list[Message] = []
    for kill in range(KILLS // 2):
        acks += forge.write_and_kill(folder, kill, num_acks=dice.randint(1, 4), delay_seconds=dice.random() * 0.02)
    published = [ack for ack in acks if ack["op"] == "publish"]
    assert len(published) >= KILLS and len(acks) > len(published)
    numbers = [(ack["name"], ack["number"]) for ack in published]
    assert len(set(numbers)) == len(numbers)
    assert await broken(folder, acks) == []

    store = EmbeddedStore(folder)
    victim = dice.choice(published)
    record = await PromptCatalog(store, SPEC).resolve("acme", f"{victim['name']}@{victim['number']}")
    await store.delete_blob("acme", record.content_digest)
    await store.close()
    assert await broken(folder, acks) == [victim]


async def test_control_a_liar_is_caught(tmp_path: Path, forge: Forge) -> None:
    """Writers that acknowledge before they publish are found out by the same check."""
    for attempt in range(10):  # a slow machine may let a lie come true before the kill arrives
        folder = tmp_path / str(attempt)
        acks = forge.write_and_kill(folder, attempt, num_acks=1, delay_seconds=0, do="lie")
        if await broken(folder, acks):
            return
    pytest.fail("no broken promise was found")
