"""A number that a tenant may have of something on all servers together, of which each server holds a part.

The parts lie in one record of the store, each with a time until when: a server that is killed holds its own no longer
than that. The record is changed by compare-and-set, so the sum of all parts is never above the number.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from promptd_store import Check, CheckFailedError, Put, Store, StoreUnavailableError

HOLD_SECONDS = 15.0
"""How long a part is a server's own that does not say so again."""
LOOK_SECONDS = 0.1
"""How long nobody looks again whether others have given something back: a flood of refusals costs few looks."""
MAX_TRIES = 1000


@dataclass(slots=True)
class Part:
    """What this server holds of one tenant's number."""

    held: int = 0
    until: float = 0.0
    others: int = 0
    """What all other servers held when they were last looked at."""
    looked_at: float = float("-inf")


class PartedNumber:
    """Takes and gives back parts; one call for a tenant at a time. `key_of` names a tenant's record."""

    def __init__(
        self, store: Store, server_id: str, key_of: Callable[[str], str], clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._server_id = server_id
        self._key_of = key_of
        self._clock = clock

    async def hold(self, tenant: str, part: Part, wanted: int, used: int = 0, limit: int | None = None) -> int:
        """Hold so many, or what others leave of the limit, or at least what is in use of it; return how many."""
        part.held = min(part.held, wanted)  # at once: what is given back nobody takes here any more
        now = self._clock()
        is_fresh = now - part.looked_at < LOOK_SECONDS and now < part.until
        if limit is not None and is_fresh and limit - part.others <= part.held < wanted:
            return part.held
        key = self._key_of(tenant)
        for _ in range(MAX_TRIES):
            now = self._clock()
            stored = await self._store.get(key)
            plain: Mapping[str, tuple[int, float]] = {} if stored is None else json.loads(stored.value)
            others = {one: held for one, held in plain.items() if one != self._server_id and held[1] > now}
            num_others = sum(held[0] for held in others.values())
            free = wanted if limit is None else max(0, limit - num_others)
            granted = max(min(wanted, free), min(used, part.held))
            until = now + HOLD_SECONDS
            mine = {self._server_id: (granted, until)} if granted else {}
            checks = [Check(key, None if stored is None else stored.etag)]
            try:
                if others or mine:
                    await self._store.transact(checks, [Put(key, json.dumps({**others, **mine}).encode())])
                elif stored is not None:
                    await self._store.transact(checks, deletes=[key])
            except CheckFailedError:
                continue
            part.held, part.until, part.others, part.looked_at = granted, until, num_others, now
            return granted
        raise StoreUnavailableError(f"{key} is changed by too many servers at once")
