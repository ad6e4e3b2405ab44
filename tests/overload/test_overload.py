"""Far more work than a server can do: it does what it can, says no to the rest at once, and is well again soon."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.family_models import write_model
from tests.overload.wire import Reply, ask
from tests.patience import until
from tests.replicas import Replica, ReplicaForge
from tests.tiny_models import VOCAB_SIZE, make_tokenizer

ROWS = 8


@dataclass
class Storm:
    """What one run of open-loop arrivals came to."""

    replies: list[Reply] = field(default_factory=list)
    faults: list[BaseException] = field(default_factory=list)

    def count(self, status: int) -> int:
        """How many had one status."""
        return sum(reply.status == status for reply in self.replies)

    def seconds(self, status: int) -> list[float]:
        """How long each with a status took, shortest first."""
        return sorted(reply.seconds for reply in self.replies if reply.status == status)


async def arrive(port: int, body: dict[str, Any], rate: float, seconds: float, storm: Storm) -> None:
    """Send requests at random moments, so many a second whatever becomes of them, and await all."""
    dice, tasks = random.Random(11), []

    async def one() -> None:
        try:
            storm.replies.append(await ask(port, body))
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as fault:
            storm.faults.append(fault)

    at = end = time.monotonic()
    end += seconds
    while (at := at + dice.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        tasks.append(asyncio.create_task(one()))
    await asyncio.gather(*tasks)


async def capacity(port: int, body: dict[str, Any], seconds: float) -> float:
    """Requests a second that clients get who wait for each answer, as many as there are rows."""
    end, done = time.monotonic() + seconds, 0

    async def one() -> None:
        nonlocal done
        while time.monotonic() < end:
            assert (await ask(port, body)).status == 200
            done += time.monotonic() < end

    await asyncio.gather(*(one() for _ in range(ROWS)))
    return done / seconds


def gauges(url: str) -> dict[str, float]:
    """What the server says that it holds."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if line.startswith("promptd_")}


def is_idle(url: str) -> bool:
    """Whether it holds nothing."""
    found = gauges(url)
    names = ("promptd_requests_running", "promptd_requests_waiting", 'promptd_budget_used{budget="requests"}')
    return not any(found[name] for name in names)


def check_replies(storm: Storm) -> None:
    """Only answers and refusals, and every refusal says when to come again and why."""
    assert storm.faults == []
    assert {reply.status for reply in storm.replies} <= {200, 429, 503}
    for reply in storm.replies:
        if reply.status != 200:
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.code in ("overloaded", "queue_full")


def on(replica: Replica, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run against one started server."""
    try:
        replica.start().until_ready()
        asyncio.run(work())
    finally:
        replica.close()


def test_more_than_it_can_do(forge: ReplicaForge, tmp_path: Path) -> None:
    """400 requests at once for room of 14: each is answered or refused in order, and then nothing is held."""
    replica = Replica(forge, tmp_path, str(tmp_path / "store"), max_num_seqs=4, max_queue=10)
    body = {"model": "tiny-llama", "prompt": [5, 6, 7], "max_tokens": 60, "ignore_eos": True}

    async def main() -> None:
        storm = Storm()
        await arrive(replica.port, body, rate=4000, seconds=0.1, storm=storm)
        check_replies(storm)
        assert storm.count(503) > storm.count(200) >= 14
        until(lambda: is_idle(replica.url), "idle")
        assert (await ask(replica.port, body)).status == 200

    on(replica, main)


def make_model(folder: Path) -> Path:
    """A Llama whose steps cost more than HTTP does."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return write_model(lambda: LlamaForCausalLM(config), make_tokenizer(), folder)


@pytest.mark.long
def test_ten_times_too_much(tmp_path: Path) -> None:
    """30 s at ten times what it can do, then 0.8 times: goodput, refusals, memory, and how soon it is well again."""
    forge = ReplicaForge(make_model(tmp_path / "llama"))
    caches = {"kv_cache_bytes": 64 << 20, "prompt_cache_bytes": 1 << 20}  # full before the storm: its memory is its own
    replica = Replica(forge, tmp_path, str(tmp_path / "store"), max_num_seqs=ROWS, max_queue=2 * ROWS, **caches)
    body = {"model": "llama", "prompt": list(range(5, 37)), "max_tokens": 24, "ignore_eos": True}

    async def main() -> None:
        assert replica.pid is not None
        await capacity(replica.port, body, 5)
        peak = await capacity(replica.port, body, 20)
        process, storm, after = psutil.Process(replica.pid), Storm(), Storm()
        before = process.memory_info().rss
        await arrive(replica.port, body, 10 * peak, 30, storm)
        flooded = process.memory_info().rss
        began = time.monotonic()
        await arrive(replica.port, body, 0.8 * peak, 20, after)
        check_replies(storm)
        check_replies(after)
        in_time = [reply for reply in storm.replies if reply.status == 200]
        goodput = sum(reply.ended < min(r.sent for r in storm.replies) + 30 for reply in in_time) / 30
        refused = storm.seconds(503)
        ill = [reply.sent - began for reply in after.replies if reply.status != 200]
        print(json.dumps({
            "peak_per_s": round(peak, 2), "offered_per_s": round(len(storm.replies) / 30, 1),
            "statuses": Counter(reply.status for reply in storm.replies),
            "goodput_ratio": round(goodput / peak, 3), "refusal_p50_ms": round(1e3 * refused[len(refused) // 2], 1),
            "refusal_p99_ms": round(1e3 * refused[int(len(refused) * 0.99)], 1),
            "rss_grew_mb": round((flooded - before) / 1e6, 1), "last_refusal_after_s": round(max(ill, default=0), 2),
        }))  # fmt: skip
        assert goodput >= 0.9 * peak
        assert refused[int(len(refused) * 0.99)] <= 0.05
        assert max(ill, default=0) <= 5

    try:
        on(replica, main)
    finally:
        forge.close()
