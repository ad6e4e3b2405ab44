"""Tenants do not see each other; public prompts are seen by all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from promptd_store import BlobNotFoundError, PromptCatalog, PromptNotFoundError, Store

from tests.store.files import SPEC, soft_file

OTHER = replace(SPEC, fingerprint="sha256:" + "b" * 64)
pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("ref", ["tone", "tone@1", "acme/tone", "acme/tone@1", "public/tone", "nobody/tone"])
async def test_foreign_looks_like_absent(catalog: PromptCatalog, ref: str) -> None:
    """Another tenant's private prompt gives the same error, word for word, as one that does not exist."""
    with pytest.raises(PromptNotFoundError) as before:
        await catalog.resolve("eve", ref)
    await catalog.publish("acme", "tone", soft_file(1))
    with pytest.raises(PromptNotFoundError) as after:
        await catalog.resolve("eve", ref)
    assert str(before.value) == str(after.value)
    assert (before.value.code, before.value.param) == (after.value.code, after.value.param)
    assert await catalog.list("eve", include_public=True) == []
    for call in (catalog.delete("eve", "tone"), catalog.versions("eve", "tone"), catalog.rollback("eve", "tone", 1)):
        with pytest.raises(PromptNotFoundError):
            await call


async def test_foreign_under_another_base_looks_absent(catalog: PromptCatalog, store: Store) -> None:
    """The 409 about base models is not told to those who may not see the prompt."""
    await catalog.publish("acme", "tone", soft_file(1))
    with pytest.raises(PromptNotFoundError):
        await PromptCatalog(store, OTHER).resolve("eve", "acme/tone")


async def test_public_prompts(catalog: PromptCatalog) -> None:
    """A public prompt is found by everyone, by bare name or with its owner; an own name comes first."""
    private = await catalog.publish("acme", "tone", soft_file(1))
    public = await catalog.publish("acme", "tone", soft_file(2), visibility="public")
    for ref in ("tone", "acme/tone", "public/tone", "tone@2", f"acme/tone@{public.version}"):
        assert (await catalog.resolve("eve", ref)).version == public.version
    assert (await catalog.load(await catalog.resolve("eve", "tone"))).version == public.version
    for ref in ("tone@1", f"acme/tone@{private.version}"):
        with pytest.raises(PromptNotFoundError):
            await catalog.resolve("eve", ref)
    assert [record.tenant for record in await catalog.list("eve", include_public=True)] == ["acme"]
    assert await catalog.list("eve") == []
    own = await catalog.publish("eve", "tone", soft_file(3))
    assert (await catalog.resolve("eve", "tone")).version == own.version
    assert (await catalog.resolve("eve", "acme/tone")).version == public.version
    assert (await catalog.resolve("bob", "tone")).version == public.version


async def test_going_private_hides_at_once(catalog: PromptCatalog) -> None:
    """Publishing privately, rolling back to a private version, or deleting takes the public name away."""

    async def is_public() -> bool:
        try:
            await catalog.resolve("eve", "tone")
        except PromptNotFoundError:
            return False
        return True

    await catalog.publish("acme", "tone", soft_file(1))
    assert not await is_public()
    await catalog.publish("acme", "tone", soft_file(2), visibility="public")
    assert await is_public()
    await catalog.rollback("acme", "tone", 1)
    assert not await is_public()
    await catalog.rollback("acme", "tone", 2)
    assert await is_public()
    await catalog.publish("acme", "tone", soft_file(3))
    assert not await is_public()
    await catalog.publish("acme", "tone", soft_file(4), visibility="public")
    await catalog.delete("acme", "tone")
    assert not await is_public()


async def test_first_owner_keeps_a_public_name(catalog: PromptCatalog) -> None:
    """Another tenant cannot take a bare public name over while it is in use; afterwards it can."""
    await catalog.publish("acme", "tone", soft_file(1), visibility="public")
    await catalog.publish("eve", "tone", soft_file(2), visibility="public")
    assert (await catalog.resolve("bob", "tone")).tenant == "acme"
    assert (await catalog.resolve("bob", "eve/tone")).tenant == "eve"
    await catalog.delete("acme", "tone")
    with pytest.raises(PromptNotFoundError):
        await catalog.resolve("bob", "tone")
    await catalog.publish("eve", "tone", soft_file(3), visibility="public")
    assert (await catalog.resolve("bob", "tone")).tenant == "eve"


async def test_versions_of_a_public_prompt(catalog: PromptCatalog) -> None:
    """Others see the public versions of a name that is public now; its owner sees all of them."""
    await catalog.publish("acme", "tone", soft_file(1))
    await catalog.publish("acme", "tone", soft_file(2), visibility="public")
    for ref in ("tone", "acme/tone", "public/tone"):
        assert [(one.number, one.is_current) for one in await catalog.versions("eve", ref)] == [(2, True)]
    assert [one.number for one in await catalog.versions("acme", "acme/tone")] == [2, 1]
    await catalog.rollback("acme", "tone", 1)
    for ref in ("tone", "acme/tone", "public/tone"):
        with pytest.raises(PromptNotFoundError):
            await catalog.versions("eve", ref)


async def test_a_prompt_that_is_deleted_before_it_is_loaded_is_absent(catalog: PromptCatalog, store: Store) -> None:
    """Its bytes may be collected at once: that is a 404, not a broken store; lost bytes still are one."""
    gone = await catalog.publish("acme", "gone", soft_file(1))
    broken = await catalog.publish("acme", "broken", soft_file(2))
    await catalog.delete("acme", "gone")
    await store.delete_blob("acme", gone.content_digest)
    await store.delete_blob("acme", broken.content_digest)
    with pytest.raises(PromptNotFoundError):
        await catalog.load(gone)
    with pytest.raises(BlobNotFoundError):
        await catalog.load(broken)
