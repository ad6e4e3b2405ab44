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


@pytest.fixture(scope="package")
def standing(forge: ReplicaForge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Replica]]:
    """Two servers that stay for several tests."""
    folder = tmp_path_factory.mktemp("standing")
    with running_redis(folder / "redis") as redis, running_replicas(forge, folder, redis.url) as two:
        yield two


@pytest.fixture
def replicas(standing: list[Replica]) -> list[Replica]:
    """Two ready servers over a Redis that nobody touches; tests end and start them as they like."""
    for replica in standing:
        replica.revive()
    return standing
