"""What every store backend must do with leases and logs; see test_store_contract."""

from __future__ import annotations

import asyncio

import pytest
from promptd_store import (
    Append,
    LeaseLostError,
    Put,
    Store,
    StoreUnavailableError,
)

from tests.store.conftest import StoreFactory

pytestmark = pytest.mark.anyio

KEY = "{acme}:thing:a"


async def test_lease_is_exclusive(open_store: StoreFactory) -> None:
    """A held lease cannot be taken; a released or expired one can, under a higher epoch."""
    one, two = await open_store(), await open_store()
    first = await one.acquire_lease("{acme}:job:1", "w1", 60)
    assert first is not None
    assert await two.acquire_lease("{acme}:job:1", "w2", 60) is None
    assert await two.acquire_lease("{acme}:job:2", "w2", 60) is not None
    await one.release_lease(first)
    second = await two.acquire_lease("{acme}:job:1", "w2", 0.01)
    assert second is not None and second.epoch > first.epoch
    await asyncio.sleep(0.03)
    third = await one.acquire_lease("{acme}:job:1", "w1", 60)
    assert third is not None and third.epoch > second.epoch


async def test_lease_is_taken_once(open_store: StoreFactory) -> None:
    """Of many that ask at once, one gets it."""
    stores = [await open_store(), await open_store()]
    asked = [stores[i % 2].acquire_lease("{acme}:job", f"w{i}", 60) for i in range(12)]
    assert sum(lease is not None for lease in await asyncio.gather(*asked)) == 1


async def test_lease_renewal(store: Store) -> None:
    """A renewed lease lives longer under its epoch, also after it expired while nobody took it."""
    lease = await store.acquire_lease("{acme}:job", "w1", 0.01)
    assert lease is not None
    await asyncio.sleep(0.03)
    renewed = await store.renew_lease(lease, 60)
    assert renewed.epoch == lease.epoch and renewed.expires_at > lease.expires_at
    assert await store.acquire_lease("{acme}:job", "w2", 60) is None
    await store.release_lease(renewed)
    with pytest.raises(LeaseLostError):
        await store.renew_lease(renewed, 60)
    await store.release_lease(renewed)


async def test_lost_lease_fences_writes(store: Store) -> None:
    """An owner that slept through its lease cannot write, renew, or release the successor's."""
    old = await store.acquire_lease("{acme}:job", "w1", 0.01)
    assert old is not None
    await store.transact([old], [Put(KEY, b"old")])
    await asyncio.sleep(0.03)
    new = await store.acquire_lease("{acme}:job", "w2", 60)
    assert new is not None
    with pytest.raises(LeaseLostError):
        await store.transact([old], [Put(KEY, b"zombie")])
    with pytest.raises(LeaseLostError):
        await store.renew_lease(old, 60)
    await store.release_lease(old)
    await store.transact([new], [Put(KEY, b"new")])
    record = await store.get(KEY)
    assert record is not None and record.value == b"new"


async def test_log_keeps_order(store: Store) -> None:
    """Entries are numbered upwards over all logs, readable by prefix, after a seq, up to a limit."""
    seqs = [await store.publish(f"{{{tenant}}}:events", b"%d" % i) for i in range(3) for tenant in ("acme", "eve")]
    assert seqs == sorted(set(seqs))
    events = await store.read_log("{acme}:")
    assert [(event.log, event.payload) for event in events] == [("{acme}:events", b"%d" % i) for i in range(3)]
    assert [event.payload for event in await store.read_log("{acme}:", after=events[0].seq, limit=1)] == [b"1"]
    assert len(await store.read_log("")) == 6


async def test_log_can_be_read_backwards(store: Store) -> None:
    """The tail of one log comes newest first, in pages; other logs, also those whose name it begins, do not count."""
    seqs = []
    for i in range(5):
        seqs.append(await store.publish("{acme}:events", b"%d" % i))
        await store.publish("{acme}:events2", b"other")
    assert [event.payload for event in await store.read_tail("{acme}:events")] == [b"4", b"3", b"2", b"1", b"0"]
    page = await store.read_tail("{acme}:events", before=seqs[3], limit=2)
    assert [(event.seq, event.payload) for event in page] == [(seqs[2], b"2"), (seqs[1], b"1")]
    assert await store.read_tail("{acme}:events", before=seqs[0]) == await store.read_tail("{eve}:events") == []


async def test_log_can_be_trimmed(store: Store) -> None:
    """Trimming removes older entries of one log; numbers are not given again."""
    seqs = [await store.publish("{acme}:events", b"x") for _ in range(4)]
    await store.publish("{eve}:events", b"x")
    assert await store.trim_log("{acme}:events", before_seq=seqs[3]) == 3
    assert [event.seq for event in await store.read_log("{acme}:")] == [seqs[3]]
    assert await store.trim_log("{acme}:events", before_seq=seqs[3] + 100) == 1
    assert len(await store.read_log("{eve}:")) == 1
    assert await store.publish("{acme}:events", b"x") > seqs[3]


async def test_subscribers_see_everything_once(open_store: StoreFactory) -> None:
    """Subscribers of either connection get each event exactly once, in order, from whoever wrote it."""
    stores = [await open_store(), await open_store()]
    await stores[0].publish("{acme}:events", b"before")
    subscriptions = [await store.subscribe("{acme}:") for store in stores]
    for i in range(20):
        await stores[i % 2].transact(appends=[Append("{acme}:events", b"%d" % i), Append("{eve}:events", b"no")])
    for subscription in subscriptions:
        async with asyncio.timeout(60):
            seen = [await anext(subscription) for _ in range(20)]
        assert [event.payload for event in seen] == [b"%d" % i for i in range(20)]
        await subscription.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(subscription)


async def test_subscription_from_the_past(store: Store) -> None:
    """`after` replays what a subscriber missed while it was away, then goes on."""
    seqs = [await store.publish("{acme}:events", b"%d" % i) for i in range(3)]
    subscription = await store.subscribe("{acme}:", after=seqs[0])
    waiting = asyncio.create_task(_take(subscription, 3))
    await asyncio.sleep(0.02)
    await store.publish("{acme}:events", b"3")
    async with asyncio.timeout(60):
        assert await waiting == [b"1", b"2", b"3"]


async def _take(subscription: object, count: int) -> list[bytes]:
    return [(await anext(subscription)).payload for _ in range(count)]  # type: ignore[call-overload]


async def test_cancelled_reader_loses_nothing(store: Store) -> None:
    """Cancelling a read and reading on skips no event."""
    subscription = await store.subscribe("{acme}:")
    for i in range(10):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001 * (i % 3)):
                await anext(subscription)
        await store.publish("{acme}:events", b"%d" % i)
        async with asyncio.timeout(60):
            assert (await anext(subscription)).payload == b"%d" % i


async def test_closed_store_says_so(store: Store) -> None:
    """After close every call is a typed error, subscriptions have ended, and closing again is harmless."""
    subscription = await store.subscribe("")
    waiting = asyncio.create_task(_take(subscription, 1))
    await asyncio.sleep(0.01)
    await store.close()
    await store.close()
    for call in (store.get(KEY), store.put_blob("acme", b"x"), store.publish("{acme}:e", b"x")):
        with pytest.raises(StoreUnavailableError):
            await call
    with pytest.raises((StopAsyncIteration, RuntimeError)):
        async with asyncio.timeout(60):
            await waiting
