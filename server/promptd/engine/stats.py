"""What the engine counts; the edge turns it into metrics. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class EngineCounters:
    """Totals since the start, written by the engine alone."""

    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    virtual_tokens_computed: int = 0
    cached_tokens: int = 0
    requests_finished: int = 0
    requests_failed: int = 0
    requests_aborted: int = 0
    numerical_errors: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One reading of the engine, taken between steps."""

    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage_ratio: float
    prompt_cache_bytes: int
    prompt_cache_capacity_bytes: int
    prompts_resident: int
    prompt_cache_hits: int
    prompt_cache_misses: int
    prompt_cache_evictions: int
    preemptions: int
    steps: int
    prompt_tokens: int
    generation_tokens: int
    virtual_tokens_computed: int
    cached_tokens: int
    requests_finished: int
    requests_failed: int
    requests_aborted: int
    numerical_errors: int
    last_step_seconds: float
    last_step_num_tokens: int
