"""Servers that come and go behind a real HAProxy under streaming load: nobody's request is lost, or only its own."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.cluster.load import Load
from tests.haproxy import running_haproxy
from tests.redis_server import RedisServer
from tests.replicas import Replica, ReplicaForge, running_replicas

MODEL = "tiny-llama"


def test_a_server_leaves_in_order(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """SIGTERM: not ready, yet serving; then no longer listening; what runs is finished; the status is 0.

    Answers of a leaving server end their connections.
    """
    with running_replicas(forge, tmp_path, redis.url, 1, leave_seconds=1.0) as (replica,):
        with httpx.Client(base_url=replica.url, timeout=30) as http:
            body = {"model": MODEL, "prompt": "the quick", "max_tokens": 200, "stream": True, "ignore_eos": True}
            with http.stream("POST", "/v1/completions", json=body) as stream:
                lines = stream.iter_lines()
                next(lines)
                replica.signal(signal.SIGTERM)
                left, num_served = time.monotonic(), 0
                time.sleep(0.1)
                while time.monotonic() < left + 0.8:
                    assert httpx.get(f"{replica.url}/readyz").status_code == 503
                    answer = httpx.post(
                        f"{replica.url}/v1/completions", json={**body, "max_tokens": 1, "stream": False}
                    )
                    assert answer.status_code == 200 and answer.headers["connection"] == "close"
                    num_served += 1
                assert num_served
                assert list(lines)[-2:] in (["data: [DONE]", ""], ["", "data: [DONE]"])
        assert replica.wait() == 0


def test_a_second_signal_ends_it_at_once(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """Whoever asks twice means it."""
    with running_replicas(forge, tmp_path, redis.url, 1, leave_seconds=30.0) as (replica,):
        replica.signal(signal.SIGTERM)
        time.sleep(0.3)
        assert httpx.get(f"{replica.url}/readyz").status_code == 503
        started = time.monotonic()
        replica.signal(signal.SIGTERM)
        assert replica.wait() == -signal.SIGTERM and time.monotonic() - started < 2


async def rolling(load: Load, replicas: list[Replica], num_restarts: int, *, stop_at_fault: bool = False) -> None:
    """Restart one server after the other under load."""
    running = asyncio.create_task(load.run())
    await asyncio.sleep(1)
    for number in range(num_restarts):
        replica = replicas[number % len(replicas)]
        replica.signal(signal.SIGTERM)
        assert await asyncio.to_thread(replica.wait) == 0
        await asyncio.to_thread(replica.start().until_ready)
        await asyncio.sleep(0.8)  # HAProxy's next check finds it
        if stop_at_fault and load.faults:
            break
    load.is_stopping = True
    await running


def restart(forge: ReplicaForge, redis: RedisServer, folder: Path, num_restarts: int, num_clients: int) -> Load:
    """Rolling restarts of two servers; HAProxy sends nothing twice."""
    with (
        running_replicas(forge, folder, redis.url) as replicas,
        running_haproxy(folder, [replica.port for replica in replicas], retries=False) as url,
    ):
        load = Load(url, num_clients, MODEL)
        asyncio.run(rolling(load, replicas, num_restarts))
    times = sorted(one.ended - one.started for one in load.ended)
    print(f"{num_restarts} rolling restarts: {len(load.faults)} of {len(load.ended)} requests failed, "
          f"slowest {times[-1]:.2f} s")  # fmt: skip
    return load


def test_rolling_restarts_lose_nothing(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """Every request of 16 streaming clients is answered whole while both servers are restarted in turn."""
    load = restart(forge, redis, tmp_path, 2, 16)
    assert load.faults == [] and len(load.ended) >= 100


def test_control_leaving_at_once_loses_requests(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """Servers that close the door first fail requests: the same load finds it out."""
    with (
        running_replicas(forge, tmp_path, redis.url, leave_seconds=0) as replicas,
        running_haproxy(tmp_path, [replica.port for replica in replicas], retries=False) as url,
    ):
        load = Load(url, 16, MODEL, max_tokens=4)
        asyncio.run(rolling(load, replicas, 8, stop_at_fault=True))
    assert load.faults


@pytest.mark.long
def test_twenty_rolling_restarts(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """20 restarts, at least 2,000 requests, none lost."""
    load = restart(forge, redis, tmp_path, 20, 16)
    assert load.faults == [] and len(load.ended) >= 2000


async def killing(load: Load, replicas: list[Replica], num_kills: int) -> list[tuple[float, int]]:
    """Kill a server at a random moment, again and again; return when, and how many requests ran then."""
    dice, kills = random.Random(7), []
    running = asyncio.create_task(load.run())
    await asyncio.sleep(1)
    for _ in range(num_kills):
        replica = dice.choice(replicas)
        await asyncio.sleep(dice.random())
        replica.signal(signal.SIGKILL)
        kills.append((time.monotonic(), load.num_clients))
        assert await asyncio.to_thread(replica.wait) == -signal.SIGKILL
        await asyncio.sleep(1.5)
        await asyncio.to_thread(replica.start().until_ready)
        await asyncio.sleep(0.8)
    load.is_stopping = True
    await running
    return kills


def kill(forge: ReplicaForge, redis: RedisServer, folder: Path, num_kills: int) -> None:
    """SIGKILLs under load: only what ran on the server is lost, detectably, and new requests are fine after 1 s."""
    with (
        running_replicas(forge, folder, redis.url) as replicas,
        running_haproxy(folder, [replica.port for replica in replicas]) as url,
    ):
        load = Load(url, 8, MODEL)
        kills = asyncio.run(killing(load, replicas, num_kills))
    late = [one for one in load.faults if all(not killed - 60 < one.started < killed + 1.0 for killed, _ in kills)]
    late += [one for one in load.faults if any(killed + 1.0 < one.started < killed + 1.5 for killed, _ in kills)]
    print(
        f"{num_kills} SIGKILLs: {len(load.faults)} of {len(load.ended)} requests failed, {len(late)} of them new ones"
    )
    assert late == []
    assert len(load.faults) <= num_kills * load.num_clients
    assert len(load.ended) >= 20 * num_kills


def test_a_killed_server_takes_only_its_own_requests(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """Two SIGKILLs: what was streaming there breaks off without [DONE]; whoever comes a second later is served."""
    kill(forge, redis, tmp_path, 2)


@pytest.mark.long
def test_twenty_kills(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """The same, twenty times."""
    kill(forge, redis, tmp_path, 20)
