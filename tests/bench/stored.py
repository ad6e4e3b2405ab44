"""A server over very many stored prompts: what a cold one costs, and what their number costs a request."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from promptd_store import BaseModelSpec, EmbeddedStore, PromptCatalog, encode

from promptd.bench.report import percentile
from promptd.modeling import load_model
from promptd.settings import DEFAULT_TENANT
from tests.bench.book import Book, Row
from tests.bench.models import folder_of, frozen
from tests.bench.rows import fresh_tokens
from tests.bench.scale import Scale
from tests.bench.server import first_event, serving

VIRTUAL_TOKENS, TEXT_TOKENS = 8, 32
COLD_TARGET_MS, COUNT_TARGET = 20.0, 0.03
ZIPF_EXPONENT, NUM_CLIENTS = 1.0, 8
_AT_ONCE = 64
_REST_SECONDS = 0.02
"""Before each request: the threads of the server that answered before spin for a while, and it is another one."""
_CACHE_BYTES = 32 << 20
"""Some hundreds of the embedded model's prompts: less than are asked for."""


def check_stored(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Cold against warm, many stored against few, and Zipf-distributed names."""
    name = scale.latency_models[0]
    key = f"stored/{scale.num_stored}"
    if book.fact(key) is None:
        folder = folder_of(name, root)
        spec = frozen(folder).spec
        few, many = prepare(scale, root)
        arguments = ("--prompt-cache-bytes", str(_CACHE_BYTES))
        with serving(folder, few, *arguments) as (http_few, _), serving(folder, many, *arguments) as (http_many, _):
            counts = _count_pairs(scale, spec, http_few, http_many)
            cold = _cold_pairs(scale, spec, http_many)
            zipf = _zipf(scale, spec, http_many)
        book.note(key, {**counts, **cold, **zipf})
    found = book.fact(key)
    more = found["seconds_ratio"] - 1
    return [
        Row(
            f"a request with {scale.num_stored:,} stored prompts : {scale.num_few_stored}, {name}",
            f"within {COUNT_TARGET:.0%}",
            f"{more:+.1%} (medians of {found['num_pairs']} pairs; {found['many_ms']:.2f} : {found['few_ms']:.2f} ms)",
            more <= COUNT_TARGET,
        ),
        Row(
            f"time to first token of a cold prompt less a warm one's, over HTTP, {name}",
            f"<= {COLD_TARGET_MS:g} ms",
            f"{found['cold_added_ms']:+.1f} ms ({found['cold_ms']:.1f} : {found['warm_ms']:.1f} ms)",
            found["cold_added_ms"] <= COLD_TARGET_MS,
        ),
        Row(
            f"Zipf over {scale.num_stored:,} stored prompts, {NUM_CLIENTS} clients, {name}",
            "",
            f"{found['requests_per_second']:.0f} requests/s, first token p50 {found['first_p50_ms']:.0f}, "
            f"p99 {found['first_p99_ms']:.0f} ms; {found['new_share']:.0%} of requests were a prompt's first",
        ),
    ]


def prepare(scale: Scale, root: Path) -> tuple[Path, Path]:
    """Return the stores of few and of many prompts; an interrupted filling goes on."""
    name = scale.latency_models[0]
    spec = load_model(folder_of(name, root)).spec
    few, many = (root / "stores" / f"{name}-{count}" for count in (scale.num_few_stored, scale.num_stored))
    asyncio.run(_fill(spec, few, scale.num_few_stored))
    asyncio.run(_fill(spec, many, scale.num_stored))
    return few, many


async def _fill(spec: BaseModelSpec, folder: Path, count: int) -> None:
    noted = folder.with_name(f"{folder.name}.json")
    done = json.loads(noted.read_text()) if noted.exists() else 0
    if done >= count:
        return
    store = EmbeddedStore(folder)
    try:
        catalog = PromptCatalog(store, spec)
        for start in range(done, count, _AT_ONCE):
            numbers = range(start, min(count, start + _AT_ONCE))
            contents = [encode("soft", _vectors(spec, number)).content for number in numbers]
            work = (
                catalog.publish(DEFAULT_TENANT, f"p{number}", content)
                for number, content in zip(numbers, contents, strict=True)
            )
            await asyncio.gather(*work)
            noted.write_text(json.dumps(numbers[-1] + 1))
    finally:
        await store.close()


def _vectors(spec: BaseModelSpec, number: int) -> torch.Tensor:
    return 0.1 * torch.randn(VIRTUAL_TOKENS, spec.hidden_size, generator=torch.Generator().manual_seed(number))


def _count_pairs(scale: Scale, spec: BaseModelSpec, few: httpx.Client, many: httpx.Client) -> dict[str, Any]:
    """The same request to both servers, in turn, over names that both have in memory."""
    names = [f"p{number}" for number in range(min(50, scale.num_few_stored))]
    for name in names * 2:
        for http in (few, many):
            first_event(http, fresh_tokens(TEXT_TOKENS, spec.vocab_size), name)
    times: dict[str, list[float]] = {"few": [], "many": []}
    for at in range(scale.num_stored_requests):
        text, name = fresh_tokens(TEXT_TOKENS, spec.vocab_size), names[at % len(names)]
        pair = (("few", few), ("many", many))
        for label, http in pair if at % 2 else reversed(pair):
            time.sleep(_REST_SECONDS)
            times[label].append(first_event(http, text, name))
    few_ms, many_ms = (statistics.median(times[label]) for label in ("few", "many"))
    pairs = len(times["few"])
    return {"seconds_ratio": many_ms / few_ms, "num_pairs": pairs, "few_ms": few_ms, "many_ms": many_ms}


def _cold_pairs(scale: Scale, spec: BaseModelSpec, http: httpx.Client) -> dict[str, Any]:
    """A prompt that was never asked for, and one that was just before, in turn."""
    cold, warm = [], []
    for at in range(scale.num_cold_pairs):
        name = f"p{scale.num_stored - 1 - at}"
        first, again = (first_event(http, fresh_tokens(TEXT_TOKENS, spec.vocab_size), name) for _ in range(2))
        cold.append(first)
        warm.append(again)
    added = statistics.median(mine - other for mine, other in zip(cold, warm, strict=True))
    return {"cold_ms": statistics.median(cold), "warm_ms": statistics.median(warm), "cold_added_ms": added}


def _zipf(scale: Scale, spec: BaseModelSpec, http: httpx.Client) -> dict[str, Any]:
    """Some clients at once, each with one request after another."""
    rng = random.Random(0)
    weights = [1 / (rank + 1) ** ZIPF_EXPONENT for rank in range(scale.num_stored)]
    drawn = rng.choices(range(scale.num_stored), weights, k=scale.num_stored_requests)
    asked = [(fresh_tokens(TEXT_TOKENS, spec.vocab_size), f"p{number}") for number in drawn]
    began = time.perf_counter()
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        firsts = list(clients.map(lambda one: first_event(http, *one), asked))
    seconds = time.perf_counter() - began
    return {
        "requests_per_second": len(asked) / seconds,
        "new_share": len(set(drawn)) / len(drawn),
        **{f"first_p{at}_ms": percentile(firsts, at / 100) for at in (50, 99)},
    }
