"""The server's own limits over HTTP: exact under a burst, told apart from a tenant's, and before the body is read."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from promptd.tenancy import Budget, SlotPool
from tests.overload.conftest import Site, running
from tests.overload.wire import Reply, ask
from tests.patience import until
from tests.redis_server import running_redis

MODEL = "tiny-llama"
LIMIT = 10
FLOOD, OTHER, ADMIN = "key-of-the-flood", "key-of-the-other", "key-of-the-admin"
ASK = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 100, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def site(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server for two tenants that has ten requests open at most."""
    keys = SecretStr(f"flood:{FLOOD},other:{OTHER}")
    folder = tmp_path_factory.mktemp("caps")
    with running(model, folder, max_open_requests=LIMIT, max_num_seqs=4, api_keys=keys) as site:
        yield site


async def burst(sites: Sequence[Site], count: int, at_once: int) -> list[Reply]:
    """Send so many requests of one tenant, so many at once, to each server in turn."""
    turns = asyncio.Semaphore(at_once)

    async def one(site: Site) -> Reply:
        async with turns:
            return await ask(site.port, ASK, key=FLOOD)

    return await asyncio.gather(*(one(site) for site in itertools.islice(itertools.cycle(sites), count)))


def storm(site: Site, monkeypatch: pytest.MonkeyPatch, count: int, at_once: int) -> list[int]:
    """A burst; returns the most that was open at a time, as counted beside the budget, and what was answered 200."""
    peak, take = [0], Budget.take

    def counting(budget: Budget, tenant: str, number: int) -> None:
        take(budget, tenant, number)
        if budget is site.services.gate.budgets.requests:
            peak[0] = max(peak[0], sum(budget._held.values()))

    monkeypatch.setattr(Budget, "take", counting)
    replies = asyncio.run(burst([site], count, at_once))
    found = Counter(reply.status for reply in replies)
    assert set(found) == {200, 503}, found
    for reply in replies:
        if reply.status == 503:
            assert reply.code == "overloaded"
            assert 1 <= int(reply.headers["retry-after"]) <= 3
        else:
            assert json.loads(reply.body)["usage"]["completion_tokens"] == 100
    until(lambda: site.is_idle, "everything was given back")
    print(json.dumps({"requests": count, "answered": found[200], "most_open": peak[0], "limit": LIMIT}))
    return [peak[0], found[200]]


def test_a_burst_never_overshoots(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood gets 4/5 of the limit open at a time, exactly, and 503 with Retry-After beyond it."""
    most_open, _ = storm(site, monkeypatch, 150, 60)
    assert most_open == LIMIT * 4 // 5


@pytest.mark.long
def test_ten_thousand_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 requests, 400 at once: an overshoot of 0."""
    most_open, _ = storm(site, monkeypatch, 10_000, 400)
    assert most_open == LIMIT * 4 // 5


@pytest.mark.long
def test_ten_thousand_over_two_servers(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant's own cap over one Redis: 10,000 requests, 400 at once, to two servers; never one too many."""
    lock, is_open, most_open = threading.Lock(), Counter[int](), 0
    enter, leave = SlotPool.enter, SlotPool.leave

    async def entering(pool: SlotPool, tenant: str, limit: int) -> None:
        nonlocal most_open
        await enter(pool, tenant, limit)
        with lock:
            is_open[id(pool)] += 1
            most_open = max(most_open, is_open.total())

    def leaving(pool: SlotPool, tenant: str) -> None:
        with lock:  # counted as closed before it is: a request that takes its place is none too many
            is_open[id(pool)] -= 1
        leave(pool, tenant)

    monkeypatch.setattr(SlotPool, "enter", entering)
    monkeypatch.setattr(SlotPool, "leave", leaving)
    options = {"api_keys": SecretStr(f"flood:{FLOOD}"), "admin_key": SecretStr(ADMIN), "max_num_seqs": 4}
    with (
        running_redis(tmp_path / "redis") as redis,
        running(model, tmp_path, store=redis.url, **options) as one,
        running(model, tmp_path, store=redis.url, **options) as two,
    ):
        for site in (one, two):  # told to both: each hears of the other's within a second
            headers = {"Authorization": f"Bearer {ADMIN}"}
            limits = {"max_concurrent_requests": LIMIT}
            httpx.patch(f"{site.url}/admin/tenants/flood", json=limits, headers=headers).raise_for_status()
        replies = asyncio.run(burst([one, two], 10_000, 400))
        until(lambda: one.is_idle and two.is_idle, "everything was given back")
    found = Counter(reply.status for reply in replies)
    assert set(found) == {200, 429}, found
    assert {reply.code for reply in replies if reply.status == 429} == {"too_many_concurrent_requests"}
    print(json.dumps({"requests": len(replies), "answered": found[200], "most_open": most_open, "limit": LIMIT}))
    assert most_open == LIMIT and is_open.total() == 0


def test_refused_before_its_body_is_read(site: Site) -> None:
    """A full server answers to the headers alone; one whose share has room finds it, and its own limit is 429."""
    budgets = site.services.gate.budgets
    for _ in range(LIMIT * 4 // 5):
        budgets.requests.take("flood", 1)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {FLOOD}\r\n"
        with socket.create_connection(("127.0.0.1", site.port), timeout=30) as connection:
            connection.sendall((head + "Content-Type: application/json\r\nContent-Length: 900000\r\n\r\n").encode())
            answer = b""  # not a byte of the body was sent
            while b"}}" not in answer and (piece := connection.recv(1 << 16)):
                answer += piece
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after" in answer.lower()
        with httpx.Client(base_url=site.url, headers={"Authorization": f"Bearer {OTHER}"}, timeout=30) as other:
            assert other.post("/v1/completions", json=ASK).status_code == 200
            assert other.get("/v1/models").status_code == 200
    finally:
        budgets.requests.give_back("flood", LIMIT * 4 // 5)


def test_tokens_have_a_budget_too(site: Site) -> None:
    """What a request may write counts before it runs; more than there can ever be is an error that names the field."""
    budgets = site.services.gate.budgets
    with httpx.Client(base_url=site.url, headers={"Authorization": f"Bearer {FLOOD}"}, timeout=30) as http:
        held = budgets.tokens.most_for_one - 100
        budgets.tokens.take("flood", held)
        try:
            wide = http.post("/v1/completions", json={**ASK, "max_tokens": 200})
            assert (wide.status_code, wide.json()["error"]["code"]) == (503, "overloaded")
            assert http.post("/v1/completions", json={**ASK, "max_tokens": 24}).status_code == 200
        finally:
            budgets.tokens.give_back("flood", held)
        assert http.post("/v1/completions", json={**ASK, "max_tokens": 200}).status_code == 200
        never = http.post("/v1/completions", json={**ASK, "n": 16, "prompt": [[5, 6]] * 8, "max_tokens": 200})
        assert (never.status_code, never.json()["error"]["code"]) == (400, "too_much_at_once")
        assert never.json()["error"]["param"] == "max_tokens"
    until(lambda: site.is_idle, "everything was given back")
