"""What HTTP, metrics and traces add to the engine: the same requests to it in this process and to a server, in turn."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import httpx

from promptd.bench import EngineTarget, Lengths, Workload
from promptd.bench.report import Sample
from promptd.bench.workload import BenchPrompt, BenchRequest, make_requests
from tests.bench.book import Book, Row
from tests.bench.models import folder_of, frozen
from tests.bench.rows import make_engine
from tests.bench.scale import Scale
from tests.bench.server import serving
from tests.collector import Collector

FIRST_TARGET_MS, TOKEN_TARGET = 5.0, 0.05
ROWS = (1, 32)
ENGINE, SERVER, TRACED = "engine", "server", "server, traced"


class LeanTarget:
    """A server that is asked with as little work as can be: its client runs on the same cores."""

    def __init__(self, url: httpx.URL) -> None:
        self._host, self._port = url.host, url.port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def stream(self, request: BenchRequest) -> AsyncIterator[int]:
        """Yield the number of new tokens, event by event."""
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        asked = {"prompt": request.token_ids, "max_tokens": request.max_tokens, "temperature": 0, "ignore_eos": True}
        body = json.dumps(asked | {"stream": True, "return_token_ids": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if b" 200 " not in (status := await reader.readline()):
            raise RuntimeError(f"the server answered {status.decode()}")
        async for line in reader:
            if line.startswith(b"data: [DONE]"):
                break
            if line.startswith(b"data: "):
                _, _, ids = line.partition(b'"token_ids":[')
                ids = ids.partition(b"]")[0]
                yield ids.count(b",") + 1 if ids else 0
        await reader.readuntil(b"0\r\n\r\n")
        self._idle.append((reader, writer))

    async def close(self) -> None:
        """Hang up."""
        for _, writer in self._idle:
            writer.close()
            await writer.wait_closed()


def check_http_path(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Time to the first token and between tokens through HTTP, with traces and without, against the engine's own."""
    rows = []
    for name in scale.latency_models:
        key = f"http_path/{name}"
        missing = scale.num_path_rounds - len(book.series(f"{key}/{ROWS[-1]}/{TRACED}/first_ms"))
        if missing > 0:
            folder, sizes = folder_of(name, root), ("--max-num-seqs", str(max(ROWS)))
            with (
                Collector() as collector,
                serving(folder, None, *sizes) as (plain, _),
                serving(folder, None, *sizes, "--traces", collector.url) as (traced, _),
            ):
                urls = {SERVER: plain.base_url, TRACED: traced.base_url}
                asyncio.run(_rounds(scale, book, key, folder, urls, missing))
                if "decode" not in collector.names():
                    raise RuntimeError("no trace has come: tracing was not on")
        rows += [_row(book, f"{key}/{count}", name, count, TRACED) for count in ROWS]
        rows += [_row(book, f"{key}/{count}", name, count, SERVER) for count in ROWS]
    return rows


async def _rounds(
    scale: Scale, book: Book, key: str, folder: Path, urls: dict[str, httpx.URL], num_rounds: int
) -> None:
    model = frozen(folder)
    longest = max(ROWS) * 2 * (scale.input_tokens + scale.output_tokens)
    engine = EngineTarget(
        make_engine(model, max_num_seqs=max(ROWS), text_tokens=2 * longest, prompt_tokens=64, prefix_caching=True)
    )
    await engine.open([])
    targets: dict[str, EngineTarget | LeanTarget] = {ENGINE: engine}
    targets |= {label: LeanTarget(url) for label, url in urls.items()}
    try:
        for number in range(num_rounds + 1):
            for count in ROWS:
                order = list(targets)[number % 3 :] + list(targets)[: number % 3]
                for place, label in enumerate(order):  # everyone gets texts of its own, so that none is in a cache
                    run = 3 * (number * len(ROWS) + ROWS.index(count)) + place
                    samples = await _answers(targets[label], _requests(scale, count, model.spec.vocab_size, run), count)
                    if number:  # the first warms up
                        first, token = _times(samples)
                        book.add(f"{key}/{count}/{label}/first_ms", [first])
                        book.add(f"{key}/{count}/{label}/token_ms", [token])
    finally:
        for target in targets.values():
            await target.close()


def _requests(scale: Scale, count: int, vocab_size: int, run: int) -> list[BenchRequest]:
    """Answers of various lengths: rows leave and come one by one, while the others go on."""
    text, half = Lengths(scale.input_tokens, scale.input_tokens), scale.output_tokens // 2
    asked = Workload(
        num_requests=max(2 * count, 6), input_tokens=text, output_tokens=Lengths(half, 2 * half), concurrency=count
    )
    return make_requests(asked, [BenchPrompt(None, "none")], vocab_size, run=run)


async def _answers(
    target: EngineTarget | LeanTarget, requests: Sequence[BenchRequest], concurrency: int
) -> list[Sample]:
    """Have all answered, so many at once."""
    todo, samples = iter(requests), []

    async def client(todo: Iterator[BenchRequest]) -> None:
        for request in todo:
            sample = Sample(time.perf_counter())
            async for num in target.stream(request):
                sample.token_times += [time.perf_counter()] * num
            if len(sample.token_times) != request.max_tokens:
                raise RuntimeError(f"{len(sample.token_times)} tokens came, {request.max_tokens} were asked for")
            samples.append(sample)

    await asyncio.gather(*(client(todo) for _ in range(concurrency)))
    return samples


def _times(samples: Sequence[Sample]) -> tuple[float, float]:
    """Median milliseconds to the first token, and a token behind it."""
    times = [(one.started, one.token_times[0], one.token_times[-1], len(one.token_times) - 1) for one in samples]
    first = statistics.median(first - started for started, first, _, _ in times)
    return 1e3 * first, 1e3 * statistics.median((last - first) / more for _, first, last, more in times)


def _row(book: Book, key: str, name: str, count: int, label: str) -> Row:
    firsts, tokens = (
        {one: book.series(f"{key}/{one}/{kind}_ms") for one in (ENGINE, label)} for kind in ("first", "token")
    )
    added = statistics.median(mine - bare for bare, mine in zip(*firsts.values(), strict=True))
    share = statistics.median(mine / bare for bare, mine in zip(*tokens.values(), strict=True)) - 1
    shown = [{one: statistics.median(values) for one, values in kind.items()} for kind in (firsts, tokens)]
    is_target = label == TRACED
    return Row(
        f"what HTTP and metrics{' and traces' * is_target} add to the engine, {count} rows, {name}",
        f"<= {FIRST_TARGET_MS:g} ms, <= {TOKEN_TARGET:.0%} a token" if is_target else "",
        f"{added:+.1f} ms to the first token ({shown[0][label]:.1f} : {shown[0][ENGINE]:.1f}), {share:+.1%} a token "
        f"({shown[1][label]:.2f} : {shown[1][ENGINE]:.2f} ms; {len(firsts[ENGINE])} rounds)",
        (added <= FIRST_TARGET_MS and share <= TOKEN_TARGET) if is_target else None,
    )
