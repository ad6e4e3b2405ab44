"""A publication's bytes: written while they are examined, there when they are named, gone where they are refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from promptd_store import (
    Append,
    ArtifactError,
    Check,
    CheckFailedError,
    PromptArtifact,
    PromptCatalog,
    PromptRecord,
    Store,
    drop_unnamed,
)

from tests.store.files import SPEC, soft_file

pytestmark = pytest.mark.anyio


async def test_a_late_deletion_takes_nothing_that_was_named(store: Store) -> None:
    """It has found nobody who names the bytes, and before it deletes them a publication does; the control: nobody."""
    may_end, catalog = asyncio.Event(), PromptCatalog(store, SPEC)

    async def examine(artifact: PromptArtifact) -> None:
        await may_end.wait()

    publishing = asyncio.create_task(catalog.publish("acme", "tone", soft_file(1), examine=examine))
    async with asyncio.timeout(60):
        while not (found := await store.scan_blobs("acme")):  # noqa: ASYNC110 - it is written while it is examined
            await asyncio.sleep(0.001)

    class Late:
        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        async def delete_blob(self, *args: Any, **kwargs: Any) -> bool:
            may_end.set()
            await asyncio.wait({publishing})
            return await store.delete_blob(*args, **kwargs)

    assert await drop_unnamed(Late(), "acme", [found[0].digest]) == 0  # type: ignore[arg-type]
    assert (await catalog.load(await publishing)).content == soft_file(1)
    unnamed = await store.put_blob("acme", b"unnamed")
    assert await drop_unnamed(Late(), "acme", [unnamed]) == 1  # type: ignore[arg-type]


async def test_what_is_refused_leaves_nothing(store: Store) -> None:
    """Refused at once it is never written; after a look at it, deleted with the refusal, unless something names it."""
    catalog = PromptCatalog(store, SPEC)

    def at_once(artifact: PromptArtifact) -> Any:
        raise ArtifactError("probe_failed", "no", "body")

    async def later(artifact: PromptArtifact) -> None:
        async with asyncio.timeout(60):
            while not await store.scan_blobs("acme"):  # noqa: ASYNC110 - the control: it is there
                await asyncio.sleep(0.001)
        at_once(artifact)

    for examine in (at_once, later):
        with pytest.raises(ArtifactError):
            await catalog.publish("acme", "tone", soft_file(1), examine=examine)
        assert await store.scan_blobs("acme") == [] and await catalog.list("acme") == []
    record = await catalog.publish("acme", "other", soft_file(1))
    with pytest.raises(ArtifactError):
        await catalog.publish("acme", "tone", soft_file(1), examine=later)
    assert (await catalog.load(record)).content == soft_file(1)


async def test_a_publication_is_written_down_in_its_own_step(store: Store) -> None:
    """The note is there where the name has moved, and only there."""
    catalog = PromptCatalog(store, SPEC)

    def note(record: PromptRecord) -> Append:
        return Append("{acme}:notes", f"{record.name}@{record.number}".encode())

    with pytest.raises(CheckFailedError):
        await catalog.publish("acme", "tone", soft_file(1), checks=[Check("{acme}:gone", "1")], note=note)
    assert await store.read_log("{acme}:notes") == []
    for content in (soft_file(1), soft_file(1), soft_file(2)):  # the second one changes nothing
        await catalog.publish("acme", "tone", content, note=note)
    assert [event.payload for event in await store.read_log("{acme}:notes")] == [b"tone@1", b"tone@2"]
