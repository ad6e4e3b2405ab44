"""What turns a gradient into a step. Parameters and state are float32 whatever the base model's dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

OptimizerName = Literal["adamw", "adafactor"]
ParameterGroups = list[dict[str, Any]]


def _adafactor(groups: ParameterGroups, weight_decay: float) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor  # brings the whole Trainer, and peft where it is installed

    # A step of `lr`, not of `lr` times the parameter's own size, and no schedule of its own (Lester et al.);
    # torch's Adafactor always scales by the parameter, so it cannot be told so.
    return Adafactor(groups, weight_decay=weight_decay, scale_parameter=False, relative_step=False)


def _adamw(groups: ParameterGroups, weight_decay: float) -> torch.optim.Optimizer:
    # Fused: one kernel a parameter instead of ten; with many small jobs in a pass, steps are what is left.
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)


OPTIMIZERS: Mapping[OptimizerName, Callable[[ParameterGroups, float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
}


def build_optimizer(name: OptimizerName, groups: ParameterGroups, weight_decay: float) -> torch.optim.Optimizer:
    """Return an optimizer over a method's parameter groups, each with its own `lr`.

    `weight_decay` is decoupled: every step takes `lr * weight_decay` of a parameter away.
    """
    return OPTIMIZERS[name](groups, weight_decay)
