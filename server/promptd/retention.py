"""What of the prompts is not kept for ever: as the settings, or `promptd store gc`, say."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from promptd_store import Store, prune_unused, prune_versions

from promptd.tenancy import used_prompts
from promptd.tenancy.uses import DAY_SECONDS


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was deleted of one tenant's prompts."""

    names: list[str]
    versions: list[str]
    """As `name@number`."""


class Retention:
    """One round over a store. `keep_versions` of each name stay; names that nobody used for `unused_days` go."""

    def __init__(
        self,
        store: Store,
        *,
        keep_versions: int | None,
        unused_days: int | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._keep_versions = keep_versions
        self._unused_days = unused_days
        self._now = clock()
        self._used: Mapping[str, set[str]] | None = None

    async def look(self) -> bool:
        """Read what was used; False where it is not known for long enough, and then no name will go."""
        if self._unused_days is not None:
            self._used = await used_prompts(self._store, self._unused_days, self._now)
        return self._unused_days is None or self._used is not None

    async def apply(self, tenant: str) -> Pruned:
        """Delete what is not kept of one tenant's prompts."""
        names: list[str] = []
        versions: list[str] = []
        if self._used is not None and self._unused_days is not None:
            not_since = self._now - (self._unused_days + 1) * DAY_SECONDS  # days are whole, and today is none of them
            names = await prune_unused(self._store, tenant, used=self._used.get(tenant, ()), not_since=not_since)
        if self._keep_versions is not None:
            versions = await prune_versions(self._store, tenant, keep=self._keep_versions)
        return Pruned(names, versions)
