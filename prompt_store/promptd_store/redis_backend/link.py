"""Connections to one Redis that is known to be up or down: while it is down, calls fail at once instead of waiting."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import (
    BusyLoadingError,
    NoPermissionError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from promptd_store.base import Content
from promptd_store.errors import StoreUnavailableError
from promptd_store.redis_backend.scripts import Script
from promptd_store.redis_backend.target import RedisTarget

MAX_AT_ONCE = 64
"""Calls that are under way at a time; more wait here, not in Redis."""
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.05, 1.0
IDLE_CHECK_SECONDS = 10.0
"""A connection that was idle for longer is asked for a sign of life before it is used."""
WAIT_MILLISECONDS = 2000

_T = TypeVar("_T")


class RedisLink:
    """One pool of connections, for the event loop it was made in.

    A lost connection is replaced and the call repeated once: every call is harmless to repeat. A call that gets no
    answer in time ends with `StoreUnavailableError`, and so does every call after it until a probe, repeated at
    jittered, growing intervals, was answered.
    """

    def __init__(self, target: RedisTarget) -> None:
        self._target = target
        self._client, self._sentinels = _connect(target)
        self._slots = asyncio.Semaphore(MAX_AT_ONCE)
        self._up = asyncio.Event()
        self._up.set()
        self._num_outages = 0
        self._probe: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    async def connect(self, seconds: float) -> None:
        """Wait so long for the first answer; raises `StoreUnavailableError`."""
        until = time.monotonic() + seconds
        while True:
            try:
                await self.command("PING")
                return
            except StoreUnavailableError as error:
                if not self.is_up:  # else it has answered: it refuses, and would again
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(max(0.0, until - time.monotonic())):
                            await self.until_up()
                    if self.is_up:
                        continue
                cause = error.__cause__ or error
                raise StoreUnavailableError(f"no store at {self._target.shown}: {cause}") from error

    @property
    def is_up(self) -> bool:
        """Whether the last thing heard of Redis was good."""
        return self._up.is_set()

    async def until_up(self) -> None:
        """Wait until calls are worth trying; raises `StoreUnavailableError` once closed."""
        await self._up.wait()
        self._check_open()

    async def command(self, *words: str | bytes | int | float) -> Any:
        """Run one command."""
        return await self._call(lambda: self._client.execute_command(*words))

    async def script(self, script: Script, key: str, *args: str | Content | int) -> Any:
        """Run one atomic step; what it writes is on as many replicas as the address asks for."""

        async def run() -> Any:
            try:
                return await self._evaluate("EVALSHA", script.sha, script.writes, key, args)
            except NoScriptError:
                return await self._evaluate("EVAL", script.text, script.writes, key, args)

        return await self._call(run)

    async def hash_page(self, key: str, cursor: str, size: int) -> tuple[str, list[tuple[bytes, bytes]]]:
        """Read some fields of a large hash; a field may come twice. The cursor begins and ends as "0"."""
        found: Any = await self._call(lambda: self._client.hscan(key, cursor=int(cursor), count=size))
        return str(found[0]), list(found[1].items())

    async def delete_matching(self, prefix: str, pattern: str) -> int:
        """Delete the keys behind a prefix that a pattern of Redis' fits; looks at every key there is."""
        literal = "".join(f"\\{char}" if char in "*?[]^\\" else char for char in prefix)
        num, cursor = 0, 0
        while True:
            seen = cursor

            async def look(at: int = seen) -> Any:
                return await self._client.scan(cursor=at, match=literal + pattern, count=1000)

            cursor, keys = await self._call(look)
            if keys:
                num += int(await self.command("DEL", *keys))
            if cursor == 0:
                return num

    async def block(self, command: Callable[[Redis], Awaitable[_T]]) -> _T:
        """Run a command that waits for something, beside the calls' slots; it must answer within `block_seconds`."""
        self._check_open()
        self._check_up()
        task = self._started(lambda: command(self._client))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()  # at worst it ends by itself after `block_seconds`
            raise

    @property
    def block_seconds(self) -> float:
        """How long a blocking command may wait: Redis must answer before the connection counts as dead."""
        return min(1.0, float(self._target.options["socket_timeout"]) / 3)

    async def close(self) -> None:
        """Let the calls that are under way finish, then disconnect."""
        self._is_closed = True
        self._up.set()  # whoever waits finds out
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait({self._probe})
        if self._running:
            await asyncio.wait(self._running)
        for client in (self._client, *self._sentinels):
            await client.aclose(close_connection_pool=True)

    async def _call(self, send: Callable[[], Awaitable[_T]]) -> _T:
        self._check_open()
        self._check_up()
        await self._slots.acquire()
        try:
            self._check_open()
            self._check_up()  # it may have gone while this call waited for its turn
            task = self._started(send)
        except BaseException:
            self._slots.release()
            raise
        task.add_done_callback(lambda _: self._slots.release())
        return await asyncio.shield(task)

    def _started(self, send: Callable[[], Awaitable[_T]]) -> asyncio.Task[_T]:
        """Run a call in a task of its own, which ends by itself when its caller is cancelled.

        redis-py uses `asyncio.wait_for`, which on Python 3.11 can swallow a cancellation; and a connection on which
        nobody waits for the answer any more would have to be thrown away.
        """
        task = asyncio.create_task(self._repeated(send))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def _repeated(self, send: Callable[[], Awaitable[_T]]) -> _T:
        num_outages = self._num_outages
        try:
            try:
                return await send()
            except RedisConnectionError as error:
                if isinstance(error, BusyLoadingError):
                    raise
                await self._drop_idle()  # they went with the same server
                return await send()
        except (RedisConnectionError, RedisTimeoutError, ReadOnlyError, OSError) as error:
            if num_outages == self._num_outages:  # else it was sent before an outage that is known, and may be over
                self._lost()
            raise StoreUnavailableError(f"the store is away: {_kind(error)}") from error
        except RedisError as error:
            raise StoreUnavailableError(f"the store failed: {_kind(error)}") from error

    async def _evaluate(self, how: str, what: str, writes: bool, key: str, args: Sequence[str | Content | int]) -> Any:
        if not writes or not self._target.num_replicas:
            return await self._client.execute_command(how, what, 1, key, *args)
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.execute_command(how, what, 1, key, *args)
            pipe.execute_command("WAIT", self._target.num_replicas, WAIT_MILLISECONDS)
            answer, num_replicas = await pipe.execute(raise_on_error=False)
        for one in (answer, num_replicas):
            if isinstance(one, Exception):
                raise one
        if num_replicas < self._target.num_replicas:
            raise StoreUnavailableError(
                f"{num_replicas} replicas have the write, {self._target.num_replicas} must; it may still come true"
            )
        return answer

    def _lost(self) -> None:
        self._num_outages += 1
        self._up.clear()
        if not self._is_closed and (self._probe is None or self._probe.done()):
            self._probe = asyncio.create_task(self._until_answered())

    async def _until_answered(self) -> None:
        """Ask for a sign of life, not all replicas of this server at the same moments, until there is one."""
        pause = FIRST_RETRY_SECONDS
        while not self._is_closed:  # `close` cancels this too, and redis-py may swallow that: see `_started`
            await self._drop_idle()
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(LAST_RETRY_SECONDS, 2 * pause)
            try:
                await self._client.execute_command("PING")  # refused while it loads its data
                is_primary = (await self._client.info("replication")).get("role") == "master"
            except (RedisError, OSError):
                continue
            if is_primary:
                self._up.set()
                return

    async def _drop_idle(self) -> None:
        with contextlib.suppress(RedisError, OSError):
            await self._client.connection_pool.disconnect(inuse_connections=False)

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreUnavailableError("the store is closed")

    def _check_up(self) -> None:
        if not self.is_up:
            raise StoreUnavailableError("the store is away; it is asked for a sign of life again and again")


