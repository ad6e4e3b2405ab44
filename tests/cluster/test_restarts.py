"""Servers that come and go behind a real HAProxy under streaming load: nobody's request is lost, or only its own."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from pathlib import Path

import httpx
import pytest
import typer.testing

from promptd.api.leaving import Leaving
from promptd.cli import app
from promptd.errors import ConflictError
from tests.cluster.load import Ended, Load
from tests.haproxy import HAProxy, running_haproxy
from tests.patience import PATIENCE_SECONDS, until
from tests.redis_server import RedisServer
from tests.replicas import Replica, ReplicaForge, running_replicas

MODEL = "tiny-llama"


def test_a_server_leaves_in_order(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """SIGTERM: not ready, yet serving; then no longer listening; what runs is finished; the status is 0.

    Answers of a leaving server end their connections.
    """
    with running_replicas(forge, tmp_path, redis.url, 1, leave_seconds=3.0) as (replica,):
        with httpx.Client(base_url=replica.url, timeout=PATIENCE_SECONDS) as http:
            body = {"model": MODEL, "prompt": "the quick", "max_tokens": 200, "stream": True, "ignore_eos": True}
            with http.stream("POST", "/v1/completions", json=body) as stream:
                lines = stream.iter_lines()
                next(lines)
                replica.signal(signal.SIGTERM)
                until(lambda: replica.status == 503)
                short = {**body, "max_tokens": 1, "stream": False}
                answer = httpx.post(f"{replica.url}/v1/completions", json=short, timeout=PATIENCE_SECONDS)
                assert answer.status_code == 200 and answer.headers["connection"] == "close"
                assert list(lines)[-2:] in (["data: [DONE]", ""], ["", "data: [DONE]"])
        assert replica.wait() == 0


def test_a_second_signal_ends_it_at_once(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """Whoever asks twice means it."""
    with running_replicas(forge, tmp_path, redis.url, 1, leave_seconds=3600.0) as (replica,):
        replica.signal(signal.SIGTERM)
        until(lambda: replica.status == 503)
        replica.signal(signal.SIGTERM)
        assert replica.wait() == -signal.SIGTERM


def test_an_operator_drains_a_server(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """`promptd drain` is the signal's first half: not ready, yet serving; it can be taken back until the signal comes.

    With --wait it ends when nothing runs and every balancer has had its time; one that cannot be in time says so.
    """
    with running_replicas(forge, tmp_path, redis.url, 1, leave_seconds=0.5) as (replica,):
        terminal = typer.testing.CliRunner()

        def drain(*words: str) -> typer.testing.Result:
            return terminal.invoke(app, ["drain", *words, "--url", replica.url])

        with httpx.Client(base_url=replica.url, timeout=PATIENCE_SECONDS) as http:
            body = {"model": MODEL, "prompt": "the quick", "max_tokens": 1}
            begun = drain()
            assert begun.exit_code == 0 and begun.stderr == "draining: 0 requests running, 0 waiting\n"
            assert http.get("/readyz").status_code == 503
            answer = http.post("/v1/completions", json=body)
            assert answer.status_code == 200 and answer.headers["connection"] == "close"
            assert drain("--undo").stderr.startswith("serving: ")
            assert http.get("/readyz").status_code == 200
            assert "connection" not in http.post("/v1/completions", json=body).headers
            endless = {**body, "max_tokens": 400, "stream": True, "ignore_eos": True}
            with http.stream("POST", "/v1/completions", json=endless) as stream:
                next(stream.iter_lines())
                assert drain("--wait", "0.001").exit_code == 1
            waited = drain("--wait", "60")
            assert waited.exit_code == 0 and http.get("/admin/drain").json()["seconds"] >= 0.5
        replica.signal(signal.SIGTERM)
        assert replica.wait() == 0


def test_a_drained_server_need_not_wait_again() -> None:
    """What it has said no for already counts; after a signal there is no way back."""
    fresh, drained = Leaving(), Leaving()
    assert fresh.seconds is None and not fresh.has_begun
    assert 0 < fresh.end(1000) <= 1000
    drained.begin()
    since = time.monotonic()
    while time.monotonic() == since:
        pass
    assert drained.end(1e-9) == 0.0
    with pytest.raises(ConflictError):
        drained.take_back()


async def rolling(
    load: Load, replicas: list[Replica], proxy: HAProxy, num_restarts: int, *, until_fault: bool = False
) -> None:
    """Restart one server after the other under load; each waits until HAProxy has the one before back."""
    running = asyncio.create_task(load.run())
    await load.until_more()
    for number in range(num_restarts):
        at = number % len(replicas)
        replicas[at].signal(signal.SIGTERM)
        assert await asyncio.to_thread(replicas[at].wait) == 0
        await asyncio.to_thread(replicas[at].start().until_ready)
        await asyncio.to_thread(proxy.until_up, at)
        await load.until_more()
        if until_fault and load.faults:
            break
    load.is_stopping = True
    await running


def restart(replicas: list[Replica], folder: Path, num_restarts: int, num_clients: int) -> Load:
    """Rolling restarts of two servers; HAProxy sends nothing twice."""
    with running_haproxy(folder, [replica.port for replica in replicas], retries=False) as proxy:
        load = Load(proxy.url, num_clients, MODEL)
        asyncio.run(rolling(load, replicas, proxy, num_restarts))
    times = sorted(one.ended - one.started for one in load.ended)
    print(f"{num_restarts} rolling restarts: {len(load.faults)} of {len(load.ended)} requests failed, "
          f"slowest {times[-1]:.2f} s")  # fmt: skip
    return load


def test_rolling_restarts_lose_nothing(replicas: list[Replica], tmp_path: Path) -> None:
    """Every request of 16 streaming clients is answered whole while both servers are restarted in turn."""
    load = restart(replicas, tmp_path, 2, 16)
    assert load.faults == [] and len(load.ended) >= 3 * 16


def test_metrics_stay_inside(replicas: list[Replica], tmp_path: Path) -> None:
    """However their path is spelled; the server itself takes each spelling."""
    with running_haproxy(tmp_path, [replica.port for replica in replicas], retries=False) as proxy:
        for path in ("/metrics", "/metrics?", "/%6detrics", "/m%65tric%73"):
            assert "promptd_event_loop_lag" in httpx.get(replicas[0].url + path).text, path
            refused = httpx.get(proxy.url + path)
            assert refused.status_code == 404 and "promptd_" not in refused.text, path


def test_control_leaving_at_once_loses_requests(forge: ReplicaForge, redis: RedisServer, tmp_path: Path) -> None:
    """Servers that close the door first fail requests: the same load finds it out."""
    with (
        running_replicas(forge, tmp_path, redis.url, leave_seconds=0) as replicas,
        running_haproxy(tmp_path, [replica.port for replica in replicas], retries=False) as proxy,
    ):
        load = Load(proxy.url, 16, MODEL, max_tokens=4)
        asyncio.run(rolling(load, replicas, proxy, 20, until_fault=True))
    assert load.faults


@pytest.mark.long
def test_twenty_rolling_restarts(replicas: list[Replica], tmp_path: Path) -> None:
    """20 restarts, at least 2,000 requests, none lost."""
    load = restart(replicas, tmp_path, 20, 16)
    assert load.faults == [] and len(load.ended) >= 2000


async def killing(load: Load, replicas: list[Replica], proxy: HAProxy, num_kills: int) -> list[float]:
    """Kill a server at a random moment, again and again, the other one being up; return when."""
    dice, kills = random.Random(7), []
    running = asyncio.create_task(load.run())
    for _ in range(num_kills):
        await load.until_more()
        at = dice.randrange(len(replicas))
        await asyncio.sleep(dice.random() / 2)
        kills.append(time.monotonic())
        replicas[at].signal(signal.SIGKILL)
        assert await asyncio.to_thread(replicas[at].wait) == -signal.SIGKILL
        await load.until_more(since=kills[-1] + 1)
        await asyncio.to_thread(replicas[at].start().until_ready)
        await asyncio.to_thread(proxy.until_up, at)
    load.is_stopping = True
    await running
    return kills


def late(load: Load, kills: list[float]) -> list[Ended]:
    """The failed requests that no kill explains: they began a second after it, or later."""
    return [one for one in load.faults if not any(one.started < at + 1 and one.ended > at for at in kills)]


def kill(replicas: list[Replica], folder: Path, num_kills: int) -> None:
    """SIGKILLs under load: only what ran on the server is lost, detectably, and new requests are fine after 1 s."""
    with running_haproxy(folder, [replica.port for replica in replicas]) as proxy:
        load = Load(proxy.url, 8, MODEL)
        kills = asyncio.run(killing(load, replicas, proxy, num_kills))
    new = late(load, kills)
    print(f"{num_kills} SIGKILLs: {len(load.faults)} of {len(load.ended)} requests failed, {len(new)} of them new ones")
    assert new == []
    assert len(load.faults) <= num_kills * load.num_clients
    assert len(load.ended) >= 2 * num_kills * load.num_clients


def test_a_killed_server_takes_only_its_own_requests(replicas: list[Replica], tmp_path: Path) -> None:
    """A SIGKILL: what was streaming there breaks off without [DONE]; whoever comes a second later is served."""
    kill(replicas, tmp_path, 1)


@pytest.mark.long
def test_twenty_kills(replicas: list[Replica], tmp_path: Path) -> None:
    """The same, twenty times."""
    kill(replicas, tmp_path, 20)


@pytest.mark.long
def test_control_without_checks_new_requests_fail(replicas: list[Replica], tmp_path: Path) -> None:
    """A balancer that never asks its servers goes on sending to the dead one: the same look finds it out."""
    ports = [replica.port for replica in replicas]
    with running_haproxy(tmp_path, ports, retries=False, checks=False) as proxy:
        load = Load(proxy.url, 8, MODEL)
        kills = asyncio.run(killing(load, replicas, proxy, 1))
    assert late(load, kills)
