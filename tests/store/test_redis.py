"""The Redis store's own promises: what it does when Redis is away, slow or full, and what becomes of its calls."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from promptd_store import (
    Append,
    Check,
    CheckFailedError,
    Put,
    StoreUnavailableError,
)
from promptd_store.redis_backend.store import RedisStore
from redis.exceptions import AuthenticationError

from tests.fault_proxy import FaultProxy
from tests.redis_server import RedisServer, running_redis

pytestmark = pytest.mark.anyio

KEY = "{acme}:thing:a"
GIVE_UP_SECONDS = 2
"""After which a `hasty` store gives up on an answer of Redis: longer than a busy machine stands still."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of this test's own, to be killed and stopped."""
    with running_redis(tmp_path / "redis") as running:
        yield running


@pytest.fixture
async def store(server: RedisServer) -> AsyncIterator[RedisStore]:
    """A store with the product's patience."""
    opened = await RedisStore.open(server.url)
    yield opened
    await opened.close()


@pytest.fixture
async def hasty(server: RedisServer) -> AsyncIterator[RedisStore]:
    """A store that gives up on an answer soon, for tests in which Redis does not answer."""
    opened = await RedisStore.open(f"{server.url}?socket_timeout={GIVE_UP_SECONDS}")
    yield opened
    await opened.close()


async def until_it_works(call: Callable[[], Any]) -> None:
    """Repeat a call until the store is there again."""
    async with asyncio.timeout(60):
        while True:
            try:
                await call()
                return
            except StoreUnavailableError:
                await asyncio.sleep(0.01)


async def num_slow(call: Callable[[], Any], count: int) -> int:
    """Make a call so often that must fail; how many of them took as long as one that waits for an answer."""
    num = 0
    for _ in range(count):
        started = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            await call()
        num += time.monotonic() - started > GIVE_UP_SECONDS
        await asyncio.sleep(0.002)
    return num


async def test_a_killed_redis_comes_back(server: RedisServer, hasty: RedisStore) -> None:
    """While Redis is dead calls say so at once; after its restart everything acknowledged is there."""
    subscription = await hasty.subscribe("{acme}:")
    etags = await hasty.transact(puts=[Put(KEY, b"1")], appends=[Append("{acme}:e", b"1")])
    digest = await hasty.put_blob("acme", b"blob")
    assert (await anext(subscription)).payload == b"1"
    server.kill()
    waiting = asyncio.create_task(anext(subscription))
    with pytest.raises(StoreUnavailableError) as caught:
        await hasty.get(KEY)
    assert str(server.port) not in str(caught.value)
    assert await num_slow(lambda: hasty.get(KEY), 200) <= 20  # on a busy machine some do not get their turn
    await asyncio.to_thread(server.start)
    await until_it_works(lambda: hasty.get(KEY))
    record = await hasty.get(KEY)
    assert record is not None and (record.value, record.etag) == (b"1", etags[KEY])
    assert await hasty.get_blob("acme", digest) == b"blob"
    await hasty.publish("{acme}:e", b"2")
    async with asyncio.timeout(60):
        assert (await waiting).payload == b"2"


async def test_a_restart_between_two_calls_is_not_noticed(server: RedisServer, store: RedisStore) -> None:
    """Connections of before are replaced and the call repeated: whoever asks after a restart gets an answer."""
    await asyncio.gather(*(store.transact(puts=[Put(KEY, b"1")]) for _ in range(20)))
    for number in range(3):
        server.kill()
        await asyncio.to_thread(server.start)
        await asyncio.gather(*(store.transact(puts=[Put(f"{KEY}{i}", b"%d" % number)]) for i in range(20)))
    assert len(await store.scan(KEY)) == 21


async def test_a_silent_redis_is_found_out(server: RedisServer, hasty: RedisStore) -> None:
    """Half-open: connections stand and nobody answers. The first call waits its time, others fail at once."""
    await hasty.get(KEY)
    server.pause()
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="no answer in time"):
        await hasty.get(KEY)
    assert time.monotonic() - started > 0.8 * GIVE_UP_SECONDS
    assert await num_slow(lambda: hasty.transact(puts=[Put(KEY, b"1")]), 100) <= 10
    server.resume()
    await until_it_works(lambda: hasty.get(KEY))


async def test_an_old_failure_is_no_new_outage(server: RedisServer) -> None:
    """What was sent before an outage and fails after its end says nothing about Redis as it is now."""
    async with FaultProxy(server.port).running() as proxy:
        store = await RedisStore.open(f"redis://127.0.0.1:{proxy.port}?socket_timeout={GIVE_UP_SECONDS}")
        proxy.mode = "swallow"
        first = asyncio.create_task(store.get(KEY))
        await asyncio.sleep(0.6 * GIVE_UP_SECONDS)
        second = asyncio.create_task(store.get(KEY))
        with pytest.raises(StoreUnavailableError, match="no answer in time"):
            await first
        assert not store.is_up
        proxy.mode = "pass"
        await until_it_works(lambda: store.get(KEY))
        with pytest.raises(StoreUnavailableError, match="no answer in time"):
            await second
        assert store.is_up and await store.get(KEY) is None
        await store.close()


