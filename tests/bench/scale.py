"""How much each check does: the sizes that the targets are stated for, and tiny ones for the smoke test."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Numbers of requests, tokens and repeats."""

    w1_model: str = "gpt2-small"
    """GPT-2-small's shape with random weights, or `tiny`."""
    latency_models: tuple[str, ...] = ("demo", "gpt2-small")
    num_requests: int = 32
    virtual_tokens: int = 32
    input_tokens: int = 64
    output_tokens: int = 64
    max_num_seqs: int = 16
    num_peft_requests: int = 2
    """PEFT takes 3 s a request here; its tokens/s do not depend on how many there are."""
    num_rounds: int = 3
    num_mixing_pairs: int = 5
    num_product_rounds: int = 7
    prefill_tokens: int = 1536
    num_latency_pairs: int = 200
    num_path_rounds: int = 9
    path_rows: tuple[int, ...] = (1, 32, 256)
    many_rows_models: tuple[str, ...] = ("demo",)
    """The largest number of rows is asked of these alone."""
    num_first_uses: int = 40
    num_resident: int = 100
    num_growth_requests: int = 10_000
    num_growth_prompts: int = 500
    num_growth_budget: int = 100
    num_starts: int = 3
    num_trained: int = 20
    train_batch: int = 32
    train_longest: int = 40
    train_steps: int = 3
    num_jobs: int = 16
    job_steps: int = 5
    inline_seconds: float = 20.0
    versus_models: tuple[str, ...] = ("demo", "gpt2-small", "qwen2-0.5b")
    slow_models: tuple[str, ...] = ("qwen2-0.5b",)
    """One full batch is asked of these, not two."""
    versus_rounds: int = 3
    workloads: tuple[str, ...] = ()
    """Names in `versus.workloads`; none for all of them."""
    peers: tuple[str, ...] = ()
    """Names in `versus.contenders`; none for all of them."""
    mixed_virtual_tokens: tuple[int, int] = (4, 512)
    short_tokens: int = 16
    long_tokens: int = 768
    shared_tokens: int = 2000
    shared_rows: int = 64
    load_models: tuple[str, ...] = ("gpt2-small",)
    load_shares: tuple[float, ...] = (0.5, 0.8, 0.95)
    num_load_requests: int = 64
    load_input_tokens: tuple[int, int] = (16, 128)
    load_output_tokens: tuple[int, int] = (16, 96)
    num_stored: int = 100_000
    num_few_stored: int = 100
    num_stored_requests: int = 1000
    num_cold_pairs: int = 60
    num_paints: int = 7
    num_listed_prompts: int = 10_000
    num_listed_tenants: int = 1000
    num_scrapes: int = 50
    fleet_step_seconds: float = 0.01
    fleet_tokens: int = 24
    fleet_seconds: float = 12.0
    num_fleet_rounds: int = 5
    publish_bytes: int = 160_000
    num_publishes: int = 1000
    soak_seconds: float = 3600.0
    soak_pause_seconds: float = 0.4
    num_soak_prompts: int = 100


FULL = Scale()
SMOKE = Scale(
    w1_model="tiny",
    latency_models=("tiny",),
    num_requests=6,
    virtual_tokens=4,
    input_tokens=9,
    output_tokens=9,
    max_num_seqs=4,
    num_peft_requests=3,
    num_rounds=1,
    num_mixing_pairs=1,
    num_product_rounds=1,
    prefill_tokens=27,
    num_latency_pairs=4,
    num_path_rounds=1,
    path_rows=(1, 3, 5),
    many_rows_models=("tiny",),
    num_first_uses=2,
    num_resident=6,
    num_growth_requests=60,
    num_growth_prompts=12,
    num_growth_budget=5,
    num_starts=1,
    num_trained=2,
    train_batch=3,
    train_longest=12,
    train_steps=1,
    num_jobs=3,
    job_steps=1,
    inline_seconds=0.5,
    versus_models=("tiny",),
    slow_models=(),
    versus_rounds=1,
    peers=("PEFT, one at a time", "transformers, static batches"),
    mixed_virtual_tokens=(2, 40),
    short_tokens=4,
    long_tokens=60,
    shared_tokens=90,
    shared_rows=5,
    load_models=("tiny",),
    load_shares=(0.5,),
    num_load_requests=4,
    load_input_tokens=(3, 9),
    load_output_tokens=(2, 5),
    num_stored=24,
    num_few_stored=8,
    num_stored_requests=16,
    num_cold_pairs=2,
    num_paints=1,
    num_listed_prompts=150,
    num_listed_tenants=3,
    num_scrapes=2,
    fleet_step_seconds=0.001,
    fleet_tokens=2,
    fleet_seconds=0.2,
    num_fleet_rounds=1,
    publish_bytes=1024,
    num_publishes=5,
    soak_seconds=0.5,
    soak_pause_seconds=0.0,
    num_soak_prompts=5,
)
