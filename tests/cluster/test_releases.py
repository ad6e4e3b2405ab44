"""A rolling change from the release before to this one, under load: both serve over one Redis for a while."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import tarfile
from pathlib import Path

import httpx
import pytest

from tests.cluster.load import Load
from tests.engine.harness import library
from tests.haproxy import running_haproxy
from tests.redis_server import RedisServer
from tests.replicas import ROOT, Replica, ReplicaForge

MODEL = "tiny-llama"


def git(*words: str) -> bytes:
    """What git says; the test is skipped outside of a clone."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, timeout=60, check=False)
    if done.returncode:
        pytest.skip(f"git {words[0]} says: {done.stderr.decode().strip()}")
    return done.stdout


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """The release before: PROMPTD_RELEASE_BEFORE (a tag or a commit), else the newest tag, else the commit before."""
    tags = git("tag", "--list", "v*", "--sort=-creatordate", "--merged", "HEAD~1").decode().split()
    commit = os.environ.get("PROMPTD_RELEASE_BEFORE") or (tags or ["HEAD~1"])[0]
    with tarfile.open(fileobj=io.BytesIO(git("archive", commit))) as archive:
        archive.extractall(tmp_path / "before", filter="data")
    return tmp_path / "before"


@pytest.mark.long
def test_from_the_release_before_to_this_one(
    forge: ReplicaForge, before: Path, redis: RedisServer, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    """No request is lost; what either publishes the other serves at once, and takes over."""
    artifacts = library(tiny_models["llama"])[:4]
    old_forge = ReplicaForge(forge.model, before)
    olds = [Replica(old_forge, tmp_path / "old", redis.url) for _ in range(2)]
    news = [Replica(forge, tmp_path / "new", redis.url) for _ in range(2)]
    for old, new in zip(olds, news, strict=True):
        new.port, new.url = old.port, old.url  # it takes the other's place
        new._settings["port"] = old.port

    def exchange(first: Replica, second: Replica, name: str) -> None:
        """Publish on one, ask the other; then the other way round, under the same name."""
        for number, (writer, reader) in enumerate(((first, second), (second, first))):
            put = httpx.put(f"{writer.url}/v1/prompts/{name}", content=artifacts[number].content, timeout=30)
            assert put.is_success, put.text
            body = {"model": name, "prompt": "the quick", "max_tokens": 2}
            answer = httpx.post(f"{reader.url}/v1/completions", json=body, timeout=30)
            assert answer.status_code == 200 and artifacts[number].version in answer.text, answer.text
        listed = httpx.get(f"{first.url}/v1/prompts/{name}/versions", timeout=30).json()["data"]
        assert [one["version"] for one in listed] == [artifacts[1].version, artifacts[0].version]

    async def change(load: Load, until_up: object) -> None:
        running = asyncio.create_task(load.run())
        await load.until_more()
        for number, (old, new) in enumerate(zip(olds, news, strict=True)):
            old.signal(signal.SIGTERM)
            assert await asyncio.to_thread(old.wait) == 0
            await asyncio.to_thread(new.start().until_ready)
            await asyncio.to_thread(until_up, number)  # type: ignore[arg-type]
            await load.until_more()
            if number == 0:
                await asyncio.to_thread(exchange, olds[1], news[0], "side-by-side")
        load.is_stopping = True
        await running

    try:
        for old in olds:
            old.start()
        for old in olds:
            old.until_ready()
        with running_haproxy(tmp_path, [old.port for old in olds], retries=False) as proxy:
            load = Load(proxy.url, 8, MODEL)
            asyncio.run(change(load, proxy.until_up))
    finally:
        for replica in (*olds, *news):
            replica.close()
        old_forge.close()
    print(f"two releases: {len(load.faults)} of {len(load.ended)} requests failed")
    assert load.faults == [] and len(load.ended) >= 3 * 8
