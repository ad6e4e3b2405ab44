"""What every store backend must do. Backends are chosen by the `open_store` fixture; nothing here knows them."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest
from promptd_store import (
    Append,
    BlobNotFoundError,
    Check,
    CheckFailedError,
    HasBlob,
    PromptNameError,
    Put,
    Store,
    scan_tenants,
)

from tests.store.conftest import StoreFactory

pytestmark = pytest.mark.anyio

KEY = "{acme}:thing:a"


async def test_is_a_store(store: Store) -> None:
    """The backend has every method of the protocol."""
    assert isinstance(store, Store)


async def test_blob_round_trip(store: Store) -> None:
    """Bytes come back as they were, under their own sha256; the empty blob too."""
    for data in (b"", b"\0\xff" * 1000, bytes(2 << 20)):
        digest = await store.put_blob("acme", data)
        assert digest == "sha256:" + hashlib.sha256(data).hexdigest()
        assert await store.get_blob("acme", digest) == data
        (stored,) = await store.scan_blobs("acme")
        assert await store.find_blob("acme", digest) == stored and stored.num_bytes == len(data)
        assert await store.delete_blob("acme", digest)


async def test_blobs_are_stored_once(store: Store) -> None:
    """Putting the same bytes again gives the same digest and one blob with a newer time."""
    digest = await store.put_blob("acme", b"x")
    (before,) = await store.scan_blobs("acme")
    await asyncio.sleep(0.02)
    assert await store.put_blob("acme", b"x") == digest
    (after,) = await store.scan_blobs("acme")
    assert (after.digest, after.num_bytes) == (digest, 1)
    assert after.last_put > before.last_put


async def test_blobs_belong_to_a_tenant(store: Store) -> None:
    """A tenant cannot read, see or delete another's blob, not even with its digest."""
    digest = await store.put_blob("acme", b"secret")
    with pytest.raises(BlobNotFoundError):
        await store.get_blob("eve", digest)
    assert await store.find_blob("eve", digest) is None
    assert not await store.delete_blob("eve", digest)
    assert await store.scan_blobs("eve") == []
    assert await store.get_blob("acme", digest) == b"secret"


async def test_blob_deletion(store: Store) -> None:
    """A deleted blob is gone; deleting twice says so; a fresh one is protected by the age given."""
    digest = await store.put_blob("acme", b"x")
    assert not await store.delete_blob("acme", digest, unused_for_seconds=60)
    assert await store.delete_blob("acme", digest)
    assert not await store.delete_blob("acme", digest)
    with pytest.raises(BlobNotFoundError):
        await store.get_blob("acme", digest)


async def test_a_step_that_names_a_blob(store: Store) -> None:
    """It needs it there and makes it younger: who has looked at it before cannot delete it any more."""
    digest = await store.put_blob("acme", b"x")
    before = await store.find_blob("acme", digest)
    assert before is not None
    await store.transact([HasBlob("acme", digest)], [Put(KEY, b"names it")])
    assert not await store.delete_blob("acme", digest, last_put=before.last_put)
    after = await store.find_blob("acme", digest)
    assert after is not None and after.last_put > before.last_put
    for tenant, gone in (("eve", False), ("acme", True)):
        if gone:
            assert await store.delete_blob("acme", digest, last_put=after.last_put)
        with pytest.raises(BlobNotFoundError) as raised:
            await store.transact([HasBlob(tenant, digest)], [Put(KEY, b"names nothing")])
        assert raised.value.param == digest
        stored = await store.get(KEY)
        assert stored is not None and stored.value == b"names it"


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "sha256:" + "g" * 64, "../../etc/passwd", "sha256:" + "a" * 64 + "/.."]
)
async def test_malformed_digests_are_not_found(store: Store, digest: str) -> None:
    """A digest that is none names no blob, whatever it looks like."""
    with pytest.raises(BlobNotFoundError):
        await store.get_blob("acme", digest)


@pytest.mark.parametrize("tenant", ["", "..", "a/b", ".hidden", "a" * 65, "a\0b", "ä", "a\n"])
async def test_malformed_tenants_are_refused(store: Store, tenant: str) -> None:
    """A tenant's name can never become a path."""
    with pytest.raises(PromptNameError):
        await store.put_blob(tenant, b"x")


async def test_records(store: Store) -> None:
    """A record is what was put last; its etag changes with every write, also of the same value."""
    assert await store.get(KEY) is None
    first = (await store.transact(puts=[Put(KEY, b"1")]))[KEY]
    record = await store.get(KEY)
    assert record is not None and (record.key, record.value, record.etag) == (KEY, b"1", first)
    second = (await store.transact(puts=[Put(KEY, b"1")]))[KEY]
    assert second != first
    await store.transact(deletes=[KEY])
    assert await store.get(KEY) is None
    assert (await store.transact(puts=[Put(KEY, b"1")]))[KEY] not in (first, second)


async def test_scan_is_ordered_and_paged(store: Store) -> None:
    """Scanning returns exactly the keys of the prefix, in order, and pages by the last key."""
    keys = [f"{{acme}}:n:{i:03d}" for i in range(25)]
    others = ["{acme}:m:1", "{acme}:n", "{acme}:o:1", "{acme2}:n:001", "{eve}:n:001"]
    await store.transact(puts=[Put(key, key.encode()) for key in [*keys[::-1], *others]])
    assert [record.key for record in await store.scan("{acme}:n:")] == keys
    assert [record.value for record in await store.scan("{acme}:n:", after=keys[9], limit=3)] == [
        key.encode() for key in keys[10:13]
    ]
    assert await store.scan("{acme}:x") == []


