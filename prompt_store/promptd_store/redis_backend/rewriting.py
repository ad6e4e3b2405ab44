"""What was deleted leaves Redis' own files when it writes them anew: the append-only file, and a dump if it has one."""

from __future__ import annotations

import asyncio
import time

from promptd_store.errors import StoreError
from promptd_store.redis_backend.durability import info_of
from promptd_store.redis_backend.link import RedisLink

REWRITE_SECONDS = 60.0
"""How long a rewriting is waited for; it goes on by itself."""
POLL_SECONDS = 0.05
_IN_PROGRESS = (
    "aof_rewrite_in_progress", "aof_rewrite_scheduled", "rdb_bgsave_in_progress"
)  # fmt: skip


async def rewrite(link: RedisLink, deleted_key: str) -> bool:
    """Write both files anew if anything was deleted; False where Redis does not let us, or is not done in time."""
    num_deleted = int(await link.command("GET", deleted_key) or 0)
    if not num_deleted:
        return True
    until = time.monotonic() + REWRITE_SECONDS
    try:
        if not await _idle(link, until):  # one that runs already may have begun before the deletion
            return False
        info = await info_of(link)
        if info.get("aof_enabled") == "1":
            await link.command("BGREWRITEAOF")
            if not await _idle(link, until) or (await info_of(link)).get("aof_last_bgrewrite_status") != "ok":
                return False
        if int(info.get("rdb_saves", 0)) or int(info.get("rdb_last_load_keys_loaded", 0)):  # there is a dump
            await link.command("BGSAVE")
            if not await _idle(link, until) or (await info_of(link)).get("rdb_last_bgsave_status") != "ok":
                return False
    except StoreError:  # its user may not (ACL: +bgrewriteaof +bgsave), or another rewriting came in between
        return False
    await link.command("DECRBY", deleted_key, num_deleted)
    return True


async def _idle(link: RedisLink, until: float) -> bool:
    while time.monotonic() < until:
        info = await info_of(link)
        if all(info.get(name, "0") == "0" for name in _IN_PROGRESS):
            return True
        await asyncio.sleep(POLL_SECONDS)
    return False
