"""What a Redis must promise before acknowledged writes are trusted to it."""

from __future__ import annotations

from collections.abc import Mapping

from promptd_store.errors import StoreUnavailableError
from promptd_store.redis_backend.link import RedisLink

OLDEST_VERSION = (7, 0)


async def faults(link: RedisLink, num_replicas: int) -> list[str]:
    """Return how this Redis could lose or refuse data, one clear line each; none where it is safe."""
    info = await info_of(link)
    found = []
    version = info.get("redis_version", "0.0")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_VERSION:
        found.append(f"Redis {version} is too old: 7.0 or newer is needed")
    if info.get("cluster_enabled") == "1":
        found.append("a Redis Cluster spreads keys that change together: use one primary, with Sentinel to replace it")
    if info.get("role") != "master":
        found.append("it is a read-only replica: name the primary, or use redis+sentinel://")
    if info.get("aof_enabled") != "1":
        found.append("no append-only file, so a restart loses what was acknowledged: set appendonly yes")
    elif info.get("aof_last_write_status", "ok") != "ok":
        found.append("its append-only file cannot be written: see its log and its disk")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        found.append(f"maxmemory-policy {policy} drops keys when memory is short: set maxmemory-policy noeviction")
    found += await _sync_faults(link)
    if int(info.get("connected_slaves", 0)) < num_replicas:
        found.append(
            f"{info.get('connected_slaves', 0)} replicas are connected, the address asks for replicas={num_replicas}"
        )
    return found


async def _sync_faults(link: RedisLink) -> list[str]:
    try:
        config = await _config(link, "appendfsync", "no-appendfsync-on-rewrite")
    except StoreUnavailableError:
        return ["appendfsync cannot be read: allow its user to (ACL: +config|get)"]
    found = []
    fsync = config.get("appendfsync")
    if fsync != "always":
        found.append(f"appendfsync {fsync} loses acknowledged writes at a power cut: set appendfsync always")
    if config.get("no-appendfsync-on-rewrite") == "yes":
        found.append("no-appendfsync-on-rewrite yes suspends appendfsync: set no-appendfsync-on-rewrite no")
    return found


async def _config(link: RedisLink, *names: str) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for name in names:
        answer = await link.command("CONFIG", "GET", name)
        pairs = answer.items() if isinstance(answer, dict) else zip(answer[::2], answer[1::2], strict=True)
        found.update({_text(key): _text(value) for key, value in pairs})
    return found


async def info_of(link: RedisLink) -> Mapping[str, str]:
    """Return what Redis says of itself."""
    answer = await link.command("INFO")
    if isinstance(answer, dict):  # redis-py has parsed it
        return {key: str(value) for key, value in answer.items()}
    lines = answer.decode().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
