"""Publications while Redis and servers are killed: what was acknowledged is there, whole."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import torch
from promptd_store import PromptArtifact, PromptCatalog, encode, find_faults
from promptd_store.objects import FolderObjects
from promptd_store.redis_backend.store import RedisStore

from tests.cluster.acknowledged import broken
from tests.engine.harness import frozen
from tests.redis_server import RedisServer
from tests.replicas import Replica, ReplicaForge, running_replicas


@dataclass
class Publisher:
    """Publishes over HTTP to whichever server answers, and writes down what was acknowledged."""

    urls: list[str]
    model: Path
    seed: int
    acknowledged: list[tuple[str, str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    num_refused: int = 0

    async def run(self, count: int, killer: asyncio.Task[int]) -> None:
        """Publish so many versions, and more while there is killing, each until it is acknowledged."""
        spec, dice = frozen(self.model).spec, random.Random(self.seed)
        async with httpx.AsyncClient(timeout=10) as http:
            for number in itertools.count():
                if number >= count and killer.done():
                    return
                generator = torch.Generator().manual_seed(self.seed * 100_000 + number)
                tensor = torch.randn(2, spec.hidden_size, generator=generator)
                artifact = encode("soft", tensor, base_fingerprint=spec.fingerprint)
                name = f"p{self.seed}-{number % 5}"
                while not await self._published(http, dice.choice(self.urls), name, artifact):
                    self.num_refused += 1
                    await asyncio.sleep(0.05)
                self.acknowledged.append((name, artifact.version))

    async def _published(self, http: httpx.AsyncClient, url: str, name: str, artifact: PromptArtifact) -> bool:
        started = time.monotonic()
        try:
            answer = await http.put(f"{url}/v1/prompts/{name}", content=artifact.content)
        except httpx.TransportError:
            return False
        if answer.is_success:
            assert answer.json()["version"] == artifact.version
            self.seconds.append(time.monotonic() - started)
        return answer.is_success


async def killing(redis: RedisServer, replicas: list[Replica], num_kills: int) -> int:
    """Kill Redis or a server at random moments; return how many of these kills there were."""
    dice = random.Random(5)
    for number in range(num_kills):
        await asyncio.sleep(0.2 + dice.random() * 0.6)
        if number == 0 or (number > 1 and dice.random() < 0.5):  # at least one of each
            await asyncio.to_thread(redis.kill)
            await asyncio.sleep(dice.random() * 0.2)
            await asyncio.to_thread(redis.start)
        else:
            replica = dice.choice(replicas)
            await asyncio.to_thread(replica.kill)
            await asyncio.to_thread(replica.start)
    return num_kills


def publish_and_kill(
    forge: ReplicaForge, redis: RedisServer, folder: Path, *, num_publishes: int, num_kills: int
) -> None:
    """Two servers, four writers; afterwards everything acknowledged is looked for over a connection of its own."""

    async def run(stack: AsyncExitStack) -> None:
        blobs = folder / "blobs"
        with running_replicas(forge, folder, redis.url, blobs=str(blobs)) as replicas:
            urls = [replica.url for replica in replicas]
            publishers = [Publisher(urls, forge.model, seed) for seed in range(4)]
            killer = asyncio.create_task(killing(redis, replicas, num_kills))
            await asyncio.gather(killer, *(one.run(num_publishes // 4, killer) for one in publishers))
        store = await RedisStore.open(redis.url, objects=FolderObjects(blobs))
        stack.push_async_callback(store.close)
        catalog = PromptCatalog(store, frozen(forge.model).spec)
        acknowledged = [one for publisher in publishers for one in publisher.acknowledged]
        lost = await broken(catalog, acknowledged)
        faults = [fault async for fault in find_faults(store)]
        seconds = sorted(second for publisher in publishers for second in publisher.seconds)
        num_refused = sum(one.num_refused for one in publishers)
        print(
            f"{len(acknowledged)} publications, {killer.result()} kills, {num_refused} refused: "
            f"{len(lost)} lost, {len(faults)} pointers to nothing, median {seconds[len(seconds) // 2] * 1e3:.0f} ms, "
            f"p99 {seconds[int(len(seconds) * 0.99)] * 1e3:.0f} ms"
        )
        assert lost == [] and faults == [] and len(acknowledged) >= num_publishes
        # The control: a version whose bytes are taken away is reported, by both looks.
        name, version = acknowledged[0]
        record = await catalog.resolve("default", f"{name}@{version}")
        await store.delete_blob("default", record.content_digest)
        fresh = PromptCatalog(store, frozen(forge.model).spec)
        assert await broken(fresh, acknowledged) == [one for one in acknowledged if one[1] == version]
        assert [fault async for fault in find_faults(store)]

    async def run_and_close() -> None:
        async with AsyncExitStack() as stack:
            await run(stack)

    asyncio.run(run_and_close())


def test_acknowledged_survives_kills(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """60 publications and more, a kill -9 of Redis and one of a server."""
    publish_and_kill(forge, redis, tmp_path, num_publishes=60, num_kills=2)


@pytest.mark.long
def test_ten_thousand_publications(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """10,000 publications and more, 50 kills."""
    publish_and_kill(forge, redis, tmp_path, num_publishes=10_000, num_kills=50)
