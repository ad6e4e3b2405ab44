"""Which prompts are still of use: the ledger of use names them, day by day, so that nothing else is written down."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from promptd_store import Check, CheckFailedError, Put, Store, day_of, scan_records, scan_tenants
from promptd_store.names import PUBLIC_TENANT

from promptd.tenancy.usage import usage_key_prefix

DAY_SECONDS = 86400
SINCE_KEY = f"{{{PUBLIC_TENANT}}}:uses-since"
"""The first day from which the ledger names every prompt that was used, also those in front of others."""


async def note_beginning(store: Store, now: float) -> None:
    """Write down, once for a store, when uses began to be noted."""
    if await store.get(SINCE_KEY) is None:
        try:
            await store.transact([Check(SINCE_KEY, None)], [Put(SINCE_KEY, day_of(now).encode())])
        except CheckFailedError:
            return  # another server has


async def used_prompts(store: Store, unused_days: int, now: float) -> Mapping[str, set[str]] | None:
    """Return owner -> names of the prompts that anybody used today or on the `unused_days` days before.

    None where uses have not been noted for so long: then nothing is known to be unused.
    """
    first_day = day_of(now - unused_days * DAY_SECONDS)
    since = await store.get(SINCE_KEY)
    if since is None or since.value.decode() > first_day:
        return None
    used: defaultdict[str, set[str]] = defaultdict(set)
    async for tenant in scan_tenants(store):
        prefix = usage_key_prefix(tenant)
        async for stored in scan_records(store, prefix, after=f"{prefix}{first_day}"):
            owner, _, name = stored.key.removeprefix(prefix).split(":", 2)[2].rpartition("/")
            used[owner or tenant].add(name)
    return used
