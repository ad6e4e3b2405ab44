"""What a person waits for in the console, and what a scrape and a list cost over thousands of prompts and tenants."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from promptd.demo import DEMO_MODEL_PATH
from tests.bench.book import Book, Row
from tests.bench.models import folder_of
from tests.bench.scale import Scale
from tests.bench.server import serving
from tests.console.browser import NoBrowserError, launched
from tests.console.visitor import SHIFT
from tests.redis_server import running_redis

PAINT_TARGET_SECONDS = 1.0
WEIGHT_TARGET_KB = 300
SHIFT_TARGET = 0.1
SCRAPE_TARGET_MS = PAGE_TARGET_MS = 50.0
MAX_SERIES = 5000
# The first contentful paint of a load, in seconds, as https://www.w3.org/TR/paint-timing/ counts it.
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"


def check_console(scale: Scale, book: Book, root: Path) -> list[Row]:
    """First paint and weight of a cold load of the playground, and how far it moves: nothing in the browser's cache."""
    missing = scale.num_paints - len(book.series("console/paint_seconds"))
    if missing > 0:
        try:
            with serving(DEMO_MODEL_PATH) as (http, _), launched() as browser:
                for _ in range(missing):
                    paint, kilobytes, shift = _cold_load(browser, str(http.base_url.join("/ui/")))
                    book.add("console/paint_seconds", [paint])
                    book.add("console/kb", [kilobytes])
                    book.add("console/shift", [shift])
        except NoBrowserError as error:
            return [Row("first paint of the console", f"<= {PAINT_TARGET_SECONDS:g} s", f"not measured: {error}")]
    paint = statistics.median(book.series("console/paint_seconds"))
    kilobytes, shift = max(book.series("console/kb")), max(book.series("console/shift"))
    return [
        Row(
            "first paint of the console, cold",
            f"<= {PAINT_TARGET_SECONDS:g} s",
            f"{paint:.2f} s (median of {len(book.series('console/paint_seconds'))})",
            paint <= PAINT_TARGET_SECONDS,
        ),
        Row("its weight", f"<= {WEIGHT_TARGET_KB} kB", f"{kilobytes:.0f} kB", kilobytes <= WEIGHT_TARGET_KB),
        Row("its layout shift", f"<= {SHIFT_TARGET}", f"{shift:.3f}", shift <= SHIFT_TARGET),
    ]


def _cold_load(browser: Any, url: str) -> tuple[float, float, float]:
    """Seconds to the first paint, kilobytes, and layout shift."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    page = context.new_page()
    sizes: list[int] = []
    page.on("response", lambda reply: sizes.append(int(reply.headers.get("content-length", "0"))))
    page.goto(url)
    page.wait_for_selector(".answer")
    found = page.evaluate(PAINT), sum(sizes) / 1000, page.evaluate(SHIFT)
    context.close()
    return found


def check_listing(scale: Scale, book: Book, root: Path) -> list[Row]:
    """A scrape, a page of the list and a search with many prompts and tenants, in the embedded store and in Redis."""
    if not book.series("listing/scrape_ms"):
        with serving(folder_of("tiny", root)) as (http, _):
            for number in range(scale.num_listed_tenants):
                http.patch(f"/admin/tenants/tenant-{number}", json={"weight": 2}).raise_for_status()
            _publish(scale, http)
            for number in range(0, scale.num_listed_prompts, max(1, scale.num_listed_prompts // 200)):
                body = {"model": f"user-{number:05}", "prompt": "a", "max_tokens": 1}
                http.post("/v1/completions", json=body).raise_for_status()
            scrape = http.get("/metrics").text
            book.note("listing/series", sum(1 for line in scrape.splitlines() if not line.startswith("#")))
            for _ in range(scale.num_scrapes):
                book.add("listing/scrape_ms", [_milliseconds(lambda: http.get("/metrics"))])
            _read(scale, book, http, "embedded")
    if not book.series("listing/redis/page_ms"):
        with (
            tempfile.TemporaryDirectory() as own,
            running_redis(Path(own)) as redis,
            serving(folder_of("tiny", root), redis.url) as (http, _),
        ):
            _publish(scale, http)
            _read(scale, book, http, "redis")
    what = f"{scale.num_listed_prompts:,} prompts and {scale.num_listed_tenants:,} tenants"
    median, series = statistics.median(book.series("listing/scrape_ms")), book.fact("listing/series")
    rows = [
        Row(f"scrape with {what}", f"<= {SCRAPE_TARGET_MS:g} ms", f"{median:.1f} ms", median <= SCRAPE_TARGET_MS),
        Row("series of that scrape", f"<= {MAX_SERIES}", str(series), series <= MAX_SERIES),
    ]
    for store in ("embedded", "redis"):
        page, search = (statistics.median(book.series(f"listing/{store}/{kind}_ms")) for kind in ("page", "search"))
        rows.append(
            Row(
                f"a page of 50 of {scale.num_listed_prompts:,} prompts, a search in them, {store} store",
                f"<= {PAGE_TARGET_MS:g} ms",
                f"{page:.1f} ms, {search:.1f} ms",
                max(page, search) <= PAGE_TARGET_MS,
            )
        )
    return rows


def _publish(scale: Scale, http: httpx.Client) -> None:
    for number in range(scale.num_listed_prompts):
        http.put(f"/v1/prompts/user-{number:05}", json={"text": f"As user {number}."}).raise_for_status()


def _read(scale: Scale, book: Book, http: httpx.Client, store: str) -> None:
    """Pages that begin anywhere, and searches for what a few names have."""
    dice = random.Random(0)
    for _ in range(scale.num_scrapes):
        number = dice.randrange(scale.num_listed_prompts)
        page = {"limit": 50, "after": f"user-{number:05}"}
        search = {"limit": 50, "search": f"{number:05}"[1:]}
        book.add(f"listing/{store}/page_ms", [_milliseconds(partial(http.get, "/v1/prompts", params=page))])
        book.add(f"listing/{store}/search_ms", [_milliseconds(partial(http.get, "/v1/prompts", params=search))])


def _milliseconds(call: Callable[[], httpx.Response]) -> float:
    began = time.perf_counter()
    call().raise_for_status()
    return 1e3 * (time.perf_counter() - began)
