"""Prompts that are shared with named tenants: used and read by them as `owner/name`, never changed."""

from __future__ import annotations

import asyncio

import pytest
from promptd_store import PromptCatalog, PromptNameError, PromptNotFoundError, SharingError, Store
from promptd_store.names import granted_key
from promptd_store.sharing import MAX_SHARES

from tests.store.conftest import StoreFactory
from tests.store.files import SPEC, soft_file

pytestmark = pytest.mark.anyio


async def seen(catalog: PromptCatalog, viewer: str, ref: str) -> str | None:
    """The version that a tenant finds, or None."""
    try:
        return (await catalog.resolve(viewer, ref)).version
    except PromptNotFoundError:
        return None


async def test_who_sees_what(catalog: PromptCatalog) -> None:
    """The owner and those it is shared with; by its owner's name alone, so that nobody can put one in another's way."""
    first = await catalog.publish("acme", "tone", soft_file(1))
    second = await catalog.publish("acme", "tone", soft_file(2))
    assert await seen(catalog, "bob", "acme/tone") is None
    await catalog.shares.add("acme", "tone", "bob")
    for ref, version in (("", second), ("@1", first), ("@2", second), (f"@{first.version}", first)):
        assert await seen(catalog, "bob", f"acme/tone{ref}") == version.version
        assert await seen(catalog, "eve", f"acme/tone{ref}") is None
    record = await catalog.resolve("bob", "acme/tone")
    assert (record.tenant, record.is_granted, record.visibility) == ("acme", True, "private")
    assert (await catalog.load(record)).version == second.version
    assert not (await catalog.resolve("acme", "tone")).is_granted
    for ref in ("tone", "public/tone", "bob/tone"):
        assert await seen(catalog, "bob", ref) is None
    await catalog.publish("carol", "tone", soft_file(3), visibility="public")
    assert await seen(catalog, "bob", "tone") == (await catalog.resolve("carol", "tone")).version  # not the shared one
    assert [one.number for one in await catalog.versions("bob", "acme/tone")] == [2, 1]
    third = await catalog.publish("acme", "tone", soft_file(3))
    assert await seen(catalog, "bob", "acme/tone") == third.version


async def test_lists(catalog: PromptCatalog) -> None:
    """Shared ones are among what a tenant sees of others, once, even where they are public too."""
    for name in ("a", "b"):
        await catalog.publish("acme", name, soft_file(1))
        await catalog.shares.add("acme", name, "bob")
    await catalog.publish("carol", "a", soft_file(1))
    await catalog.shares.add("carol", "a", "bob")
    await catalog.publish("acme", "b", soft_file(1), visibility="public")
    await catalog.publish("bob", "own", soft_file(1))

    async def names(viewer: str) -> list[str]:
        return [f"{one.tenant}/{one.name}" for one in await catalog.list(viewer, include_public=True)]

    assert await names("bob") == ["bob/own", "acme/a", "carol/a", "acme/b"]
    assert await names("eve") == ["acme/b"]
    assert [one.name for one in await catalog.list("bob")] == ["own"]
    await catalog.shares.remove("acme", "a", "bob")
    assert await names("bob") == ["bob/own", "carol/a", "acme/b"]


async def test_grantees_change_nothing(catalog: PromptCatalog) -> None:
    """Whatever they try they are told what everybody is told of a prompt that is not there."""
    await catalog.publish("acme", "tone", soft_file(1))
    await catalog.shares.add("acme", "tone", "bob")
    told = set()
    for tenant in ("bob", "nobody"):
        for call in (
            catalog.delete(tenant, "tone"),
            catalog.rollback(tenant, "tone", 1),
            catalog.shares.add(tenant, "tone", "eve"),
            catalog.shares.remove(tenant, "tone", "bob"),
            catalog.shares.list(tenant, "tone"),
        ):
            with pytest.raises(PromptNotFoundError) as refused:
                await call
            told.add((refused.value.code, refused.value.param, refused.value.status))
    assert told == {("prompt_not_found", "prompt", 404)}
    assert await catalog.shares.list("acme", "tone") == ("bob",)