async def test_a_scan_can_look_for_characters(store: Store) -> None:
    """Behind the prefix alone, in either case, taken as they are; what does not match counts for no limit."""
    names = ["Tone", "a%b", "astonish", "b", "stone-1", "ton", "tone"]
    await store.transact(puts=[Put("{tone}:n:" + name, name.encode()) for name in names])

    async def found(containing: str, **what: Any) -> list[str]:
        records = await store.scan("{tone}:n:", containing=containing, **what)
        return [record.value.decode() for record in records]

    assert await found("ton") == ["Tone", "astonish", "stone-1", "ton", "tone"]
    assert await found("TONE") == ["Tone", "stone-1", "tone"]
    assert await found("ton", after="{tone}:n:Tone", limit=2) == ["astonish", "stone-1"]
    assert await found("%") == ["a%b"]
    assert await found("n:") == await found("_") == await found(".") == []
    assert await found("") == names
    await store.transact(puts=[Put(f"{{tone}}:m:{number:05}", b"") for number in range(11_000)])
    assert [one.key for one in await store.scan("{tone}:m:", containing="10999")] == ["{tone}:m:10999"]


async def test_many_records_at_once(store: Store) -> None:
    """In the order of the keys that were asked for, repeated ones too, with None for those that are not there."""
    keys = [f"{{acme}}:n:{number:04}" for number in range(1200)]
    await store.transact(puts=[Put(key, key.encode()) for key in keys[::2]])
    asked = [*keys[::-1], keys[0]]
    records = await store.get_many(asked)
    assert [record and record.value for record in records] == [
        key.encode() if int(key[-4:]) % 2 == 0 else None for key in asked
    ]
    assert records[-1] == await store.get(keys[0])
    assert await store.get_many([]) == []


async def test_transaction_is_all_or_nothing(store: Store) -> None:
    """Where one check fails, no put, no delete and no append happens."""
    etags = await store.transact(puts=[Put(KEY, b"1"), Put("{acme}:b", b"1")])
    with pytest.raises(CheckFailedError) as caught:
        await store.transact(
            checks=[Check(KEY, etags[KEY]), Check("{acme}:c", "17")],
            puts=[Put(KEY, b"2")],
            deletes=["{acme}:b"],
            appends=[Append("{acme}:log", b"x")],
        )
    assert (caught.value.key, caught.value.expected, caught.value.actual) == ("{acme}:c", "17", None)
    records = [await store.get(key) for key in (KEY, "{acme}:b")]
    assert [record and record.value for record in records] == [b"1", b"1"]
    assert await store.read_log("{acme}:log") == []


async def test_checks(store: Store) -> None:
    """Checks hold for the right etag and for absence, and fail otherwise."""
    etag = (await store.transact([Check(KEY, None)], [Put(KEY, b"1")]))[KEY]
    for wrong in (None, etag + "0"):
        with pytest.raises(CheckFailedError):
            await store.transact([Check(KEY, wrong)], [Put(KEY, b"2")])
    await store.transact([Check(KEY, etag)], deletes=[KEY])
    with pytest.raises(CheckFailedError):
        await store.transact([Check(KEY, etag)], [Put(KEY, b"2")])


async def test_one_writer_wins_each_round(open_store: StoreFactory) -> None:
    """Of many writers over two connections that saw the same etag, exactly one succeeds, every round."""
    stores = [await open_store(), await open_store()]
    etag: str | None = None
    for round_number in range(5):

        async def attempt(writer: int, seen: str | None = etag, value: bytes = b"%d" % round_number) -> str | None:
            try:
                return (await stores[writer % 2].transact([Check(KEY, seen)], [Put(KEY, value)]))[KEY]
            except CheckFailedError:
                return None

        won = [one for one in await asyncio.gather(*map(attempt, range(10))) if one is not None]
        assert len(won) == 1
        etag = won[0]


async def test_no_increment_is_lost(open_store: StoreFactory) -> None:
    """Read-check-write loops of two connections never lose an update."""
    stores = [await open_store(), await open_store()]

    async def add(store: Store) -> None:
        for _ in range(10):
            while True:
                seen = await store.get(KEY)
                value = b"%d" % (int(seen.value) + 1 if seen else 1)
                try:
                    await store.transact([Check(KEY, seen.etag if seen else None)], [Put(KEY, value)])
                    break
                except CheckFailedError:
                    continue

    await asyncio.gather(*(add(store) for store in stores))
    record = await stores[0].get(KEY)
    assert record is not None and record.value == b"20"


async def test_everything_survives_reopening(open_store: StoreFactory) -> None:
    """Records, blobs, lease epochs, logs and etag counters outlive the process that wrote them."""
    old = await open_store()
    etag = (await old.transact(puts=[Put(KEY, b"1")], appends=[Append("{acme}:events", b"x")]))[KEY]
    digest = await old.put_blob("acme", b"blob")
    lease = await old.acquire_lease("{acme}:job", "w1", 60)
    assert lease is not None
    await old.close()
    new = await open_store()
    record = await new.get(KEY)
    assert record is not None and (record.value, record.etag) == (b"1", etag)
    assert await new.get_blob("acme", digest) == b"blob"
    assert (await new.renew_lease(lease, 60)).epoch == lease.epoch
    assert len(await new.read_log("{acme}:")) == 1
    assert (await new.transact(puts=[Put(KEY, b"2")]))[KEY] != etag


async def test_tenants_are_found_by_their_records(store: Store) -> None:
    """Each tenant once, in order, also where one name begins another or a tenant has many records."""
    for tenant in ("b", "a", "a-b", "ab"):
        await store.transact(puts=[Put(f"{{{tenant}}}:thing:{number}", b"") for number in range(3)])
    assert sorted([tenant async for tenant in scan_tenants(store)]) == ["a", "a-b", "ab", "b"]
