"""What a tenant holds equals what lies in the store, and never exceeds its quota."""

from __future__ import annotations

import asyncio

import pytest
from promptd_store import (
    PROMPTS,
    STORED_BYTES,
    LimitReachedError,
    PromptCatalog,
    Put,
    Recount,
    Store,
    held_key,
    number_held,
    prune_versions,
    quota_key,
)

from tests.store.conftest import StoreFactory
from tests.store.files import SPEC, soft_file

pytestmark = pytest.mark.anyio


async def held(store: Store) -> tuple[int, int]:
    """The two counts, as they are kept."""
    return await number_held(store, "acme", PROMPTS), await number_held(store, "acme", STORED_BYTES)


async def there(catalog: PromptCatalog) -> tuple[int, int]:
    """The same, by looking at everything."""
    records = await catalog.list("acme")
    versions = [version for one in records for version in await catalog.versions("acme", one.name)]
    return len(records), sum(version.held_bytes for version in versions)


async def test_counts_equal_what_is_there(catalog: PromptCatalog, store: Store) -> None:
    """After every kind of change: new, again, the same again, back, deleted, pruned, refused."""
    for number in range(3):
        record = await catalog.publish("acme", "tone", soft_file(number), sidecar=bytes(1000))
        assert record.held_bytes > len(soft_file(number)) + 1000
    await catalog.publish("acme", "tone", soft_file(2))
    await catalog.publish("acme", "other", soft_file(0))
    assert await held(store) == await there(catalog)
    await catalog.rollback("acme", "tone", 1)
    assert await held(store) == await there(catalog)
    assert await prune_versions(store, "acme", keep=1) == ["tone@2"]
    assert await held(store) == await there(catalog)
    await catalog.delete("acme", "tone")
    assert await held(store) == await there(catalog)
    await catalog.publish("acme", "tone", soft_file(1))
    assert (await held(store))[0] == 2
    for name in ("tone", "other"):
        await catalog.delete("acme", name)
    assert await held(store) == (0, 0)


async def test_a_quota_of_prompts(catalog: PromptCatalog, store: Store) -> None:
    """The next name is one too many; new versions of old names are none; nothing of what was refused is kept."""
    await store.transact(puts=[Put(quota_key("acme", PROMPTS), b"2")])
    for name in ("a", "b"):
        await catalog.publish("acme", name, soft_file(1))
    num_blobs = len(await store.scan_blobs("acme"))
    with pytest.raises(LimitReachedError) as refused:
        await catalog.publish("acme", "c", soft_file(2))
    error = refused.value
    assert (error.status, error.type, error.code, error.param) == (429, error.code, "insufficient_quota", PROMPTS)
    assert len(await store.scan_blobs("acme")) == num_blobs
    await catalog.publish("acme", "a", soft_file(2))
    await catalog.publish("eve", "c", soft_file(2))
    await catalog.delete("acme", "b")
    await catalog.publish("acme", "c", soft_file(2))


async def test_a_quota_of_bytes(catalog: PromptCatalog, store: Store) -> None:
    """To the byte; what is there already may be published again."""
    size = (await catalog.publish("acme", "a", soft_file(1))).held_bytes
    await store.transact(puts=[Put(quota_key("acme", STORED_BYTES), b"%d" % (2 * size - 1))])
    with pytest.raises(LimitReachedError):
        await catalog.publish("acme", "b", soft_file(1))
    await catalog.publish("acme", "a", soft_file(1))
    await store.transact(puts=[Put(quota_key("acme", STORED_BYTES), b"%d" % (2 * size))])
    await catalog.publish("acme", "b", soft_file(1))


async def test_a_burst_over_two_servers(open_store: StoreFactory) -> None:
    """Of twelve uploads at once exactly four are there; without a quota (the control) all are."""

    async def burst(tenant: str, quota: int | None) -> int:
        catalogs = [PromptCatalog(await open_store(), SPEC) for _ in range(2)]
        if quota is not None:
            await catalogs[0].store.transact(puts=[Put(quota_key(tenant, PROMPTS), b"%d" % quota)])

        async def upload(number: int) -> bool:
            try:
                await catalogs[number % 2].publish(tenant, f"p{number}", soft_file(1))
            except LimitReachedError:
                return False
            return True

        passed = sum(await asyncio.gather(*map(upload, range(12))))
        assert len(await catalogs[0].list(tenant)) == passed == await number_held(catalogs[1].store, tenant, PROMPTS)
        return passed

    assert await burst("acme", 4) == 4
    assert await burst("eve", None) == 12


async def test_counts_that_were_not_kept_are_put_right(catalog: PromptCatalog, store: Store) -> None:
    """Of a store that is older than the counting; not over a write that came in between."""
    await catalog.publish("acme", "a", soft_file(1))
    right = await held(store)
    await store.transact(deletes=[held_key("acme", PROMPTS)], puts=[Put(held_key("acme", STORED_BYTES), b"3")])
    counted = {PROMPTS: right[0], STORED_BYTES: right[1]}
    late = await Recount.begin(store, "acme", (PROMPTS, STORED_BYTES))
    assert await (await Recount.begin(store, "acme", (PROMPTS, STORED_BYTES))).end(counted)
    assert await held(store) == right
    assert not await late.end({PROMPTS: 9, STORED_BYTES: 9})
    assert not await (await Recount.begin(store, "acme", (PROMPTS, STORED_BYTES))).end(counted)
    assert await held(store) == right
