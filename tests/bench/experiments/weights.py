"""Learners that change the model's weights: the ceilings that a prompt is compared with.

They are trained through transformers and PEFT over padded batches, on the same rows in the same order, for the same
loss, optimizer, schedule and choice of step as promptd's jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import PreTrainedModel

from promptd.training import Encoded, Objective, TrainingConfig
from promptd.training.objectives import Tally
from tests.bench.experiments.descent import Descent, descend
from tests.bench.peers import plain_model, quiet


@dataclass(frozen=True)
class WeightConfig:
    """What is changed. `lora` and `ia3` are PEFT's; `full` is every weight of the model."""

    kind: Literal["lora", "ia3", "full"]
    learning_rate: float
    rank: int = 8
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")

    @property
    def name(self) -> str:
        """How results name the learner's kind."""
        return self.kind


class WeightTuning:
    """The plain model with its adapters in place."""

    def __init__(self, folder: Path, config: WeightConfig, seed: int) -> None:
        with quiet():
            self.hf: PreTrainedModel = plain_model(folder)
            torch.manual_seed(seed)
            if config.kind == "lora":
                lora = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules=list(config.target_modules))
                get_peft_model(self.hf, lora)  # type: ignore[arg-type]
            elif config.kind == "ia3":
                ia3 = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
                get_peft_model(self.hf, ia3)  # type: ignore[arg-type]
        self.hf.eval()  # no dropout, as for prompts
        self.trained = [parameter for parameter in self.hf.parameters() if parameter.requires_grad]

    @property
    def trained_params(self) -> int:
        """Numbers that are learned, and stored for each tenant."""
        return sum(parameter.numel() for parameter in self.trained)

    def logits(self, texts: Sequence[Sequence[int]], index: torch.Tensor) -> torch.Tensor:
        """Return the logits of some tokens, counted over all texts end to end, `[num_logits, vocab_size]`."""
        longest = max(map(len, texts))
        ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
        kept = torch.tensor([[at < len(text) for at in range(longest)] for text in texts])
        # Padding stands behind a row's own tokens: causality hides it, no mask is needed.
        hidden = self.hf.model(input_ids=ids, use_cache=False).last_hidden_state[kept]
        logits: torch.Tensor = self.hf.lm_head(hidden[index]).float()
        return logits

    def tally(self, objective: Objective, rows: Sequence[Encoded]) -> Tally:
        """Measure rows, with autograd to the weights."""
        asked = objective.texts(rows, None)
        return objective.tally(rows, self.logits(asked.texts, asked.logits_index))

    @torch.no_grad()
    def generate(self, texts: Sequence[Sequence[int]], max_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        """Return greedy continuations, in one batch with padding in front."""
        longest = max(map(len, texts))
        ids = torch.tensor([[*[0] * (longest - len(text)), *text] for text in texts])
        mask = torch.tensor([[int(at >= longest - len(text)) for at in range(longest)] for text in texts])
        with quiet():
            made = self.hf.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0,
                eos_token_id=list(stop_ids),
            )  # fmt: skip
        answers: list[list[int]] = made[:, longest:].tolist()
        return answers


def tune_weights(
    folder: Path,
    config: WeightConfig,
    training: TrainingConfig,
    objective: Objective,
    train: Sequence[Encoded],
    selection: Sequence[Encoded],
) -> tuple[WeightTuning, Descent[list[torch.Tensor]]]:
    """Train; return the model with the weights of the step that is best on the selection rows."""
    tuning = WeightTuning(folder, config, training.seed)
    descent = descend(
        training, objective, [{"params": tuning.trained, "lr": config.learning_rate}], train, selection,
        lambda rows: tuning.tally(objective, rows),
        lambda: [parameter.detach().clone() for parameter in tuning.trained],
    )  # fmt: skip
    with torch.no_grad():
        for parameter, kept in zip(tuning.trained, descent.best, strict=True):
            parameter.copy_(kept)
    return tuning, descent
