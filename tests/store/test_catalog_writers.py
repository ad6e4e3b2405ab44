"""Writers that meet: conditions hold exactly, every round has one winner, nobody is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from promptd_store import EmbeddedStore, PreconditionFailedError, PromptCatalog

from tests.store.conftest import StoreFactory
from tests.store.files import SPEC, soft_file

pytestmark = pytest.mark.anyio


async def test_preconditions(catalog: PromptCatalog) -> None:
    """If-Match and If-None-Match hold exactly as HTTP means them, quoted or not, and are 412 otherwise."""
    with pytest.raises(PreconditionFailedError):
        await catalog.publish("acme", "tone", soft_file(1), if_match="*")
    first = await catalog.publish("acme", "tone", soft_file(1), if_none_match="*")
    for condition in ({"if_none_match": "*"}, {"if_match": "stale"}, {"if_none_match": f'"{first.etag}"'}):
        with pytest.raises(PreconditionFailedError) as caught:
            await catalog.publish("acme", "tone", soft_file(2), **condition)
        assert caught.value.status == 412
    with pytest.raises(PreconditionFailedError):  # a weak etag does not identify bytes
        await catalog.publish("acme", "tone", soft_file(2), if_match=f'W/"{first.etag}"')
    second = await catalog.publish("acme", "tone", soft_file(2), if_match=f'"x", "{first.etag}"')
    with pytest.raises(PreconditionFailedError):
        await catalog.rollback("acme", "tone", 1, if_match=first.etag)
    third = await catalog.rollback("acme", "tone", 1, if_match=second.etag)
    for stale in (first.etag, second.etag):  # the same content as the first, but not the same state
        with pytest.raises(PreconditionFailedError):
            await catalog.delete("acme", "tone", if_match=stale)
    await catalog.delete("acme", "tone", if_match=third.etag)
    with pytest.raises(PreconditionFailedError):
        await catalog.publish("acme", "tone", soft_file(3), if_match=third.etag)


@pytest.mark.parametrize(("num_writers", "num_rounds"), [(6, 4), pytest.param(50, 100, marks=pytest.mark.long)])
async def test_if_match_has_one_winner(open_store: StoreFactory, num_writers: int, num_rounds: int) -> None:
    """Of writers over two stores that all saw the same etag, exactly one wins each round."""
    catalogs = [PromptCatalog(await open_store(), SPEC) for _ in range(2)]
    etag = (await catalogs[0].publish("acme", "tone", soft_file(0))).etag
    for round_number in range(num_rounds):

        async def attempt(writer: int, seen: str = etag, first: int = 1 + num_writers * round_number) -> str | None:
            try:
                content = soft_file(first + writer)
                record = await catalogs[writer % 2].publish("acme", "tone", content, if_match=seen)
                return record.etag
            except PreconditionFailedError:
                return None

        won = [one for one in await asyncio.gather(*map(attempt, range(num_writers))) if one is not None]
        assert len(won) == 1
        etag = won[0]
    assert (await catalogs[0].resolve("acme", "tone")).number == num_rounds + 1


async def test_unconditional_writers_all_succeed(open_store: StoreFactory) -> None:
    """Concurrent uploads without conditions each get their own number; the last one is current."""
    catalogs = [PromptCatalog(await open_store(), SPEC) for _ in range(2)]
    records = await asyncio.gather(*(catalogs[i % 2].publish("acme", "tone", soft_file(i)) for i in range(12)))
    assert sorted(record.number for record in records) == list(range(1, 13))
    assert (await catalogs[0].resolve("acme", "tone")).number == 12
    for record in records:
        assert (await catalogs[0].resolve("acme", f"tone@{record.number}")).version == record.version


class GatedStore(EmbeddedStore):
    """A store whose transactions wait for a gate: another writer can come in between reading and writing."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.arrived, self.gate = asyncio.Event(), asyncio.Event()

    async def transact(self, *args: Any, **kwargs: Any) -> dict[str, str]:
        """Wait, then do it."""
        self.arrived.set()
        await self.gate.wait()
        return await super().transact(*args, **kwargs)


async def test_public_name_is_not_stolen_by_a_late_writer(tmp_path: Path) -> None:
    """A tenant that found a public name free, and was overtaken before it wrote, does not take the name away."""
    slow, fast = GatedStore(tmp_path), EmbeddedStore(tmp_path)
    late = asyncio.create_task(PromptCatalog(slow, SPEC).publish("late", "tone", soft_file(1), visibility="public"))
    await slow.arrived.wait()
    catalog = PromptCatalog(fast, SPEC)
    await catalog.publish("early", "tone", soft_file(2), visibility="public")
    slow.gate.set()
    assert (await late).number == 1
    assert (await catalog.resolve("bob", "tone")).tenant == "early"
    assert (await catalog.resolve("bob", "late/tone")).tenant == "late"
    await slow.close()
    await fast.close()
