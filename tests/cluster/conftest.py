"""Two servers over one real Redis, made once and used by several tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.redis_server import RedisServer, running_redis
from tests.replicas import Replica, ReplicaForge, running_replicas


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of this test's own, to be killed and stopped."""
    with running_redis(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def replicas(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> Iterator[list[Replica]]:
    """Two ready servers over that Redis, which give up on its answers after half a second."""
    with running_replicas(forge, tmp_path, f"{redis.url}?socket_timeout=0.5") as two:
        yield two
