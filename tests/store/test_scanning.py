"""Walks through a store leave time to whoever is served beside them."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import cast

import pytest
from promptd_store import Record, Store, scanning, show_records
from promptd_store.scanning import PAGE, SHOWN_AT_ONCE

pytestmark = pytest.mark.anyio


class Records:
    """A store that has so many."""

    def __init__(self, count: int) -> None:
        self._records = [Record(f"{{acme}}:{number:04}", b"x", "1") for number in range(count)]

    async def scan(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[Record]:
        """Return a page."""
        return [one for one in self._records if one.key.startswith(prefix) and one.key > after][:limit]


@pytest.mark.parametrize("share", [1.0, 0.25])
async def test_a_walk_takes_its_share(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Behind every few records the others have their turn, for as long as the share says; all records are shown."""
    count = PAGE + SHOWN_AT_ONCE
    pauses: list[float] = []

    async def noting(seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0)

    monkeypatch.setattr(scanning, "asyncio", SimpleNamespace(sleep=noting))
    seen: list[str] = []

    def look(record: Record) -> None:
        time.sleep(0.0001)
        seen.append(record.key)

    await show_records(cast(Store, Records(count)), "acme", look, share=share)
    assert len(set(seen)) == len(seen) == count
    assert len(pauses) == count // SHOWN_AT_ONCE
    shown = len(pauses) * SHOWN_AT_ONCE
    assert sum(pauses) >= 0.0001 * shown * (1 / share - 1) and (sum(pauses) > 0) == (share < 1)
