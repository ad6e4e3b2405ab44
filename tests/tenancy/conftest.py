"""A store, a clock that tests turn, and the records of tenants on both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from promptd_store import EmbeddedStore, StoreUnavailableError

from promptd.errors import RateLimitError

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


async def is_given(asked: Awaitable[object]) -> bool:
    """Whether what was asked for was given, and not refused for a limit."""
    try:
        await asked
    except RateLimitError:
        return False
    return True


def counted(store: EmbeddedStore, what: str = "transact") -> list[int]:
    """Count the store's transactions, or other calls, from now on."""
    counts, call = [0], getattr(store, what)

    async def counting(*arguments: object, **options: object) -> object:
        counts[0] += 1
        return await call(*arguments, **options)

    setattr(store, what, counting)
    return counts


async def refuse(*arguments: object, **options: object) -> None:
    """Be a store that is away."""
    raise StoreUnavailableError("away")
