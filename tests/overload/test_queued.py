"""How many of a tenant's requests may wait, over HTTP: one number for all servers over one Redis."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from promptd.engine.engine import Engine
from promptd.engine.request import Output
from tests.overload.conftest import Site, running
from tests.overload.wire import Reply, ask
from tests.patience import until
from tests.redis_server import running_redis

TENANT_KEY, ADMIN_KEY = "key-of-the-tenant", "key-of-the-admin"
ASK = {"model": "tiny-llama", "prompt": [5, 6, 7], "max_tokens": 100, "ignore_eos": True}
LIMIT, NUM_EACH = 3, 12


class Brake:
    """Engines that make no step but those that the test lets them make."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._allowed = defaultdict[int, threading.Semaphore](lambda: threading.Semaphore(0))
        self._made = Counter[int]()
        step = Engine.step

        def braked(engine: Engine) -> list[Output]:
            self._allowed[id(engine)].acquire()
            outputs = step(engine)
            self._made[id(engine)] += 1
            return outputs

        monkeypatch.setattr(Engine, "step", braked)

    def let_step(self, site: Site) -> None:
        """Let one engine make one step, and wait until it has and the store has answered what it asked for."""
        engine, lines = site.services.engine.engine, site.services.gate.places._lines
        before = self._made[id(engine)]
        self._allowed[id(engine)].release()
        until(lambda: self._made[id(engine)] > before, "the step is made")
        until(lambda: not any(line.is_asking for line in list(lines.values())), "the store has answered")

    @contextmanager
    def released_after(self, *sites: Site) -> Iterator[None]:
        """Let the engines of these go at the block's end."""
        try:
            yield
        finally:
            for site in sites:
                self._allowed[id(site.services.engine.engine)].release(1_000_000)


def test_one_number_over_two_servers(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 at once two run and three wait, whichever servers they came to; 429 with Retry-After for the others."""
    options = {"api_keys": SecretStr(f"acme:{TENANT_KEY}"), "admin_key": SecretStr(ADMIN_KEY), "max_num_seqs": 1}
    with (
        running_redis(tmp_path / "redis") as redis,
        running(model, tmp_path, store=redis.url, **options) as one,
        running(model, tmp_path, store=redis.url, **options) as two,
        ThreadPoolExecutor(1) as clients,
    ):
        for site in (one, two):
            headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
            limits = {"max_queued_requests": LIMIT}
            httpx.patch(f"{site.url}/admin/tenants/acme", json=limits, headers=headers).raise_for_status()
        brake = Brake(monkeypatch)

        async def burst() -> list[Reply]:
            ports = [one.port, two.port] * NUM_EACH
            return await asyncio.gather(*(ask(port, ASK, key=TENANT_KEY) for port in ports))

        with brake.released_after(one, two):
            answers = clients.submit(asyncio.run, burst())
            for site in (one, two):
                until(lambda site=site: len(site.services.engine._streams) == NUM_EACH, "all are there")  # type: ignore[misc]
            for _ in range(4):  # take in and ask; be told; refuse; nothing changes any more
                for site in (one, two):
                    brake.let_step(site)
            queues = [site.services.engine.engine.scheduler for site in (one, two)]
            assert [len(queue.running) for queue in queues] == [1, 1]
            assert sum(queue.waiting.num_waiting("acme") for queue in queues) == LIMIT
        replies = answers.result(timeout=120)
        until(lambda: one.is_idle and two.is_idle, "everything was given back")
    assert Counter(reply.status for reply in replies) == {200: 2 + LIMIT, 429: 2 * NUM_EACH - 2 - LIMIT}
    for reply in replies:
        if reply.status == 429:
            assert (reply.code, reply.headers["retry-after"]) == ("too_many_queued_requests", "1")
