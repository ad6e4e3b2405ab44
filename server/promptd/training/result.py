"""What a training came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from promptd.training.config import TrainingConfig
from promptd.training.scores import Scores


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The best folded prompt and everything that is recorded about it."""

    prompt: torch.Tensor
    """Folded, float32: `[n, hidden_size]` or `[num_layers, 2, num_kv_heads, n, head_dim]`; flat with a head."""
    sidecar: bytes
    """The parameters before folding, as safetensors: training can resume from them."""
    config: TrainingConfig
    best_step: int
    num_steps: int
    selection: Scores
    """On the half of the validation rows that chose the step."""
    report: Scores
    """On the other half, which chose nothing."""
    before: Scores
    """On the report half, of the prompt that this one would replace; without one, `bare`."""
    bare: Scores
    """On the report half, same template, without the prompt: of the bare model, or of the chain in front alone."""
    majority: tuple[str, float] | None
    """The report half's most frequent label and its share; None for completions."""
    distilled: Mapping[str, Any] | None
    """Who taught it, where it was distilled: scores are then divergences from that."""
    trainable_params: int
    stored_params: int
    data_digest: str
    seconds: float