def _connect(target: RedisTarget) -> tuple[Redis, Sequence[Redis]]:
    """Return the client of the primary, and those of the sentinels that know who that is."""
    options: dict[str, Any] = {
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),  # this module repeats what can be repeated
        "socket_connect_timeout": target.options["socket_timeout"],
        "socket_keepalive": True,
        "health_check_interval": IDLE_CHECK_SECONDS,
        **target.options,
    }
    if target.service is None:
        ((host, port),) = target.hosts
        return Redis(host=host, port=port, **options), ()
    about_sentinels = {
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": target.options["socket_timeout"],
        "socket_connect_timeout": target.options["socket_timeout"],
        **target.sentinel_options,
    }
    sentinel = Sentinel(list(target.hosts), sentinel_kwargs=about_sentinels, **options)
    client: Redis = sentinel.master_for(target.service)
    return client, sentinel.sentinels


def _kind(error: BaseException) -> str:
    """What happened, without an address: callers from outside may read it."""
    if isinstance(error, RedisTimeoutError):
        return "no answer in time"
    if isinstance(error, BusyLoadingError):
        return "it is loading its data"
    if isinstance(error, NoPermissionError):
        return "its user lacks a permission"
    if isinstance(error, ResponseError | ReadOnlyError):
        return str(error).partition(".")[0][:120]
    return "no connection"
