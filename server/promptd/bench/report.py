"""What came of a benchmark: one summary a run, medians over the runs, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import promptd
from promptd.bench.workload import Workload

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 1
_MILLI = 1e3
_MEGA = 1e6


@dataclass(slots=True)
class Sample:
    """One request: when it was sent and when each of its tokens came, in seconds on this process's clock."""

    started: float
    token_times: list[float] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run over all requests. Latencies in milliseconds, None where no request got so far."""

    seconds: float
    num_requests: int
    num_failed: int
    output_tokens: int
    output_tokens_per_second: float
    requests_per_second: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    inter_token_p50_ms: float | None
    inter_token_p99_ms: float | None
    prompt_cache_hits: int | None
    prompt_cache_misses: int | None
    peak_rss_bytes: int | None
    first_error: str | None = None


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All runs of one benchmark."""

    target: str
    workload: Workload
    runs: tuple[RunSummary, ...]
    num_warmups: int

    def median(self, name: str) -> float | None:
        """Return the median over the runs of one field of `RunSummary`; None where a run has none."""
        values = [getattr(run, name) for run in self.runs]
        return None if not values or None in values else statistics.median(values)

    @property
    def num_failed(self) -> int:
        """Requests that ended with an error, over all runs."""
        return sum(run.num_failed for run in self.runs)

    def to_json(self) -> dict[str, Any]:
        """Everything, for other programs."""
        names = [f.name for f in dataclasses.fields(RunSummary) if f.name != "first_error"]
        workload = dataclasses.asdict(self.workload)
        for name in ("virtual_tokens", "input_tokens", "output_tokens"):
            workload[name] = str(getattr(self.workload, name))
        return {
            "schema_version": SCHEMA_VERSION,
            "promptd": promptd.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "target": self.target,
            "workload": workload,
            "num_warmups": self.num_warmups,
            "median": {name: self.median(name) for name in names},
            "runs": [dataclasses.asdict(run) for run in self.runs],
        }

    def to_table(self) -> Table:
        """The medians, one line each, with the spread over the runs."""
        from rich.table import Table

        asked = self.workload
        table = Table(
            title=f"{self.target}\n{asked.num_requests} requests, {asked.concurrency} at once, {asked.num_prompts} "
            f"prompts ({', '.join(asked.kinds)}), {asked.input_tokens} tokens in, {asked.output_tokens} out",
            caption=f"median of {len(self.runs)} runs after {self.num_warmups} to warm up",
        )
        table.add_column("")
        table.add_column("median", justify="right")
        table.add_column("min", justify="right")
        table.add_column("max", justify="right")
        for label, name, scale, digits in _LINES:
            values = [getattr(run, name) for run in self.runs]
            shown = ["-"] * 3
            if values and None not in values:
                shown = [f"{v / scale:,.{digits}f}" for v in (statistics.median(values), min(values), max(values))]
            table.add_row(label, *shown)
        if self.num_failed:
            table.add_row("[bold red]failed requests[/]", f"[bold red]{self.num_failed}[/]", "", "")
        return table


_LINES = (
    ("output tokens/s", "output_tokens_per_second", 1.0, 1),
    ("requests/s", "requests_per_second", 1.0, 2),
    ("time to first token p50, ms", "ttft_p50_ms", 1.0, 1),
    ("time to first token p99, ms", "ttft_p99_ms", 1.0, 1),
    ("inter-token latency p50, ms", "inter_token_p50_ms", 1.0, 2),
    ("inter-token latency p99, ms", "inter_token_p99_ms", 1.0, 2),
    ("prompt cache hits", "prompt_cache_hits", 1.0, 0),
    ("prompt cache misses", "prompt_cache_misses", 1.0, 0),
    ("peak memory, MB", "peak_rss_bytes", _MEGA, 0),
)


def summarize(
    samples: Sequence[Sample],
    seconds: float,
    *,
    prompt_cache_hits: int | None,
    prompt_cache_misses: int | None,
    peak_rss_bytes: int | None,
) -> RunSummary:
    """Add up one run."""
    first = [_MILLI * (one.token_times[0] - one.started) for one in samples if one.token_times]
    between = [_MILLI * (b - a) for one in samples for a, b in itertools.pairwise(one.token_times)]
    num_tokens = sum(len(one.token_times) for one in samples)
    errors = [one.error for one in samples if one.error is not None]
    return RunSummary(
        seconds=seconds,
        num_requests=len(samples),
        num_failed=len(errors),
        output_tokens=num_tokens,
        output_tokens_per_second=num_tokens / seconds,
        requests_per_second=(len(samples) - len(errors)) / seconds,
        ttft_p50_ms=percentile(first, 0.50),
        ttft_p99_ms=percentile(first, 0.99),
        inter_token_p50_ms=percentile(between, 0.50),
        inter_token_p99_ms=percentile(between, 0.99),
        prompt_cache_hits=prompt_cache_hits,
        prompt_cache_misses=prompt_cache_misses,
        peak_rss_bytes=peak_rss_bytes,
        first_error=errors[0] if errors else None,
    )


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the smallest value that at least `share` of the values do not exceed; None for no values."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
