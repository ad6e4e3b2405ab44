"""T5 (v1.0, v1.1, FLAN and mT5): relative positions, which are a bias on the scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from promptd.modeling.attention import NO_BIAS
from promptd.modeling.families.base import Sizes
from promptd.modeling.families.seq2seq import Seq2SeqFamily, before

T5_TYPES = ("t5", "mt5")
DEFAULT_MAX_POSITIONS = 512
"""What T5 was trained with; it has no table of positions and takes more where it is asked to."""


def t5_sizes(config: Any) -> Sizes:
    """Return the sizes; `num_heads * d_kv` need not be `d_model`."""
    return Sizes(
        num_layers=config.num_decoder_layers,
        num_encoder_layers=config.num_layers,
        hidden_size=config.d_model,
        num_attention_heads=config.num_heads,
        num_kv_heads=config.num_heads,
        head_dim=config.d_kv,
        max_positions=getattr(config, "n_positions", None) or DEFAULT_MAX_POSITIONS,
        has_position_table=False,
    )


class RelativeBias:
    """A stack's bias by the distance of two positions, looked up in a table.

    It travels through the model in the place of the tensor `[1, num_heads, num_tokens, num_tokens]` that T5 would make
    for the whole packed length, and is asked for one row at a time.
    """

    def __init__(self, attention: Any, *, is_causal: bool) -> None:
        self._reach: int = attention.relative_attention_max_distance  # beyond it all distances have the last bucket
        weight = attention.relative_attention_bias.weight
        buckets = attention._relative_position_bucket(
            torch.arange(-self._reach, self._reach + 1, device=weight.device),
            bidirectional=not is_causal,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=self._reach,
        )
        self._table = weight.detach()[buckets].T.contiguous()  # [num_heads, 2 * reach + 1]
        self.behind = self._table[:, : self._reach + 1].float().contiguous()

    def between(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return `[1, num_heads, num_queries, num_keys]` for positions `[num_queries]` and `[num_keys]`."""
        distance = (keys - queries.unsqueeze(1)).clamp(-self._reach, self._reach) + self._reach
        bias: torch.Tensor = self._table[:, distance].unsqueeze(0)
        return bias


class T5Family(Seq2SeqFamily):
    """The first layer of each stack makes the bias, and the others take it on: ours is put in its place there."""

    @property
    def encoder(self) -> Any:
        """The stack that reads sources."""
        return self.hf.encoder

    @property
    def decoder(self) -> Any:
        """The stack that reads targets."""
        return self.hf.decoder

    def install(self) -> None:
        """Bring the biases in; mark cross attention."""
        for stack, is_causal in ((self.encoder, False), (self.decoder, True)):
            attention = stack.block[0].layer[0].SelfAttention
            before(attention, position_bias=RelativeBias(attention, is_causal=is_causal))
        for block in self.decoder.block:
            before(block.layer[1].EncDecAttention, position_bias=NO_BIAS, is_cross=True)

    def cross_projections(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield each decoder layer's projections of the source to keys and values."""
        for block in self.decoder.block:
            yield block.layer[1].EncDecAttention.k, block.layer[1].EncDecAttention.v

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scale as the first version does, then predict; mT5 never does."""
        config: Any = self.hf.config
        if getattr(config, "scale_decoder_outputs", False):
            hidden = hidden * config.d_model**-0.5
        logits: torch.Tensor = self.hf.lm_head(hidden)  # type: ignore[operator]
        return logits
