"""BART and mBART: learned absolute positions, of the source and of the target."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from promptd.errors import ModelRefusedError
from promptd.modeling.families.base import Sizes
from promptd.modeling.families.seq2seq import Seq2SeqFamily, before

BART_TYPES = ("bart", "mbart")


def bart_sizes(config: Any) -> Sizes:
    """Return the sizes, or raise `ModelRefusedError` where the stacks' heads differ."""
    heads = config.decoder_attention_heads
    if heads != config.encoder_attention_heads:
        raise ModelRefusedError(
            f"layer 0: {config.encoder_attention_heads} heads in the encoder and {heads} in the decoder are not served"
        )
    return Sizes(
        num_layers=config.decoder_layers,
        num_encoder_layers=config.encoder_layers,
        hidden_size=config.d_model,
        num_attention_heads=heads,
        num_kv_heads=heads,
        head_dim=config.d_model // heads,
        max_positions=config.max_position_embeddings,
    )


class BartFamily(Seq2SeqFamily):
    """Both stacks count positions from the packed length: ours are put in their place.

    The stacks do not hand arguments on to their position tables, so the tables ask here; each pass sets its positions
    right before it looks them up. Each thread has its own: a job that begins runs the model beside the engine.
    """

    def __init__(self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> None:
        super().__init__(hf, tokenizer, sizes)
        self._of_pass = threading.local()

    @property
    def encoder(self) -> Any:
        """The stack that reads sources."""
        return self.hf.base_model.encoder

    @property
    def decoder(self) -> Any:
        """The stack that reads targets."""
        return self.hf.base_model.decoder

    def place(self, positions: torch.Tensor) -> None:
        """Keep the positions of the pass that begins."""
        self._of_pass.positions = positions

    def install(self) -> None:
        """Bring the positions in; mark cross attention; number the encoder's layers, which mBART does not."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, {**kwargs, "position_ids": self._of_pass.positions}

        for stack in (self.encoder, self.decoder):
            stack.embed_positions.register_forward_pre_hook(hook, with_kwargs=True)
        for number, layer in enumerate(self.encoder.layers):
            layer.self_attn.layer_idx = number
        for layer in self.decoder.layers:
            before(layer.encoder_attn, is_cross=True)

    def cross_projections(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield each decoder layer's projections of the source to keys and values."""
        for layer in self.decoder.layers:
            yield layer.encoder_attn.k_proj, layer.encoder_attn.v_proj

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Predict, with the bias that every vocabulary entry has."""
        logits: torch.Tensor = self.hf.lm_head(hidden) + self.hf.final_logits_bias[0]  # type: ignore[operator, index]
        return logits
