"""Work for the store that is done again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from promptd_store import StoreError


async def keep_doing(work: Callable[[], Awaitable[object]], seconds: float) -> None:
    """Do it, with a pause before each time, until cancelled; what the store does not do now is left for the next."""
    while True:
        await asyncio.sleep(seconds)
        with suppress(StoreError):
            await work()
