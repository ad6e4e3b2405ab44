"""A base model's spec, stores of every backend, and a catalog over one."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from promptd_store import BaseModelSpec, EmbeddedStore, PromptCatalog, Store

from tests.store.files import SPEC
from tests.store.forge import Forge

StoreFactory = Callable[[], Awaitable[Store]]


@pytest.fixture
def anyio_backend() -> str:
    """Run async tests on asyncio."""
    return "asyncio"


@pytest.fixture
def spec() -> BaseModelSpec:
    """A decoder with grouped K/V heads."""
    return SPEC


@pytest.fixture(params=["embedded"])
async def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StoreFactory]:
    """A function that opens the same store once more, as another process would. A new backend adds a branch here."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_one() -> Store:
            store = EmbeddedStore(tmp_path / "store", poll_seconds=0.01)
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
