"""What resident prompts cost, and that nothing grows. Each measurement has a process of its own."""

from __future__ import annotations

import ctypes
import gc
import itertools
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import torch

from tests.bench.book import Book, Row
from tests.bench.models import folder_of, frozen
from tests.bench.rows import fresh_tokens, make_engine, prefixes, request, run, soft_prompts
from tests.bench.scale import Scale

OVERHEAD_TARGET = 0.05
GROWTH_TARGET_BYTES = 4 << 20
"""Less than one byte in a hundred of the process; the allocator's own noise is of this size."""
_WARM_PROMPTS = 4
_GROWTH_VIRTUAL_TOKENS, _GROWTH_TEXT_TOKENS, _GROWTH_OUTPUT_TOKENS = 8, 12, 4


def rss_bytes() -> int:
    """Return this process's resident memory, after giving back what nobody uses."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def _apart(work: Callable[..., dict[str, float]], *args: object) -> dict[str, float]:
    """Run in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def check_resident_bytes(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Memory of resident prompts against the bytes of their keys and values: by the engine's account, and by RSS."""
    rows = []
    for name, kind in itertools.product(scale.latency_models, ("soft", "prefix")):
        key = f"resident_bytes/{name}/{kind}"
        if book.fact(key) is None:
            book.note(key, _apart(measure_resident, name, kind, scale, root))
        found = book.fact(key)
        for label, field in (("by account", "counted"), ("by RSS", "rss")):
            extra = found[field] / found["kv"] - 1
            rows.append(
                Row(
                    f"{scale.num_resident} resident {kind} prompts, {name}, {label}",
                    f"<= K/V + {OVERHEAD_TARGET:.0%}",
                    f"K/V {extra:+.1%} ({found[field] / 1e6:.1f} : {found['kv'] / 1e6:.1f} MB)",
                    extra <= OVERHEAD_TARGET,
                )
            )
    return rows


def measure_resident(name: str, kind: str, scale: Scale, root: Path) -> dict[str, float]:
    """Make prompts resident, one after the other, keeping nothing of them here; return bytes."""
    torch.set_num_threads(1)
    model = frozen(folder_of(name, root))
    spec, count, size = model.spec, scale.num_resident, scale.virtual_tokens
    engine = make_engine(model, text_tokens=1024, prompt_tokens=(count + _WARM_PROMPTS) * size)

    def use(number: int) -> None:
        for _ in range(number):
            (prompt,) = soft_prompts(1, size, spec.hidden_size) if kind == "soft" else prefixes(1, size, model)
            run(engine, [request(fresh_tokens(8, spec.vocab_size), 2, prompt)])

    use(_WARM_PROMPTS)
    before, counted = rss_bytes(), engine.prompts.num_bytes
    use(count)
    kv = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * model.dtype.itemsize * size * count
    return {"kv": kv, "counted": engine.prompts.num_bytes - counted, "rss": rss_bytes() - before}


def check_growth(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Memory after many requests over more prompts than fit, against a fifth of the way there."""
    if book.fact("growth") is None:
        book.note("growth", _apart(measure_growth, scale, root))
    found = book.fact("growth")
    grown = found["end"] - found["early"]
    return [
        Row(
            f"memory after {scale.num_growth_requests:,} requests over {scale.num_growth_prompts} prompts, "
            f"budget for {scale.num_growth_budget}",
            f"no growth (<= {GROWTH_TARGET_BYTES >> 20} MiB)",
            f"{grown / 1e6:+.2f} MB of {found['end'] / 1e6:.0f} MB after the first fifth; "
            f"{found['resident']:.0f} resident, {found['evictions']:.0f} evictions",
            grown <= GROWTH_TARGET_BYTES and found["resident"] <= scale.num_growth_budget,
        )
    ]


def measure_growth(scale: Scale, root: Path) -> dict[str, float]:
    """Serve the requests in turn over the prompts, so that each is evicted before it comes again."""
    torch.set_num_threads(1)
    model = frozen(folder_of("tiny", root))
    vocab_size = model.spec.vocab_size
    soft = soft_prompts(scale.num_growth_prompts // 2, _GROWTH_VIRTUAL_TOKENS, model.spec.hidden_size)
    library = soft + prefixes(scale.num_growth_prompts - len(soft), _GROWTH_VIRTUAL_TOKENS, model)
    engine = make_engine(
        model,
        max_num_seqs=min(16, scale.num_growth_budget),
        text_tokens=2048,
        prompt_tokens=scale.num_growth_budget * _GROWTH_VIRTUAL_TOKENS,
        prefix_caching=True,
    )
    early, done, batch = 0, 0, 20
    while done < scale.num_growth_requests:
        chosen = [library[(done + at) * 7 % len(library)] for at in range(batch)]
        asked = [request(fresh_tokens(_GROWTH_TEXT_TOKENS, vocab_size), _GROWTH_OUTPUT_TOKENS, p) for p in chosen]
        run(engine, asked)
        done += batch
        if done >= scale.num_growth_requests // 5 and not early:
            early = rss_bytes()
    engine.check_integrity()
    stats = engine.stats()
    if stats.requests_finished != done:
        raise RuntimeError(f"{done} requests were made, {stats.requests_finished} finished")
    return {
        "early": early,
        "end": rss_bytes(),
        "resident": stats.prompts_resident,
        "evictions": stats.prompt_cache_evictions,
    }
