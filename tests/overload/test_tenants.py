"""One tenant floods, another asks now and then, over HTTP: what the second one feels, and what it can tell."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sklearn.metrics import roc_auc_score

from promptd.engine.engine import Engine
from promptd.engine.request import Output
from promptd.engine.sequence import Sequence
from tests.overload.conftest import Site, running
from tests.overload.storm import storm_client
from tests.overload.wire import Reply, ask
from tests.patience import PATIENCE_SECONDS, until

MODEL = "tiny-llama"
FLOOD, OTHER = "key-of-the-flood", "key-of-the-other"
LONG = {"model": MODEL, "prompt": list(range(5, 105)), "max_tokens": 100, "ignore_eos": True}
SHORT = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 1, "ignore_eos": True, "stream": True}
MINUTE_SECONDS = 70
KEYS = SecretStr(f"flood:{FLOOD},other:{OTHER}")


@pytest.fixture(scope="module")
def site(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server for two tenants."""
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_queue": 128, "api_keys": KEYS}
    with running(model, tmp_path_factory.mktemp("tenants"), **options) as site:
        yield site


class Steps:
    """Counts, for each request of a tenant, the engine's steps from its arrival to its first token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tenant: str) -> None:
        self.taken: list[int] = []
        self._began: dict[str, int] = {}
        enqueue, step = Engine.enqueue, Engine.step

        def enqueued(engine: Engine, seq: Sequence) -> None:
            if seq.request.share.key == tenant:
                self._began[seq.request.request_id] = engine.counters.steps
            enqueue(engine, seq)

        def stepped(engine: Engine) -> list[Output]:
            outputs = step(engine)
            for output in outputs:
                began = self._began.pop(output.request_id, None)
                if began is not None:
                    self.taken.append(engine.counters.steps - began)
            return outputs

        monkeypatch.setattr(Engine, "enqueue", enqueued)
        monkeypatch.setattr(Engine, "step", stepped)


@contextmanager
def flooded(site: Site, at_once: int) -> Iterator[None]:
    """For a block, one tenant has so many long requests open, all the time."""
    stop = threading.Event()

    async def one() -> None:
        while not stop.is_set():
            await ask(site.port, LONG, key=FLOOD)

    async def main() -> None:
        await asyncio.gather(*(one() for _ in range(at_once)))

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    try:
        until(lambda: len(site.services.engine.engine.scheduler.waiting) > at_once // 2, "the flood is there")
        yield
    finally:
        stop.set()
        thread.join(2 * PATIENCE_SECONDS)
        until(lambda: site.is_idle, "the flood has gone")


def probe(site: Site, count: int, pause: float, body: dict[str, Any] = SHORT, key: str = OTHER) -> list[Reply]:
    """Ask so often, one after the other."""

    async def main() -> list[Reply]:
        replies = []
        for _ in range(count):
            replies.append(await ask(site.port, body, key=key))
            await asyncio.sleep(pause)
        return replies

    return asyncio.run(main())


def test_beside_a_flood(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first token comes at most two steps later than alone; the flood waits meanwhile, and nobody is refused."""
    steps = Steps(monkeypatch, "other")
    probe(site, 5, 0.0)
    alone = max(steps.taken)
    steps.taken.clear()
    with flooded(site, 24):
        replies = probe(site, 12, 0.0)
        # Control: behind the flood it would have waited for all of these.
        until(lambda: len(site.services.engine.engine.scheduler.waiting) > 10, "the flood waits")
    assert {reply.status for reply in replies} == {200}
    print(json.dumps({"steps_alone": alone, "steps_beside": sorted(steps.taken)}))
    assert max(steps.taken) <= alone + 2


@contextmanager
def flooded_from_outside(site: Site, at_once: int) -> Iterator[None]:
    """The same by a process of its own: the interpreter is the server's alone."""
    scheduler = site.services.engine.engine.scheduler
    with storm_client() as client:
        order = {"at_once": at_once, "key": FLOOD}
        thread = threading.Thread(target=lambda: client.ask(site.port, LONG, MINUTE_SECONDS, **order), daemon=True)
        thread.start()
        until(lambda: len(scheduler.running) + len(scheduler.waiting) > at_once // 2, "the flood is there")
        yield
        assert thread.is_alive()
        thread.join(2 * MINUTE_SECONDS)
        until(lambda: site.is_idle, "the flood has gone")


@pytest.mark.long
def test_a_minute_beside_a_flood(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 at once against one request a second, a minute each, in seconds and in steps.

    Beside them as beside two, which is what they are to have of four rows.
    """
    steps = Steps(monkeypatch, "other")
    before = sorted(reply.first - reply.sent for reply in probe(site, 60, 0.2))
    alone = max(steps.taken)
    steps.taken.clear()
    with flooded_from_outside(site, 64):
        began = site.services.engine.stats().steps
        at = time.monotonic()
        beside = sorted(reply.first - reply.sent for reply in probe(site, 60, 1.0))
        step_seconds = (time.monotonic() - at) / (site.services.engine.stats().steps - began)
    with flooded_from_outside(site, 2):
        held = sorted(reply.first - reply.sent for reply in probe(site, 60, 1.0))
    p99 = [round(1e3 * times[int(0.99 * len(times))], 1) for times in (before, beside, held)]
    print(json.dumps({
        "ttft_p99_ms_alone": p99[0], "ttft_p99_ms_beside": p99[1], "ttft_p99_ms_beside_its_share": p99[2],
        "step_ms": round(1e3 * step_seconds, 1), "steps_alone": alone, "steps_beside_max": max(steps.taken),
    }))  # fmt: skip
    assert max(steps.taken) <= alone + 2
    assert p99[1] <= 1.5 * p99[2]


@pytest.mark.long
def test_nothing_to_be_told_by_the_clock(model: Path, tmp_path: Path) -> None:
    """500 texts, half of them asked for by another tenant just before: seconds to the first token tell nothing of it.

    The control asks again under the same key, and knows.
    """
    dice = random.Random(17)
    with running(model, tmp_path, max_num_batched_tokens=32, api_keys=KEYS) as site:

        def area(attacker: str) -> float:
            truth: list[bool] = []
            seen: list[float] = []
            for _ in range(500):
                texts = [[dice.randrange(1, 300) for _ in range(200)] for _ in range(2)]
                had_asked = dice.random() < 0.5
                probe(site, 1, 0.0, {**SHORT, "prompt": texts[0] if had_asked else texts[1]}, FLOOD)
                (reply,) = probe(site, 1, 0.0, {**SHORT, "prompt": texts[0]}, attacker)
                truth.append(had_asked)
                seen.append(reply.sent - reply.first)
            return float(roc_auc_score(truth, seen))

        other, own = area(OTHER), area(FLOOD)
    print(json.dumps({"trials": 500, "auc_of_another_tenant": round(other, 3), "auc_of_the_same": round(own, 3)}))
    assert other <= 0.55 and own >= 0.9
