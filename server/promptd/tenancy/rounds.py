"""Work for the store that is done again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from promptd_store import StoreError


async def keep_doing(
    work: Callable[[], Awaitable[object]], seconds: float, excused: type[StoreError] = StoreError
) -> None:
    """Do it, with a pause before each time, until cancelled; what fails as `excused` is left for the next time."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except excused:
            continue
