"""One address, one store: a folder is the embedded one, a Redis URL the shared one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from promptd_store.base import Store
from promptd_store.embedded import EmbeddedStore
from promptd_store.errors import StoreAddressError
from promptd_store.objects import open_objects


async def open_store(
    address: str,
    *,
    blobs: str | None = None,
    allow_volatile: bool = False,
    on_fault: Callable[[str], None] = lambda fault: None,
) -> Store:
    """Open the store at a folder's path, or at `redis://`, `rediss://`, `redis+sentinel://`, `rediss+sentinel://`.

    `blobs`: folder or bucket for what is too large for Redis. A Redis that would lose data is refused, or with
    `allow_volatile` each of its faults told. The store belongs to the running event loop.
    """
    scheme, separator, _ = address.partition("://")
    if not separator:
        if blobs is not None:
            raise StoreAddressError("a store in a folder keeps its blobs there: blobs (PROMPTD_BLOBS) is for redis://")
        return await asyncio.to_thread(EmbeddedStore, Path(address))
    if scheme.removesuffix("+sentinel") not in ("redis", "rediss"):
        raise StoreAddressError(f"store {scheme}:// is neither a folder nor redis://, rediss:// or …+sentinel://")
    try:
        from promptd_store.redis_backend.store import RedisStore
    except ModuleNotFoundError as error:
        raise StoreAddressError("redis:// needs the package redis: pip install 'promptd[server]'") from error
    objects = None if blobs is None else await asyncio.to_thread(open_objects, blobs)
    return await RedisStore.open(address, objects=objects, allow_volatile=allow_volatile, on_fault=on_fault)


def is_shared(address: str) -> bool:
    """Whether an address is that of a server, not of a folder."""
    return "://" in address


def shown_address(address: str) -> str:
    """The address for people: a full path, or a URL without user and password."""
    if not is_shared(address):
        return str(Path(address).resolve())
    from promptd_store.redis_backend.target import parse_target

    return parse_target(address).shown
