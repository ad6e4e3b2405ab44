"""Blobs in a bucket of a real S3 server: what the other places promise, and what is a bucket's own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from promptd_store import BlobNotFoundError, StoreUnavailableError, open_store
from promptd_store.objects import BucketObjects, open_objects
from promptd_store.redis_backend.blobs import OUTSIDE_SECONDS
from promptd_store.redis_backend.store import RedisStore

from tests.redis_server import RedisServer, running_redis
from tests.replicas import ReplicaForge, running_replicas
from tests.s3_server import S3Server

pytestmark = [pytest.mark.anyio, pytest.mark.long]

LARGE = 9 << 20
TOLD_WITHIN_SECONDS = 2 * OUTSIDE_SECONDS
"""How soon whoever needs a bucket that does not answer is told, at the latest."""


@pytest.fixture
async def store(redis_server: RedisServer, bucket: str) -> AsyncIterator[RedisStore]:
    """A store with its large blobs in the bucket."""
    url = f"{redis_server.url}?prefix=s3-{secrets.token_hex(8)}:"
    opened = await RedisStore.open(url, objects=open_objects(bucket), inline_bytes=100)
    yield opened
    await opened.close()


def elsewhere(bucket: str, code: str) -> str:
    """Do something with the bucket in another process; return what it prints."""
    code = f"from promptd_store.objects import BucketObjects\nbucket = BucketObjects({bucket!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_cannot_be_used_is_refused(s3: S3Server, bucket: str) -> None:
    """A bucket that is not there is named at the start; a good one is left as it was."""
    with pytest.raises(StoreUnavailableError, match="s3://absent/blobs"):
        open_objects("s3://absent/blobs")
    open_objects(bucket)
    assert list(BucketObjects(bucket).scan("public")) == []


async def test_large_and_small(store: RedisStore, bucket: str) -> None:
    """Large bytes come back whole, also in another process; small ones never leave Redis."""
    data = os.urandom(LARGE)
    digest = await store.put_blob("acme", data)
    await store.put_blob("acme", b"small")
    found = await asyncio.to_thread(elsewhere, bucket, "print([name for name, age in bucket.scan('acme')])")
    assert found.count(digest.removeprefix("sha256:")) == 1 and found.count("acme/") == 1
    assert await store.get_blob("acme", digest) == data


async def test_what_others_change_is_seen(store: RedisStore, bucket: str) -> None:
    """No listing is remembered: what another process wrote, set aside or deleted is erased, swept, and not found."""
    digest = await store.put_blob("acme", bytes(1000))
    assert await store.sweep_blobs("acme", older_than_seconds=-1) == []
    orphan = f"acme/aa/{'a' * 64}.{'0' * 16}"
    await asyncio.to_thread(elsewhere, bucket, f"bucket.put({orphan!r}, b'left behind')")
    assert await store.sweep_blobs("acme", older_than_seconds=3600) == []
    assert await store.sweep_blobs("acme", older_than_seconds=-1) == [orphan]
    await asyncio.to_thread(elsewhere, bucket, f"bucket.put({orphan!r}, b'bad')\nbucket.set_aside({orphan!r})")
    assert await store.clear_quarantine("acme") == 1
    assert await store.clear_quarantine("acme") == 0
    delete = "for name, age in list(bucket.scan('acme')):\n    bucket.delete(name)\n    bucket.delete(name)"
    await asyncio.to_thread(elsewhere, bucket, delete)
    with pytest.raises(BlobNotFoundError):
        await store.get_blob("acme", digest)
    await store.put_blob("acme", bytes(1000))
    await store.put_blob("acme.eu", bytes(1000))
    await store.erase_tenant("acme")
    left = await asyncio.to_thread(elsewhere, bucket, "print(bucket._files.find(bucket._root))")
    assert "acme/" not in left and left.count("acme.eu/") == 1


async def test_a_bucket_that_does_not_answer(store: RedisStore, s3: S3Server) -> None:
    """Who needs it is told so, while small blobs are read and written as before; then all is there."""
    data = bytes(1000)
    digest, small = await store.put_blob("acme", data), await store.put_blob("acme", b"small")
    s3.pause()
    began = time.monotonic()
    try:
        calls = [store.get_blob("acme", digest), store.put_blob("acme", bytes(2000))]
        async with asyncio.timeout(TOLD_WITHIN_SECONDS):
            answers = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(answer) for answer in answers} == {StoreUnavailableError}, answers
        print(f"told after {time.monotonic() - began:.1f} s: {answers[0]}")
        assert await store.get_blob("acme", small) == b"small" and store.is_up
    finally:
        s3.resume()
    assert await store.get_blob("acme", digest) == data


def test_two_servers(bucket: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """A file of a megabyte and a half, uploaded to one server, is read from the other, and lies in the bucket."""
    rows = b'{"text": "x", "label": "a"}\n' * 60_000
    with (
        contextlib.closing(ReplicaForge(tiny_models["llama"])) as forge,
        running_redis(tmp_path / "redis") as redis,
        running_replicas(forge, tmp_path, redis.url, blobs=bucket, training="worker") as (one, other),
    ):
        upload = {"file": ("rows.jsonl", rows)}
        answer = httpx.post(f"{one.url}/v1/files", files=upload, data={"purpose": "fine-tune"}, timeout=60)
        file = answer.raise_for_status().json()["id"]
        assert httpx.get(f"{other.url}/v1/files/{file}/content", timeout=60).raise_for_status().content == rows
        assert elsewhere(bucket, "print(len(list(bucket.scan('default'))))") == "1\n"


async def test_the_place_is_there_from_the_start(redis_server: RedisServer, s3: S3Server) -> None:
    """A store whose bucket is not there is refused whole, not at its first large file."""
    with pytest.raises(StoreUnavailableError, match="absent"):
        await open_store(redis_server.url, blobs="s3://absent/blobs")
