"""Asks: a fixed number of requests open at once, warm-up, repeats."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence

from promptd.bench.report import BenchReport, RunSummary, Sample, summarize
from promptd.bench.target import Target
from promptd.bench.workload import BenchPrompt, BenchRequest, Workload, make_requests

_MEMORY_SECONDS = 0.5


async def run_bench(
    target: Target,
    workload: Workload,
    prompts: Sequence[BenchPrompt],
    *,
    num_warmups: int = 1,
    num_repeats: int = 3,
    on_run: Callable[[str, RunSummary], None] = lambda label, run: None,
) -> BenchReport:
    """Run the workload against the target; `on_run` hears of every run as it ends."""
    runs: list[RunSummary] = []
    try:
        await target.open(prompts)
        for number in range(num_warmups + num_repeats):
            requests = make_requests(workload, prompts, target.vocab_size, run=number)
            summary = await run_once(target, requests, workload.concurrency)
            is_warmup = number < num_warmups
            if not is_warmup:
                runs.append(summary)
            on_run(f"warm-up {number + 1}/{num_warmups}" if is_warmup else f"run {len(runs)}/{num_repeats}", summary)
    finally:
        await target.close()
    return BenchReport(target.description, workload, tuple(runs), num_warmups)


async def run_once(target: Target, requests: Sequence[BenchRequest], concurrency: int) -> RunSummary:
    """Answer all requests, `concurrency` of them open at any time."""
    before = await target.read()
    peak = [before.rss_bytes or 0]
    todo = iter(requests)
    memory = asyncio.create_task(_watch_memory(target, peak))
    began = time.perf_counter()
    try:
        answered = await asyncio.gather(*(_work(target, todo) for _ in range(concurrency)))
        seconds = time.perf_counter() - began
    finally:
        memory.cancel()
    after = await target.read()
    return summarize(
        [sample for samples in answered for sample in samples],
        seconds,
        prompt_cache_hits=_difference(before.prompt_cache_hits, after.prompt_cache_hits),
        prompt_cache_misses=_difference(before.prompt_cache_misses, after.prompt_cache_misses),
        peak_rss_bytes=max(*peak, after.rss_bytes or 0) or None,
    )


async def _work(target: Target, todo: Iterator[BenchRequest]) -> list[Sample]:
    """One of the clients: the next request as soon as the last one is answered."""
    return [await _ask(target, request) for request in todo]


async def _ask(target: Target, request: BenchRequest) -> Sample:
    sample = Sample(started=time.perf_counter())
    try:
        async for count in target.stream(request):
            sample.token_times += [time.perf_counter()] * count
    except Exception as error:  # noqa: BLE001 - a failed request is a result; the report shows it
        sample.error = f"{type(error).__name__}: {error}"
    return sample


async def _watch_memory(target: Target, peak: list[int]) -> None:
    while True:
        await asyncio.sleep(_MEMORY_SECONDS)
        reading = await target.read()
        peak.append(reading.rss_bytes or 0)


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before
