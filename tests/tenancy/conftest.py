"""A store, a clock that tests turn, and the records of tenants on both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from promptd_store import EmbeddedStore

T = TypeVar("T")


class Clock:
    """Stands still until it is turned."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        """Return the time, in seconds."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """One clock for everything of a test."""
    return Clock()


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[EmbeddedStore]:
    """A store that is closed at the end."""
    store = EmbeddedStore(folder)
    try:
        yield store
    finally:
        await store.close()


def with_store(folder: Path, what: Callable[[EmbeddedStore], Awaitable[T]]) -> T:
    """Run something over a fresh connection to a store."""

    async def run() -> T:
        async with opened(folder) as store:
            return await what(store)

    return asyncio.run(run())
