"""Prompts that stand behind others: what a name means, what is pinned, and what happens when a base goes away."""

from __future__ import annotations

from dataclasses import replace

import pytest
from promptd_store import (
    MAX_CHAIN_PROMPTS,
    ArtifactError,
    PromptCatalog,
    PromptChainBrokenError,
    PromptModelMismatchError,
    PromptNotFoundError,
    Store,
    exact_name,
)

from tests.store.files import SPEC, soft_file

pytestmark = pytest.mark.anyio


async def named(catalog: PromptCatalog, *refs: str, tenant: str = "acme") -> list[str]:
    """Return the names and numbers of the chain that names mean."""
    return [f"{record.name}@{record.number}" for record in await catalog.chain(tenant, refs)]


async def test_a_name_means_its_whole_chain(catalog: PromptCatalog, store: Store) -> None:
    """What stands in front is pinned to its version, comes once, and survives a restart and a roll-back."""
    await catalog.publish("acme", "task", soft_file(1))
    team = await catalog.publish("acme", "team", soft_file(2), behind=["task"])
    user = await catalog.publish("acme", "user", soft_file(3), behind=["team"])
    assert user.behind == (*team.behind, exact_name(team))
    await catalog.publish("acme", "task", soft_file(4))
    for reader in (catalog, PromptCatalog(store, SPEC)):
        assert await named(reader, "user") == ["task@1", "team@1", "user@1"]
        assert await named(reader, "task") == ["task@2"]
        assert await named(reader, "task@1", "team", "user") == ["task@1", "team@1", "user@1"]
        assert await named(reader, "task", "team") == ["task@2", "task@1", "team@1"]  # not what it was learned behind
        assert await named(reader, "user", "user") == ["task@1", "team@1", "user@1"] * 2
    await catalog.publish("acme", "user", soft_file(5))
    assert await named(catalog, "user") == ["user@2"]
    await catalog.rollback("acme", "user", 1)
    assert await named(catalog, "user") == ["task@1", "team@1", "user@1"]


async def test_the_same_bytes_behind_another_chain_are_a_new_version(catalog: PromptCatalog) -> None:
    """Publishing again changes nothing only where the chain is the same, too."""
    await catalog.publish("acme", "task", soft_file(1))
    first = await catalog.publish("acme", "user", soft_file(3), behind=["task"])
    assert await catalog.publish("acme", "user", soft_file(3), behind=["task@1"]) == first
    alone = await catalog.publish("acme", "user", soft_file(3))
    assert (alone.number, alone.version, alone.behind) == (2, first.version, ())


async def test_a_deleted_base_is_told_and_comes_back(catalog: PromptCatalog) -> None:
    """Without its base a prompt is refused, never served alone; the same bytes published again heal it."""
    await catalog.publish("acme", "task", soft_file(1))
    await catalog.publish("acme", "user", soft_file(3), behind=["task"])
    await catalog.delete("acme", "task")
    with pytest.raises(PromptChainBrokenError, match=r"'user' stands behind 'acme/task@sha256:.*not there") as caught:
        await catalog.chain("acme", ["user"])
    assert (caught.value.status, caught.value.code) == (409, "prompt_chain_broken")
    with pytest.raises(PromptChainBrokenError) as caught:
        await catalog.publish("acme", "more", soft_file(4), behind=["user"])
    assert caught.value.param == "behind"
    await catalog.publish("acme", "task", soft_file(9))
    with pytest.raises(PromptChainBrokenError):
        await catalog.chain("acme", ["user"])
    await catalog.publish("acme", "task", soft_file(1))
    assert await named(catalog, "user") == ["task@3", "user@1"]


async def test_a_bad_base_is_refused(catalog: PromptCatalog, store: Store) -> None:
    """Missing, foreign, of another base model, private behind a public one, or too many: nothing is stored."""
    await catalog.publish("acme", "task", soft_file(1))
    await catalog.publish("eve", "hers", soft_file(2))
    other = PromptCatalog(store, replace(SPEC, fingerprint="sha256:" + "b" * 64))
    for tenant, base, at in (("acme", "nobody", catalog), ("acme", "hers", catalog), ("acme", "eve/hers", catalog)):
        with pytest.raises(PromptNotFoundError) as absent:
            await at.publish(tenant, "new", soft_file(3), behind=[base])
        assert absent.value.param == "behind"
    with pytest.raises(PromptModelMismatchError) as foreign:
        await other.publish("acme", "new", soft_file(3), behind=["task"])
    assert foreign.value.param == "behind"
    for visibility, behind, code in (
        ("public", ["task"], "behind_not_public"),
        ("private", ["task"] * MAX_CHAIN_PROMPTS, "chain_too_long"),
    ):
        with pytest.raises(ArtifactError) as refused:
            await catalog.publish("acme", "new", soft_file(3), behind=behind, visibility=visibility)  # type: ignore[arg-type]
        assert (refused.value.code, refused.value.param) == (code, "behind")
    with pytest.raises(PromptNotFoundError):
        await catalog.resolve("acme", "new")
    longest = ["task"] * (MAX_CHAIN_PROMPTS - 1)  # control: as many as may be
    assert len((await catalog.publish("acme", "new", soft_file(3), behind=longest)).behind) == len(longest)


async def test_others_see_a_public_chain_only(catalog: PromptCatalog) -> None:
    """A public prompt behind a public one serves everybody; no other tenant gets a private prompt by a chain."""
    await catalog.publish("acme", "task", soft_file(1), visibility="public")
    await catalog.publish("acme", "shared", soft_file(2), behind=["task"], visibility="public")
    assert await named(catalog, "shared", tenant="eve") == ["task@1", "shared@1"]
    await catalog.publish("eve", "hers", soft_file(3), behind=["shared"])
    assert await named(catalog, "hers", tenant="eve") == ["task@1", "shared@1", "hers@1"]
    await catalog.delete("acme", "task")
    await catalog.publish("acme", "task", soft_file(1))  # the same version, private now
    with pytest.raises(PromptChainBrokenError):
        await catalog.chain("eve", ["hers"])
    assert await named(catalog, "shared") == ["task@2", "shared@1"]
