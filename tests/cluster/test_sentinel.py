"""A primary that dies under a real Sentinel: the store goes on with the replica, and nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from promptd_store import Put, StoreUnavailableError
from promptd_store.redis_backend.store import RedisStore

from tests.patience import until
from tests.ports import free_port
from tests.redis_server import RedisServer, program

DOWN_MILLISECONDS = 600
PERIODS = {
    "info-period": 200, "publish-period": 200, "ask-period": 100, "min-link-reconnect-period": 100,
    # A sentinel that was not given its turn for two seconds would otherwise do nothing for thirty.
    "tilt-trigger": 60_000, "tilt-period": 100,
}  # fmt: skip
"""Milliseconds: everything that sentinels do by the clock, some ten times as often as they do it by themselves."""


class Group:
    """Two Redis servers and three sentinels that watch them."""

    def __init__(self, folder: Path) -> None:
        safe = {"min_replicas_max_lag": "2", "repl_diskless_sync_delay": "0"}
        self.servers = [RedisServer(folder / "a", **safe)]
        self.servers.append(RedisServer(folder / "b", replicaof=f"127.0.0.1 {self.servers[0].port}", **safe))
        self.until_replicated()
        self.sentinels = [free_port() for _ in range(3)]
        self._processes = []
        for port in self.sentinels:
            config = folder / f"sentinel-{port}.conf"
            config.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
                f"sentinel monitor main 127.0.0.1 {self.servers[0].port} 2\n"
                f"sentinel down-after-milliseconds main {DOWN_MILLISECONDS}\n"
                "sentinel failover-timeout main 3000\nsentinel parallel-syncs main 1\n"
            )
            words = [program("redis-server"), str(config), "--sentinel"]
            self._processes.append(subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        for port in self.sentinels:
            words = [word for name, value in PERIODS.items() for word in (name, str(value))]
            self._until(lambda port=port, words=words: self.ask(port, "sentinel", "debug", *words).strip() == "OK")
        for port in self.sentinels:
            self._until(lambda port=port: "num-other-sentinels 2" in self.ask(port, "sentinel", "master", "main"))
            self._until(lambda port=port: "num-slaves 1" in self.ask(port, "sentinel", "master", "main"))

    @property
    def url(self) -> str:
        """For `--store`: a write counts when the replica has it, too."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.sentinels)
        return f"redis+sentinel://{hosts}/main?replicas=1&socket_timeout=1"

    def primary(self) -> RedisServer:
        """Who is it now, as the sentinels say?"""
        answer = self.ask(self.sentinels[0], "sentinel", "get-master-addr-by-name", "main").split()
        return next(server for server in self.servers if str(server.port) == answer[1])

    def until_replicated(self) -> None:
        """Wait until some primary has the other one as its replica."""
        self._until(
            lambda: any(
                "role:master" in (info := self.ask(server.port, "info", "replication")) and "state=online" in info
                for server in self.servers
                if server.process is not None
            )
        )

    def close(self) -> None:
        """End everything."""
        for process in self._processes:
            process.kill()
            process.wait(20)
        for server in self.servers:
            server.close()

    @staticmethod
    def ask(port: int, *words: str) -> str:
        """What redis-cli is told, on one line."""
        done = subprocess.run(
            ["redis-cli", "-p", str(port), *words], capture_output=True, text=True, timeout=20, check=False
        )
        return " ".join(done.stdout.split("\n"))

    @staticmethod
    def _until(holds: Callable[[], bool]) -> None:
        until(holds, seconds=120, pause_seconds=0.05)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    """A watched pair."""
    made = Group(tmp_path)
    yield made
    made.close()


async def fail_over(group: Group, num_failovers: int) -> None:
    """Write all the time; kill the primary again and again; look for everything that was acknowledged."""
    store = await RedisStore.open(group.url)
    acknowledged: list[int] = []
    gaps: list[float] = []
    stop = False

    async def write() -> None:
        number, lost_at = 0, None
        while not stop:
            number += 1
            try:
                await store.transact(puts=[Put(f"{{acme}}:n:{number:06d}", b"%d" % number)])
            except StoreUnavailableError:
                lost_at = lost_at or time.monotonic()
                await asyncio.sleep(0.02)
                continue
            if lost_at is not None:
                gaps.append(time.monotonic() - lost_at)
                lost_at = None
            acknowledged.append(number)

    writers = [asyncio.create_task(write())]
    for _ in range(num_failovers):
        async with asyncio.timeout(120):
            while len(acknowledged) < 20:  # noqa: ASYNC110 - the writers know no event
                await asyncio.sleep(0.01)
        before, old = len(acknowledged), await asyncio.to_thread(group.primary)
        await asyncio.to_thread(old.kill)
        await asyncio.to_thread(group._until, lambda old=old: group.primary() is not old)
        await asyncio.to_thread(old.start)  # the sentinels make it the new one's replica
        await asyncio.to_thread(group.until_replicated)
        async with asyncio.timeout(120):
            while len(acknowledged) <= before + 20:  # noqa: ASYNC110 - the writers know no event
                await asyncio.sleep(0.05)
    stop = True
    await asyncio.gather(*writers)
    found = {int(record.value) for record in await store.scan("{acme}:n:")}
    lost = sorted(set(acknowledged) - found)
    await store.close()
    print(f"{num_failovers} failovers: {len(lost)} of {len(acknowledged)} acknowledged writes lost, "
          f"writes refused for {max(gaps):.1f} s at most")  # fmt: skip
    assert lost == [] and len(gaps) >= num_failovers and len(acknowledged) > 20 * num_failovers


def test_a_failover_loses_nothing(group: Group) -> None:
    """One dead primary: everything acknowledged is on the new one, and writes go on."""
    asyncio.run(fail_over(group, 1))


@pytest.mark.long
def test_twenty_failovers(group: Group) -> None:
    """The same, twenty times."""
    asyncio.run(fail_over(group, 20))


def test_control_without_replicas_a_failover_loses(group: Group) -> None:
    """A store that does not wait for the replica acknowledges what a dead primary takes along."""

    async def write_and_kill() -> int:
        store = await RedisStore.open(group.url.replace("replicas=1&", ""))
        replica = next(server for server in group.servers if server is not group.primary())
        replica.kill()  # it misses the write
        await store.transact(puts=[Put("{acme}:n", b"lost")])
        group.primary().kill()
        await asyncio.to_thread(replica.start)
        await asyncio.to_thread(group._until, lambda: group.primary() is replica)
        lost = 0
        async with asyncio.timeout(120):
            while True:
                with contextlib.suppress(StoreUnavailableError):
                    lost += await store.get("{acme}:n") is None
                    break
                await asyncio.sleep(0.05)
        await store.close()
        return lost

    assert asyncio.run(write_and_kill()) == 1
