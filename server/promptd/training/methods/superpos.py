"""SuperPos-Prompt (SadraeiJavaheri et al. 2024, arXiv 2406.05279): virtual tokens as mixtures of real ones.

    P_i = p_i (E + dE)          E: [num_rows, hidden_size], frozen; p_i: num_rows coefficients of one virtual token

E holds the initial prompt's own rows, then sampled rows of the vocabulary, so that one coefficient of 1 per virtual
token starts exactly at the initial prompt, whatever it is (ours; with the default init all rows are the
vocabulary's, as the authors'). dE, where asked for, starts at zero and is shared by all virtual tokens. There is no
softmax over coefficients. A step moves an entry of P about as far as in prompt tuning (ours).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import nn

from promptd.errors import InvalidRequestError
from promptd.modeling import FrozenModel
from promptd.training.checks import Positive, Size
from promptd.training.methods.base import PromptMethod, group
from promptd.training.methods.config import MethodConfig
from promptd.training.methods.inits import sampled_vocabulary


@dataclass(frozen=True, slots=True)
class SuperPosConfig(MethodConfig):
    """Settings of superposed prompts."""

    name: ClassVar[str] = "superpos"

    learning_rate: Positive = 0.3
    num_rows: Size = 128
    """Embeddings that are mixed; at least as many as are learned."""
    train_rows: bool = False
    """True: a change of the rows is learned, too."""

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        if self.num_rows < self.num_learned_tokens:
            tokens = f"num_virtual_tokens + num_target_tokens = {self.num_learned_tokens}"
            message = f"num_rows must be at least {tokens}, got {self.num_rows}"
            raise InvalidRequestError(message, param="num_rows")


class SuperPosPrompt(PromptMethod):
    """P = p (E + dE)."""

    config_class = SuperPosConfig
    config: SuperPosConfig

    rows: torch.Tensor  # E, [num_rows, hidden_size]

    def __init__(
        self, config: SuperPosConfig, start: torch.Tensor, embedding_std: float, generator: torch.Generator
    ) -> None:
        """`start` is E: `[num_rows, hidden_size]`, the initial prompt first."""
        super().__init__(config, start, embedding_std, generator)
        self.register_buffer("rows", start.clone())
        self.coefficients = nn.Parameter(torch.eye(config.num_learned_tokens, len(start)))
        self.change = nn.Parameter(torch.zeros_like(start)) if config.train_rows else None

    @classmethod
    def build(cls, config: MethodConfig, model: FrozenModel, start: torch.Tensor, generator: torch.Generator) -> Self:
        """Return the method on the CPU, with the start's rows and sampled ones."""
        missing = cast(SuperPosConfig, config).num_rows - len(start)
        sampled = sampled_vocabulary(model, missing, generator, config.init_vocabulary).cpu()
        return super().build(config, model, torch.cat([start, sampled]), generator)

    def materialize(self) -> torch.Tensor:
        """Return `[num_virtual_tokens, hidden_size]`."""
        rows = self.rows if self.change is None else self.rows + self.change
        return self.coefficients @ rows

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the coefficients, whose steps add up over the rows, and the rows' change at embedding scale."""
        rate = self.config.learning_rate
        groups = [group([self.coefficients], rate / self.config.num_rows**0.5)]
        if self.change is not None:
            groups.append(group([self.change], rate * self.embedding_std))
        return groups
