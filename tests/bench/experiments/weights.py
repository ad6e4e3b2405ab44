"""Learners that change the model's weights: the ceilings that a prompt is compared with.

They are trained through transformers and PEFT over padded batches, on the same rows in the same order, for the same
loss, optimizer, schedule and choice of step as promptd's jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import IA3Config, LoraConfig, get_peft_model

from promptd.training import Encoded, Objective, TrainingConfig
from promptd.training.methods.base import group
from promptd.training.methods.headed import HEAD_LEARNING_RATE
from promptd.training.objectives import Tally
from tests.bench.experiments.descent import Descent, descend
from tests.bench.experiments.plain import Plain
from tests.bench.peers import quiet


@dataclass(frozen=True)
class WeightConfig:
    """What is changed. `lora` and `ia3` are PEFT's; `full` is every weight of the model."""

    kind: Literal["lora", "ia3", "full"]
    learning_rate: float
    rank: int = 8
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """Of LoRA; empty: PEFT's own choice for the type of model."""

    @property
    def name(self) -> str:
        """How results name the learner's kind."""
        return self.kind


class WeightTuning:
    """A plain model with its adapters in place."""

    def __init__(self, plain: Plain, config: WeightConfig, seed: int) -> None:
        """Add the adapters to `plain`, which is this object's from now on."""
        self.plain, self._rate = plain, config.learning_rate
        torch.manual_seed(seed)
        with quiet():
            if config.kind == "lora":
                targets = list(config.target_modules) or None  # None: PEFT's own choice for the type of model
                lora = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules=targets)
                get_peft_model(plain.hf, lora)
            elif config.kind == "ia3":
                ia3 = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
                get_peft_model(plain.hf, ia3)
        plain.hf.eval()  # no dropout, as for prompts
        self._weights = [parameter for parameter in plain.hf.parameters() if parameter.requires_grad]
        self._head = [] if plain.head is None else list(plain.head.parameters())

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """Everything that is learned."""
        return [*self._weights, *self._head]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: a head learns at the rate that it has beside a prompt."""
        heads = [group(self._head, HEAD_LEARNING_RATE)] if self._head else []
        return [group(self._weights, self._rate), *heads]

    @property
    def trained_params(self) -> int:
        """Numbers that are learned, and stored for each tenant."""
        return sum(parameter.numel() for parameter in self.trained)

    def tally(self, objective: Objective, rows: Sequence[Encoded]) -> Tally:
        """Measure rows, with autograd to the weights."""
        return objective.tally(rows, self.plain.logits(objective.texts(rows, None)))


def tune_weights(
    plain: Plain,
    config: WeightConfig,
    training: TrainingConfig,
    objective: Objective,
    train: Sequence[Encoded],
    selection: Sequence[Encoded],
) -> tuple[WeightTuning, Descent[list[torch.Tensor]]]:
    """Train; return the model with the weights of the step that is best on the selection rows."""
    tuning = WeightTuning(plain, config, training.seed)
    descent = descend(
        training, objective, tuning.groups, train, selection,
        lambda rows: tuning.tally(objective, rows),
        lambda: [parameter.detach().clone() for parameter in tuning.trained],
    )  # fmt: skip
    with torch.no_grad():
        for parameter, kept in zip(tuning.trained, descent.best, strict=True):
            parameter.copy_(kept)
    return tuning, descent
