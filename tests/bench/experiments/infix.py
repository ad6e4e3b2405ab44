"""Infix-tuning (Li & Liang 2021, table 4): learned keys and values between input and output, not in front of both.

    [x; infix; y]          against prefix-tuning's [prefix; x; y]

The input cannot see an infix, so its own keys and values stay the frozen model's; only the last token of the input (the
line's end, as the authors' BOS) and the target read it. promptd serves no infix; this runs through transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache

from promptd.modeling import FrozenModel
from promptd.training import Encoded, Objective, PrefixTuningConfig, PromptMethod, TrainingConfig, build_method
from promptd.training.objectives import CompletionObjective, Tally
from tests.bench.experiments.descent import Descent, descend
from tests.bench.peers import plain_model


@dataclass(frozen=True)
class InfixConfig:
    """Prefix-tuning's parameters, placed behind the input."""

    method: PrefixTuningConfig

    @property
    def name(self) -> str:
        """How results name the learner's kind."""
        return "infix"


class Infix:
    """The plain model, read with an infix."""

    def __init__(self, folder: Path) -> None:
        self._hf = plain_model(folder).requires_grad_(False)

    def tally(self, rows: Sequence[Encoded], infix: torch.Tensor) -> Tally:
        """Measure rows behind `infix`, `[num_layers, 2, num_kv_heads, n, head_dim]`, with autograd to it."""
        before = [row.text_ids[:-1] for row in rows]
        behind = [row.text_ids[-1:] + row.target_ids[:-1] for row in rows]
        widest, longest, count = max(map(len, before)), max(map(len, behind)), infix.shape[-2]
        # Inputs are padded in front, targets behind: the infix stands at the same slot in every row.
        ids = torch.tensor([[*[0] * (widest - len(text)), *text] for text in before])
        is_text = torch.tensor([[at >= widest - len(text) for at in range(widest)] for text in before])
        starts = torch.tensor([[len(text)] for text in before])
        cache = DynamicCache(config=self._hf.config)
        with torch.no_grad():
            positions = (torch.arange(widest) - widest + starts).clamp_min(0)
            self._hf(input_ids=ids, attention_mask=is_text.long(), position_ids=positions, past_key_values=cache)
        for layer, own in enumerate(infix):
            key, value = (part.unsqueeze(0).expand(len(rows), -1, -1, -1) for part in own)
            cache.update(key, value, layer)
        targets = torch.tensor([[*text, *[0] * (longest - len(text))] for text in behind])
        mask = torch.cat([is_text, torch.ones(len(rows), count + longest, dtype=torch.bool)], 1).long()
        positions = starts + count + torch.arange(longest)
        logits = self._hf(
            input_ids=targets, attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits  # [num_rows, longest, vocab_size]
        kept = torch.tensor([[at < len(text) for at in range(longest)] for text in behind])
        return CompletionObjective().tally(rows, logits[kept].float())


def tune_infix(
    model: FrozenModel,
    folder: Path,
    config: InfixConfig,
    training: TrainingConfig,
    objective: Objective,
    train: Sequence[Encoded],
    selection: Sequence[Encoded],
) -> tuple[PromptMethod, Callable[[Sequence[Encoded]], Tally], Descent[torch.Tensor]]:
    """Train; return the parameters, what measures rows behind the best infix, and how it went. Completions only."""
    infix = Infix(folder)
    method = build_method(config.method, model, seed=training.seed)
    descent = descend(
        training, objective, method.parameter_groups(), train, selection,
        lambda rows: infix.tally(rows, method.materialize()), method.fold,
    )  # fmt: skip
    return method, lambda rows: infix.tally(rows, descent.best), descent
