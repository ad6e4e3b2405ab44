"""A base model's spec, stores of every backend, and a catalog over one."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from promptd_store import BaseModelSpec, EmbeddedStore, PromptCatalog, Store
from promptd_store.objects import BucketObjects, FolderObjects, Objects
from promptd_store.redis_backend.store import RedisStore

from tests.redis_server import RedisServer, running_redis
from tests.s3_server import S3Server, running_s3
from tests.store.files import SPEC
from tests.store.forge import Forge

StoreFactory = Callable[[], Awaitable[Store]]


@pytest.fixture
def spec() -> BaseModelSpec:
    """A decoder with grouped K/V heads."""
    return SPEC


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real Redis that syncs every write, for all tests of the session; each has a key prefix of its own."""
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server for all tests of the session, where everybody's requests go."""
    with running_s3(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """A place of a test's own, in a bucket of its own."""
    name = f"test-{uuid.uuid4().hex}"
    s3.make_bucket(name)
    return f"s3://{name}/blobs"


BACKENDS = ["embedded", "redis", "redis with a folder", pytest.param("redis with a bucket", marks=pytest.mark.long)]


@pytest.fixture(params=BACKENDS)
async def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StoreFactory]:
    """A function that opens the same store once more, as another process would. A new backend adds a branch here."""
    async with contextlib.AsyncExitStack() as stack:
        prefix = f"test-{uuid.uuid4().hex}:"

        async def open_one() -> Store:
            store: EmbeddedStore | RedisStore
            if request.param == "embedded":
                store = EmbeddedStore(tmp_path / "store", poll_seconds=0.01)
            else:
                server = request.getfixturevalue("redis_server")
                objects: Objects | None = None
                if request.param == "redis with a folder":
                    objects = FolderObjects(tmp_path / "blobs")
                elif request.param == "redis with a bucket":
                    objects = BucketObjects(request.getfixturevalue("bucket"))
                store = await RedisStore.open(f"{server.url}?prefix={prefix}", objects=objects, inline_bytes=0)
            stack.push_async_callback(store.close)
            return store

        yield open_one


@pytest.fixture
async def store(open_store: StoreFactory) -> Store:
    """One open store."""
    return await open_store()


@pytest.fixture
def catalog(store: Store, spec: BaseModelSpec) -> PromptCatalog:
    """A catalog of that store for the base model."""
    return PromptCatalog(store, spec, reserved_names={"tiny"})


@pytest.fixture(scope="session")
def forge() -> Iterator[Forge]:
    """Other processes on order."""
    made = Forge()
    yield made
    made.close()
