"""Clients that go away, in every phase of a request: the row is gone at the next step, and nothing is left of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from promptd.engine.async_engine import AsyncEngine
from promptd.engine.engine import Engine
from tests.overload.conftest import Site, running
from tests.overload.wire import request_bytes
from tests.patience import until

MODEL = "tiny-llama"
READ = {"model": MODEL, "prompt": list(range(5, 205)), "max_tokens": 8, "ignore_eos": True}
WRITE = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 240, "ignore_eos": True}
PHASES = ("body", "queued", "prefill", "decode", "unary")


@pytest.fixture(scope="module")
def site(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two rows at a time and texts read in many steps: requests wait, and read for long."""
    folder = tmp_path_factory.mktemp("gone")
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "enable_prefix_caching": False, "max_queue": 400}
    with running(model, folder, **options) as site:
        yield site


class Witness:
    """Counts, for every request that is aborted, the steps that begin after the abort while its row still exists."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        self.phases = Counter[str]()
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()
        ask, drop, step = AsyncEngine.abort, Engine.abort, Engine.step

        def asked(engine: AsyncEngine, request_id: str) -> None:
            seq = engine.engine._sequences.get(request_id)
            if seq is not None:
                phase = "queued" if seq.scheduled is None else "decode" if seq.is_decoding else "prefill"
                self.phases[phase] += 1
                with self._lock:
                    self._open[request_id] = 0
            ask(engine, request_id)

        def dropped(engine: Engine, request_id: str) -> None:
            drop(engine, request_id)
            with self._lock:
                if request_id in self._open:
                    self.steps.append(self._open.pop(request_id))

        def stepped(engine: Engine) -> Any:
            with self._lock:
                for request_id in self._open:
                    self._open[request_id] += 1
            return step(engine)

        monkeypatch.setattr(AsyncEngine, "abort", asked)
        monkeypatch.setattr(Engine, "abort", dropped)
        monkeypatch.setattr(Engine, "step", stepped)


def is_read(site: Site, prompt: list[int]) -> bool:
    """Whether a row with this text is being read now."""
    rows = [seq for seq in list(site.services.engine.engine._sequences.values()) if list(seq.token_ids[:200]) == prompt]
    return any(seq.scheduled is not None and not seq.is_decoding for seq in rows)


async def leave(site: Site, number: int, dice: random.Random) -> None:
    """Begin one request and close its connection in one phase of it."""
    phase = PHASES[number % len(PHASES)]
    prompt = [5 + number % 100] * 200
    body = {**({**READ, "prompt": prompt} if phase == "prefill" else WRITE), "stream": phase != "unary"}
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    sent = request_bytes(body)
    writer.write(sent[: -len(sent) // 3] if phase == "body" else sent)
    if phase == "decode":  # the first token has come; where others run, that takes a while
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"data: ")
    elif phase == "prefill" and dice.random() < 0.5:  # at that moment; the others whenever it is
        for _ in range(2000):  # where the moment was missed it leaves later
            if is_read(site, prompt):
                break
            await asyncio.sleep(0.001)
    else:
        await asyncio.sleep(dice.uniform(0, 0.05))
    writer.transport.abort()


def storm(site: Site, monkeypatch: pytest.MonkeyPatch, count: int) -> Witness:
    """So many clients that leave, 20 at once; then everything is as it was before."""
    services, dice = site.services, random.Random(3)

    async def main() -> None:
        turns = asyncio.Semaphore(20)

        async def one(number: int) -> None:
            async with turns:
                await leave(site, number, dice)

        await asyncio.gather(*(one(number) for number in range(count)))

    until(lambda: site.is_idle, "idle before")
    num_files, num_threads = psutil.Process().num_fds(), threading.active_count()
    with monkeypatch.context() as patched:
        witness = Witness(patched)
        asyncio.run(main())
        until(lambda: site.is_idle, "nothing is left of those who left")
    until(lambda: psutil.Process().num_fds() <= num_files, "their connections are closed")
    services.engine.engine.check_integrity()
    assert threading.active_count() <= num_threads + 4  # the event loop's pool for longer texts
    assert len(services.engine._streams) == 0
    print(json.dumps({"left": count, "phases": witness.phases, "steps": Counter(witness.steps)}))
    return witness


def test_those_who_leave_leave_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting, reading and writing rows are gone before a second step begins; all that they held is free."""
    witness = storm(site, monkeypatch, 100)
    assert witness.steps and max(witness.steps) <= 1
    assert set(witness.phases) == {"queued", "prefill", "decode"}


@pytest.mark.long
def test_two_thousand_leave(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 of them."""
    witness = storm(site, monkeypatch, 2000)
    assert witness.steps and max(witness.steps) <= 1
    assert set(witness.phases) == {"queued", "prefill", "decode"}
