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
    num_latency_pairs: int = 200
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


FULL = Scale()
SMOKE = Scale(
    w1_model="tiny",
    latency_models=("tiny",),
    num_requests=6,
    virtual_tokens=4,
    input_tokens=9,
    output_tokens=9,
    max_num_seqs=4,
    num_rounds=1,
    num_mixing_pairs=1,
    num_latency_pairs=4,
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
)
