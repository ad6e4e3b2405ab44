"""Pages of what a tenant sees: joined they are the whole list, whatever names collide, and each reads little."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from promptd_store import EmbeddedStore, PromptCatalog, PromptRecord, PromptRef, Put, Store, parse_name
from promptd_store.names import granted_key, prompt_key, public_key, version_key
from promptd_store.record import Visibility

from promptd.timed_store import OPERATIONS
from tests.store.files import SPEC, soft_file

pytestmark = pytest.mark.anyio

VIEWER, OTHERS = "me", ("Amy", "amy-2", "zoe")
CONTENT = soft_file(1)


def ref_of(record: PromptRecord) -> str:
    """How its viewer names it."""
    return record.name if record.tenant == VIEWER else f"{record.tenant}/{record.name}"


async def pages(catalog: PromptCatalog, limit: int, search: str = "") -> list[str]:
    """Every page's ids, joined; no page but the last is short, and the last one says that it is the last."""
    found: list[str] = []
    after: PromptRef | None = None
    for _ in range(200):
        records, has_more = await catalog.page(VIEWER, limit=limit, after=after, search=search)
        found += map(ref_of, records)
        assert len(records) == limit if has_more else len(records) <= limit
        if not has_more:
            return found
        after = parse_name(found[-1])
    pytest.fail(f"pages without end: {found[-3:]}")


class World:
    """What the test has published, kept as the test understands it."""

    def __init__(self) -> None:
        self.own: set[str] = set()
        self.granted: set[tuple[str, str]] = set()
        self.public: dict[str, str] = {}

    def seen(self, search: str = "") -> list[str]:
        """The ids that the viewer must see, in their order."""
        others = self.granted | {(name, owner) for name, owner in self.public.items() if owner != VIEWER}
        ids = [*sorted(self.own), *(f"{owner}/{name}" for name, owner in sorted(others))]
        return [one for one in ids if search.lower() in one.rpartition("/")[2].lower()]


def some_name(dice: random.Random) -> str:
    """Short names of few characters: many are the same, or begin one another; '-', '.' and digits sort before ':'."""
    return dice.choice("aB") + "".join(dice.choice("-.0B") for _ in range(dice.randrange(3)))


async def settle(catalog: PromptCatalog, dice: random.Random, num: int) -> World:
    """Publish, share and delete at random."""
    world, shared = World(), set()
    for _ in range(num):
        name, owner = some_name(dice), dice.choice((VIEWER, *OTHERS))
        act = dice.choice(("private", "private", "public", "share", "delete"))
        is_there = name in world.own if owner == VIEWER else (name, owner) in shared or world.public.get(name) == owner
        if act == "delete":
            if is_there:
                await catalog.delete(owner, name)
                world.own -= {name} if owner == VIEWER else set()
                shared.discard((name, owner))
                if world.public.get(name) == owner:
                    del world.public[name]
        elif not is_there:
            visibility = "public" if act == "public" and name not in world.public else "private"
            await catalog.publish(owner, name, CONTENT, visibility=visibility)  # type: ignore[arg-type]
            if visibility == "public":
                world.public[name] = owner
            if owner == VIEWER:
                world.own.add(name)
            elif act == "share":
                await catalog.shares.add(owner, name, VIEWER)
                shared.add((name, owner))
    world.granted = shared
    return world


@pytest.mark.parametrize("seed", range(3))
async def test_pages_are_the_whole_list(catalog: PromptCatalog, seed: int) -> None:
    """Pages of every size give what the test published, each once, in order; searches give what matches."""
    dice = random.Random(seed)
    world = await settle(catalog, dice, 70)
    wanted = world.seen()
    assert len(wanted) > 15 and {one.rpartition("/")[2] for one in wanted if "/" in one} & world.own
    assert list(map(ref_of, await catalog.list(VIEWER, include_public=True))) == wanted
    for limit in (1, 2, 7, len(wanted) - 1, len(wanted), len(wanted) + 1):
        assert await pages(catalog, limit) == wanted, limit
    for search in ("a", "A", "-", "B0", ".a", "amy", ":", "%"):
        assert await pages(catalog, 3, search) == world.seen(search), search


async def test_a_page_begins_behind_what_is_gone(catalog: PromptCatalog) -> None:
    """A cursor need not be there any more; an own and another's prompt of one name are two places."""
    for owner, name in ((VIEWER, "tone"), (VIEWER, "voice"), ("zoe", "tone"), ("zoe", "zeal"), ("Amy", "tone")):
        await catalog.publish(owner, name, CONTENT, visibility="private" if owner == "Amy" else "public")
    await catalog.shares.add("Amy", "tone", VIEWER)

    async def behind(ref: str) -> list[str]:
        records, has_more = await catalog.page(VIEWER, limit=9, after=parse_name(ref))
        assert not has_more
        return list(map(ref_of, records))

    # The bare public names `tone` and `voice` are the viewer's own: zoe's `tone` is hers alone, and not listed.
    assert await behind("a") == ["tone", "voice", "Amy/tone", "zoe/zeal"]
    assert await behind("tone") == await behind(f"{VIEWER}/tone") == ["voice", "Amy/tone", "zoe/zeal"]
    assert await behind("Amy/tone") == ["zoe/zeal"]
    await catalog.delete("Amy", "tone")
    assert await behind("Amy/tone") == ["zoe/zeal"]
    assert await behind("Amy/a") == ["zoe/zeal"]
    await catalog.delete(VIEWER, "tone")
    assert await behind("tone") == ["voice", "zoe/zeal"]