async def test_a_slow_redis_is_waited_for(server: RedisServer) -> None:
    """Slower than usual is not away: 200 ms an answer, every call works."""
    async with FaultProxy(server.port).running() as proxy:
        store = await RedisStore.open(f"redis://127.0.0.1:{proxy.port}?socket_timeout=10")
        proxy.delay_seconds = 0.2
        await asyncio.gather(*(store.transact(puts=[Put(f"{KEY}{i}", b"1")]) for i in range(10)))
        assert store.is_up and len(await store.scan(KEY)) == 10
        await store.close()


async def test_a_lost_answer_does_nothing_twice(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Redis did it but the answer was lost on the way, the repeated step changes nothing more and answers alike.

    The control: a step that cannot be recognized is done twice, or refused by its own first half.
    """
    async with FaultProxy(server.port).running() as proxy:
        store = await RedisStore.open(f"redis://127.0.0.1:{proxy.port}")
        for number in range(5):
            key = f"{KEY}{number}"
            proxy.mode = "cut"
            etags = await store.transact([Check(key, None)], [Put(key, b"1")], appends=[Append("{acme}:e", b"x")])
            record = await store.get(key)
            assert record is not None and record.etag == etags[key]
            proxy.mode = "cut"
            lease = await store.acquire_lease(key, "w1", 60)
            assert lease is not None and (await store.renew_lease(lease, 60)).epoch == lease.epoch
        assert proxy.num_cut == 10
        assert len(await store.read_log("{acme}:e")) == 5

        script = store._link.script

        async def forgetful(step: Any, key: str, *args: Any) -> Any:
            async def once() -> Any:
                words = [args[0], secrets.token_hex(8), *args[2:]]
                return await store._link._client.execute_command("EVAL", step.text, 1, key, *words)

            return await store._link._call(once)

        monkeypatch.setattr(store._link, "script", forgetful)
        proxy.mode = "cut"
        await store.publish("{acme}:e", b"twice")
        proxy.mode = "cut"
        with pytest.raises(CheckFailedError):
            await store.transact([Check(KEY, None)], [Put(KEY, b"1")])
        monkeypatch.setattr(store._link, "script", script)
        assert [event.payload for event in await store.read_log("{acme}:e")][5:] == [b"twice", b"twice"]
        await store.close()


async def test_closing_ends_a_probe_that_was_not_told(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """redis-py writes through `asyncio.wait_for`, which may swallow a cancellation; `close` ends the probe even so.

    Without a look at whether the link was closed the probe would ask a Redis that refuses it for ever.
    """
    store = await RedisStore.open(server.url)
    asked, swallowed = asyncio.Event(), asyncio.Event()

    async def refuse(*words: object) -> None:
        asked.set()
        if not swallowed.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            swallowed.set()
        raise AuthenticationError("no")

    monkeypatch.setattr(store._link._client, "execute_command", refuse)
    store._link._lost()
    async with asyncio.timeout(60):
        await asked.wait()
    closing = asyncio.create_task(store.close())
    closed, _ = await asyncio.wait({closing}, timeout=60)
    assert swallowed.is_set() and closed


async def test_a_closing_that_is_cancelled_ends_as_that(store: RedisStore) -> None:
    """Who waits for the probe and is cancelled meanwhile is cancelled: only the probe's own end is passed over."""
    go_on = asyncio.Event()

    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await go_on.wait()

    probe = store._link._probe = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    closing = asyncio.create_task(store._link.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(60):
            await closing
    go_on.set()
    await asyncio.wait({probe})


async def test_a_full_redis_refuses_writes_only(server: RedisServer, store: RedisStore) -> None:
    """Out of memory is a typed error for writers; readers do not notice, and nothing is dropped."""
    await store.transact(puts=[Put(KEY, b"kept")])
    used = (await store._link.command("INFO", "memory"))["used_memory"]
    await store._link.command("CONFIG", "SET", "maxmemory", used + (1 << 19))
    with pytest.raises(StoreUnavailableError, match=r"OOM|maxmemory"):
        for number in range(20):
            await store.put_blob("acme", bytes(100_000) + bytes([number]))
    assert store.is_up
    record = await store.get(KEY)
    assert record is not None and record.value == b"kept"
    await store._link.command("CONFIG", "SET", "maxmemory", 0)
    await store.transact(puts=[Put(KEY, b"again")])


async def test_calls_beyond_the_pool_wait_their_turn(store: RedisStore) -> None:
    """A thousand calls at once all get their answer over a bounded number of connections."""
    await asyncio.gather(*(store.transact(puts=[Put(f"{KEY}{i:04}", b"x")]) for i in range(1000)))
    clients = int((await store._link.command("INFO", "clients"))["connected_clients"])
    assert len(await store.scan(KEY)) == 1000 and clients <= 70


async def test_cancelled_calls_leave_no_mess(store: RedisStore) -> None:
    """Callers that are cancelled at any moment never make another caller see an answer that is not its own."""
    await store.transact(puts=[Put(f"{KEY}{i}", b"%d" % i) for i in range(20)])
    dice = random.Random(1)

    async def read(i: int) -> None:
        record = await store.get(f"{KEY}{i}")
        assert record is not None and record.value == b"%d" % i

    for _ in range(40):
        tasks = [asyncio.create_task(read(i % 20)) for i in range(40)]
        await asyncio.sleep(dice.random() * 0.004)
        for task in dice.sample(tasks, 20):
            task.cancel()
        for done in await asyncio.gather(*tasks, return_exceptions=True):
            assert done is None or isinstance(done, asyncio.CancelledError)
