"""What is counted and timed as it happens, on a registry of its own. What is read at scrape time: `collectors`."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Iterator
from functools import cache
from itertools import accumulate

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from promptd.api.trail import spans_of
from promptd.engine.request import RequestTimings
from promptd.timed_store import OPERATIONS

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

_LAG_EVERY_SECONDS = 0.25
OVERLOAD_CODES = ("overloaded", "queue_full", "queue_timeout")
"""Codes of requests that this server had no room for; limits of a tenant have others."""
MAX_CODES = 150
"""Codes are ours and there are fewer; whatever were to come beyond counts as `other`."""

# A counter's fall tells that it began anew; a time beside each of them would double the series.
disable_created_metrics()  # type: ignore[no-untyped-call]


def make_registry() -> CollectorRegistry:
    """Return a registry with what there is to know of the process itself: memory, time, files, Python."""
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry


class StoreMetrics:
    """Every call of the store, by operation."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "promptd_store_seconds", "Time of a call of the store", ["operation"], registry=registry, buckets=_SECONDS
        )
        self._failures = Counter(
            "promptd_store_failures",
            "Calls that the store did not answer, or answered with damage",
            ["operation"],
            registry=registry,
        )
        for operation in OPERATIONS:  # there from the start: the first failure is an increase, no series comes later
            self._seconds.labels(operation)
            self._failures.labels(operation)

    def observe(self, operation: str, seconds: float, is_failure: bool) -> None:
        """Take in one call."""
        self._seconds.labels(operation).observe(seconds)
        if is_failure:
            self._failures.labels(operation).inc()


class HttpMetrics:
    """Every HTTP exchange, by route as the table writes it: what clients send never becomes a label."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._exchanges = Counter(
            "promptd_http_requests", "HTTP exchanges that ended", ["method", "route", "status"], registry=registry
        )
        self._rejected = Counter(
            "promptd_requests_rejected",
            "HTTP requests answered with an error, by its code",
            ["code"],
            registry=registry,
        )
        self._rejected_as = cache(self._rejected.labels)
        self._codes = set(OVERLOAD_CODES)
        for code in OVERLOAD_CODES:  # there from the start, so that the first one is an increase
            self._rejected_as(code)
        self._seconds = Histogram(
            "promptd_http_request_seconds",
            "Time from the first header to the last byte",
            ["route"],
            registry=registry,
            buckets=_SECONDS,
        )
        # a look by labels costs as much as all else; there are as many as routes and statuses
        self._exchanges_of, self._seconds_of = cache(self._exchanges.labels), cache(self._seconds.labels)

    def observe(self, method: str, route: str, status: int, seconds: float, error_code: str = "") -> None:
        """Take in one exchange; status 0 is a connection that ended before an answer began."""
        method = method if method in _METHODS else "other"
        self._exchanges_of(method, route, status).inc()
        self._seconds_of(route).observe(seconds)
        if error_code:
            if len(self._codes) < MAX_CODES:
                self._codes.add(error_code)
            self._rejected_as(error_code if error_code in self._codes else "other").inc()


class LoopMetrics:
    """How late the event loop is: what holds it up holds up every stream."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lag = Histogram(
            "promptd_event_loop_lag_seconds", "How late a timer fired", registry=registry, buckets=_SECONDS
        )
        self._ticked = time.monotonic()

    async def run(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_EVERY_SECONDS
            await asyncio.sleep(_LAG_EVERY_SECONDS)
            self._lag.observe(max(0.0, loop.time() - due))
            self._ticked = time.monotonic()

    def seconds_since_tick(self) -> float:
        """How long ago a timer fired, a quarter of a second or less where all is well. From any thread."""
        return time.monotonic() - self._ticked


class HousekeepingMetrics:
    """What the store's clean-up did."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._blobs = Counter("promptd_blobs_collected", "Unreferenced blobs deleted", registry=registry)
        self._events = Counter("promptd_events_trimmed", "Old events deleted", registry=registry)
        self._jobs = Counter("promptd_jobs_forgotten", "Old training jobs deleted", registry=registry)
        self._failures = Counter("promptd_housekeeping_failures", "Clean-ups that failed", registry=registry)

    def count(self, num_blobs: int, num_events: int, num_jobs: int) -> None:
        """Take in what was deleted for one tenant."""
        self._blobs.inc(num_blobs)
        self._events.inc(num_events)
        self._jobs.inc(num_jobs)

    def count_failure(self) -> None:
        """Take in a clean-up that did not reach its end."""
        self._failures.inc()


class TokenGaps(Collector):
    """The times between two tokens. A histogram of its own: it takes one in for every token that is written."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Take in one; on the event loop's thread."""
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[Metric]:
        """Yield the histogram."""
        bounds = [*map(str, map(float, _SECONDS)), "+Inf"]
        yield HistogramMetricFamily(
            "promptd_inter_token_latency_seconds",
            "Time from one token of an answer to its next",
            buckets=list(zip(bounds, map(float, accumulate(self._counts)), strict=True)),
            sum_value=self._sum,
        )


class RequestMetrics:
    """Latency histograms of finished requests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, registry=registry, buckets=_SECONDS)

        self._phases = {
            "queue": histogram("promptd_request_queue_seconds", "Time from arrival to a place in the batch"),
            "load": histogram("promptd_request_prompt_load_seconds", "Time until a request's prompts are resident"),
            "prefill": histogram("promptd_request_prefill_seconds", "Time from there to the first token"),
            "decode": histogram("promptd_request_decode_seconds", "Time from the first token to the last"),
        }
        self._first = histogram("promptd_time_to_first_token_seconds", "Time from arrival to the first token")
        self._whole = histogram("promptd_request_seconds", "Time from arrival to the end")

    def observe(self, timings: RequestTimings) -> None:
        """Take in one finished request."""
        for phase, begin, end in spans_of(timings):
            self._phases[phase].observe(end - begin)
        if timings.first_token is None or timings.finished is None:
            return
        self._first.observe(timings.first_token - timings.arrived)
        self._whole.observe(timings.finished - timings.arrived)