async def test_own_public_names_hide_no_others(catalog: PromptCatalog) -> None:
    """They stand in the index of public names, are listed as own, and what lies behind them there keeps its place."""
    for owner, name in ((VIEWER, "a"), (VIEWER, "b"), (VIEWER, "c"), ("zoe", "d"), ("Amy", "e")):
        await catalog.publish(owner, name, CONTENT, visibility="private" if owner == "Amy" else "public")
    await catalog.shares.add("Amy", "e", VIEWER)
    for limit in (1, 2, 5):
        assert await pages(catalog, limit) == ["a", "b", "c", "zoe/d", "Amy/e"]


class CountingStore:
    """Tells how many calls were made, and how many records they read."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.num_calls = self.num_records = 0

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)
        if name not in OPERATIONS:
            return call

        async def counted(*args: Any, **kwargs: Any) -> Any:
            answer = await call(*args, **kwargs)
            self.num_calls += 1
            self.num_records += len([one for one in answer if one is not None]) if isinstance(answer, Sequence) else 1
            return answer

        return counted


async def crowd(store: Store, owner: str, names: list[str], visibility: Visibility, grantee: str | None = None) -> None:
    """Publish the first name, and write the others as its copies: thousands in a moment."""
    catalog = PromptCatalog(store, SPEC)
    model = await catalog.publish(owner, names[0], CONTENT, visibility=visibility)
    if grantee is not None:
        await catalog.shares.add(owner, names[0], grantee)
    state = await store.get(prompt_key(owner, names[0]))
    assert state is not None
    puts = []
    for name in names[1:]:
        version = replace(model, name=name).to_bytes()
        puts += [Put(prompt_key(owner, name), state.value), Put(version_key(owner, name, 1), version)]
        puts += [Put(public_key(name), owner.encode())] if visibility == "public" else []
        puts += [Put(granted_key(grantee, owner, name), b"")] if grantee is not None else []
    await store.transact(puts=puts)


async def test_a_page_reads_what_it_shows(store: Store) -> None:
    """A name and a version for each line, in a handful of calls, wherever the page begins and whatever it looks for."""
    names = [f"user-{number:04}" for number in range(1000)]
    await crowd(store, VIEWER, names, "private")
    await crowd(store, "zoe", [f"public-{number:04}" for number in range(1000)], "public")
    await crowd(store, "zoe", names[:100], "private", VIEWER)
    counting = CountingStore(store)
    catalog = PromptCatalog(counting, SPEC)  # type: ignore[arg-type]

    async def costs(**what: Any) -> tuple[list[str], int, int]:
        calls, records = counting.num_calls, counting.num_records
        found, _ = await catalog.page(VIEWER, limit=50, **what)
        return list(map(ref_of, found)), counting.num_calls - calls, counting.num_records - records

    for what, first in (
        ({}, "user-0000"),
        ({"after": parse_name("user-0299")}, "user-0300"),
        ({"search": "R-03"}, "user-0300"),
    ):
        ids, num_calls, num_records = await costs(**what)
        assert (ids[0], len(ids), num_calls, num_records) == (first, 50, 2, 102), what
    assert await costs(search="user-0999") == (["user-0999"], 5, 2 + 100), "what finds few looks at no name twice"
    ids, num_calls, num_records = await costs(after=parse_name("zoe/public-0199"))
    assert ids == [f"zoe/public-{number:04}" for number in range(200, 250)]
    assert num_calls == 5 and num_records == 100 + 1 + 3 * 51, "all that is granted, the cursor's, and three a line"
    before = counting.num_records
    assert len(await catalog.list(VIEWER, include_public=True)) == 2100
    assert counting.num_records - before >= 4200, "the control: everything is counted"


async def test_deleted_names_cost_few_calls(tmp_path: Path) -> None:
    """Behind many deleted prompts the next page is found in a number of calls that their number hardly matters to."""
    store = CountingStore(EmbeddedStore(tmp_path))
    catalog = PromptCatalog(store, SPEC)  # type: ignore[arg-type]
    for number in range(120):
        await catalog.publish(VIEWER, f"p{number:03}", CONTENT)
        if number < 115:
            await catalog.delete(VIEWER, f"p{number:03}")
    before = store.num_calls
    found, has_more = await catalog.page(VIEWER, limit=4)
    assert [one.name for one in found] == ["p115", "p116", "p117", "p118"] and has_more
    assert store.num_calls - before <= 12, "chunks grow; five at a time would take 48 calls"
    await store.close()
