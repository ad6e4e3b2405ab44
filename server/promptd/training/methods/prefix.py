"""Keys and values of every layer, in units of the activations that they start from.

The start is the activations of real words (Li & Liang, section 7.4). `scale` holds their standard deviation per layer,
for keys and for values, so that rates are in units of it on any model (ours).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from promptd_store import PromptKind

from promptd.modeling import FrozenModel
from promptd.training.checks import Share
from promptd.training.context import FrozenContext
from promptd.training.forward import prompt_key_values
from promptd.training.forward_pairs import pair_key_values
from promptd.training.forward_sources import source_key_values
from promptd.training.methods.base import PromptMethod
from promptd.training.methods.config import MethodConfig

PREFIX_DIMS = 5


Banks = Literal["all", "decoder"]


@dataclass(frozen=True, slots=True)
class PrefixConfig(MethodConfig):
    """Settings of both forms of prefix."""

    dropout: Share = 0.0
    """On keys and values."""
    banks: Banks = "all"
    """Of a sequence-to-sequence model: which attentions read the prefix, the decoder's own alone (as in PEFT) or also
    the encoder's and the decoder's to the encoder."""


class Prefix(PromptMethod):
    """Per-layer keys and values; `start` are the activations to begin with."""

    kind: ClassVar[PromptKind] = PromptKind.PREFIX
    config: PrefixConfig

    scale: torch.Tensor  # [num_layers, 2, 1, 1, 1]

    def __init__(
        self, config: PrefixConfig, start: torch.Tensor, embedding_std: float, generator: torch.Generator
    ) -> None:
        super().__init__(config, start, embedding_std, generator)
        self.shape = start.shape  # [num_layers, 2, num_kv_heads, num_virtual_tokens, head_dim]
        scale = start.std(dim=(2, 3, 4), keepdim=True)
        self.register_buffer("scale", scale.clamp_min(1e-6))

    def materialize(self) -> torch.Tensor:
        """Return `[num_layers, 2, num_kv_heads, num_virtual_tokens, head_dim]`."""
        return self.dropped(self.normalized() * self.scale, self.config.dropout)

    @abstractmethod
    def normalized(self) -> torch.Tensor:
        """Return the prefix in units of `scale`."""


@torch.no_grad()
def as_prefix(
    model: FrozenModel, start: torch.Tensor, behind: FrozenContext | None = None, banks: Banks = "all"
) -> torch.Tensor:
    """Return the keys and values that a soft prompt becomes, on the CPU; a prefix is returned as it is."""
    if start.dim() == PREFIX_DIMS:
        return start
    if not model.has_sources:
        return prompt_key_values(model, start, behind).cpu()
    if model.reads_whole:
        return source_key_values(model, start)[0].cpu()
    return pair_key_values(model, start, banks).cpu()
