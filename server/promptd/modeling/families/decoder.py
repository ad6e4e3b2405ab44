"""Decoder-only models (GPT-2, Llama, Qwen2, Mistral and the like): sizes, and what is refused before loading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from promptd.errors import ModelRefusedError

#: RoPE variants that look at the positions of the whole batch: rows would change each other.
_REFUSED_ROPE = ("dynamic", "longrope")
#: Config fields that change attention in a way we do not implement.
_REFUSED_FIELDS = ("attn_logit_softcapping", "attention_chunk_size")


@dataclass(frozen=True)
class DecoderSizes:
    """The numbers that a prompt must fit."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int


def check_config(config: Any) -> DecoderSizes:
    """Return the sizes, or raise `ModelRefusedError` naming the layer and the feature."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelRefusedError(f"{config.model_type}: encoder-decoder models are not served by this version")
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
        if not isinstance(getattr(config, name, None), int):
            raise ModelRefusedError(f"layer 0: {config.model_type} has no {name}: it is not a decoder that we know")
    for layer in range(config.num_hidden_layers):
        for rope in _rope_types(config, layer):
            if rope in _REFUSED_ROPE:
                raise ModelRefusedError(
                    f"layer {layer}: rope_type {rope!r} depends on the other rows of a batch and is not served"
                )
    for name in _REFUSED_FIELDS:
        if getattr(config, name, None) is not None:
            raise ModelRefusedError(f"layer 0: config.{name}={getattr(config, name)!r} is not implemented")
    heads = config.num_attention_heads
    return DecoderSizes(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_positions=config.max_position_embeddings,
    )


def _rope_types(config: Any, layer: int) -> list[str]:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    layer_types = getattr(config, "layer_types", None)
    if by_layer_type and layer_types:
        by_layer_type = [parameters[layer_types[layer]]]
    return [str(p.get("rope_type") or p.get("type") or "default") for p in by_layer_type or [parameters]]