async def test_withdrawal_is_seen_everywhere_at_once(open_store: StoreFactory) -> None:
    """On another server too, without waiting; publishing and rolling back keep what is shared, deleting does not."""
    here, there = [PromptCatalog(await open_store(), SPEC) for _ in range(2)]
    await here.publish("acme", "tone", soft_file(1))
    await here.shares.add("acme", "tone", "bob")
    assert await seen(there, "bob", "acme/tone") is not None
    await here.shares.remove("acme", "tone", "bob")
    await here.shares.remove("acme", "tone", "bob")
    assert await seen(there, "bob", "acme/tone") is None
    await here.shares.add("acme", "tone", "bob")
    await here.publish("acme", "tone", soft_file(2))
    await here.rollback("acme", "tone", 1)
    assert await seen(there, "bob", "acme/tone") is not None
    await here.delete("acme", "tone")
    await here.publish("acme", "tone", soft_file(1))
    assert await seen(there, "bob", "acme/tone") is None
    assert await here.shares.list("acme", "tone") == ()
    assert await here.store.get(granted_key("bob", "acme", "tone")) is None


async def test_what_was_remembered_is_forgotten(open_store: StoreFactory) -> None:
    """A server that remembers names for an outage of the store does not serve one that was withdrawn before."""
    here, there = [PromptCatalog(await open_store(), SPEC) for _ in range(2)]
    remembered = there._remembered
    await remembered.poll(there.store)
    await here.publish("acme", "tone", soft_file(1))
    await here.shares.add("acme", "tone", "bob")
    await remembered.poll(there.store)
    record = await there.resolve("bob", "acme/tone")
    assert remembered.recall("bob", "acme/tone") == record
    await here.shares.remove("acme", "tone", "bob")
    await remembered.poll(there.store)
    assert remembered.recall("bob", "acme/tone") is None


async def test_with_whom(catalog: PromptCatalog, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody else, known or not; no more than so many; writers at once lose nothing."""
    await catalog.publish("acme", "tone", soft_file(1))
    for tenant in ("acme", "public"):
        with pytest.raises(SharingError):
            await catalog.shares.add("acme", "tone", tenant)
    with pytest.raises(PromptNameError):
        await catalog.shares.add("acme", "tone", "no/tenant")
    await asyncio.gather(*(catalog.shares.add("acme", "tone", f"t{number}") for number in range(20)))
    assert len(await catalog.shares.list("acme", "tone")) == 20
    assert len(await store.scan("{t")) == 20
    monkeypatch.setattr("promptd_store.sharing.MAX_SHARES", 20)
    with pytest.raises(SharingError):
        await catalog.shares.add("acme", "tone", "one-more")
    await catalog.shares.add("acme", "tone", "t0")
    assert MAX_SHARES == 1000


async def test_no_latency_tells_who_else_uses_it(catalog: PromptCatalog) -> None:
    """What the owner has decoded a grantee decodes again, once; a public one is there for everybody (the control)."""
    await catalog.publish("acme", "shared", soft_file(1))
    await catalog.publish("acme", "open", soft_file(2), visibility="public")
    for viewer in ("bob", "eve"):
        await catalog.shares.add("acme", "shared", viewer)

    async def misses(viewer: str, name: str) -> int:
        before = catalog.cache_stats.num_misses
        await catalog.load(await catalog.resolve(viewer, f"acme/{name}"))
        return catalog.cache_stats.num_misses - before

    viewers = ("acme", "bob", "eve", "bob", "acme")
    assert [await misses(viewer, "shared") for viewer in viewers] == [1, 1, 1, 0, 0]
    assert [await misses(viewer, "open") for viewer in viewers] == [1, 0, 0, 0, 0]
    await catalog.delete("acme", "shared")
    assert catalog.cache_stats.num_artifacts == 1
