"""What the server holds, read at scrape time. Reads the engine's dataclasses; the engine knows no metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from promptd_store import PromptCatalog

from promptd.engine.async_engine import AsyncEngine
from promptd.jobs import JobState
from promptd.tenancy import ServerBudgets
from promptd.training import TrainingWorker

_GAUGES = {
    "num_requests_running": ("promptd_requests_running", "Requests in the batch"),
    "num_requests_waiting": ("promptd_requests_waiting", "Requests in the queue"),
    "kv_cache_usage_ratio": ("promptd_kv_cache_usage_ratio", "Share of text K/V blocks in use"),
    "prompt_cache_bytes": ("promptd_prompt_cache_bytes", "K/V bytes of resident prompts"),
    "prompt_cache_capacity_bytes": ("promptd_prompt_cache_capacity_bytes", "Budget for resident prompts"),
    "prompts_resident": ("promptd_prompts_resident", "Resident elements of prompt chains"),
}
_COUNTERS = {
    "prompt_cache_hits": ("promptd_prompt_cache_hits", "Prompts found resident"),
    "prompt_cache_misses": ("promptd_prompt_cache_misses", "Prompts that had to become K/V"),
    "prompt_cache_evictions": ("promptd_prompt_cache_evictions", "Prompts evicted for others"),
    "preemptions": ("promptd_preemptions", "Rows that gave up their K/V and started again"),
    "steps": ("promptd_engine_steps", "Packed batches run"),
    "prompt_tokens": ("promptd_prompt_tokens", "Text tokens read"),
    "generation_tokens": ("promptd_generation_tokens", "Tokens made"),
    "virtual_tokens_computed": ("promptd_virtual_tokens_computed", "Virtual tokens turned into K/V"),
    "cached_tokens": ("promptd_prefix_cache_hit_tokens", "Text tokens reused from the prefix cache"),
    "numerical_errors": ("promptd_numerical_errors", "Rows that ended with non-finite logits"),
}


class EngineCollector(Collector):
    """Turns one reading of the engine into samples at scrape time."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield gauges, counters, the ended requests by outcome, and how far apart tenants are."""
        stats = self._engine.stats()
        for field, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(name, text, value=getattr(stats, field))
        for field, (name, text) in _COUNTERS.items():
            yield CounterMetricFamily(name, text, value=getattr(stats, field))
        ended = CounterMetricFamily("promptd_requests", "Requests that ended", labels=["outcome"])
        for outcome in ("finished", "failed", "aborted"):
            ended.add_metric([outcome], getattr(stats, f"requests_{outcome}"))
        yield ended
        waiting = [share.service for share in self._engine.engine.scheduler.waiting.readings() if share.num_waiting]
        yield GaugeMetricFamily(
            "promptd_fairness_gap_tokens",
            "Service of the best served tenant that waits, less that of the worst served, in weighted tokens",
            value=max(waiting) - min(waiting) if waiting else 0.0,
        )


class BudgetCollector(Collector):
    """What the server has given out to open requests."""

    def __init__(self, budgets: ServerBudgets) -> None:
        self._budgets = {
            "requests": budgets.requests,
            "tokens": budgets.tokens,
            "upload_bytes": budgets.upload_bytes,
            "event_streams": budgets.event_streams,
        }

    def collect(self) -> Iterator[Metric]:
        """Yield what is in use of each budget, and its limit."""
        used = GaugeMetricFamily("promptd_budget_used", "What open requests hold", labels=["budget"])
        limit = GaugeMetricFamily("promptd_budget_limit", "What open requests may hold", labels=["budget"])
        for name, budget in self._budgets.items():
            used.add_metric([name], budget.reading().used)
            limit.add_metric([name], budget.limit)
        yield used
        yield limit


class CatalogCollector(Collector):
    """The tier behind the prompt cache: decoded prompts in host memory. What misses here is read from the store."""

    def __init__(self, catalog: PromptCatalog) -> None:
        self._catalog = catalog

    def collect(self) -> Iterator[Metric]:
        """Yield the host-side cache's size and counters."""
        stats = self._catalog.cache_stats
        yield GaugeMetricFamily(
            "promptd_store_up",
            "Whether the last thing heard of the store was good",
            value=self._catalog.store.is_up,
        )
        yield GaugeMetricFamily("promptd_artifact_cache_bytes", "Bytes of decoded prompts", value=stats.num_bytes)
        yield GaugeMetricFamily("promptd_artifact_cache_prompts", "Decoded prompts", value=stats.num_artifacts)
        yield CounterMetricFamily("promptd_artifact_cache_hits", "Prompts found decoded", value=stats.num_hits)
        yield CounterMetricFamily(
            "promptd_artifact_cache_misses", "Prompts loaded from the store", value=stats.num_misses
        )
        yield CounterMetricFamily(
            "promptd_artifact_cache_evictions", "Decoded prompts dropped for others", value=stats.num_evictions
        )


class TrainingCollector(Collector):
    """The jobs that train in this process."""

    def __init__(self, worker: TrainingWorker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        """Yield the jobs that run, what they did, and how they left."""
        counters = self._worker.counters
        yield GaugeMetricFamily(
            "promptd_training_jobs_running", "Training jobs that run here", value=self._worker.num_running
        )
        yield CounterMetricFamily("promptd_training_steps", "Optimizer steps of all jobs", value=counters.steps)
        yield CounterMetricFamily("promptd_training_tokens", "Text tokens of those steps", value=counters.tokens)
        yield CounterMetricFamily(
            "promptd_training_step_seconds", "Time of those steps, summed over jobs", value=counters.step_seconds
        )
        yield CounterMetricFamily(
            "promptd_training_leases_lost", "Jobs that another worker took over", value=counters.leases_lost
        )
        left = CounterMetricFamily("promptd_training_jobs", "Training jobs that left here", labels=["state"])
        for state in JobState:
            left.add_metric([state.value], counters.left[state.value])
        yield left
