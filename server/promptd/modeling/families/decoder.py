"""Decoder-only models (GPT-2, Llama, Qwen2, Mistral and the like): sizes, what is refused, one pass for everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from promptd_store import PromptArtifact, PromptKind

from promptd.errors import InvalidRequestError, ModelRefusedError
from promptd.modeling.attention import Attends
from promptd.modeling.families.base import Arrangement, Asked, Family, Magnitudes, Sizes
from promptd.modeling.last_layer import narrow_last_layer, only_tokens
from promptd.modeling.probe import LayerCalls, expected_rows, probe_of, prove_rows

#: RoPE variants that look at the positions of the whole batch: rows would change each other.
_REFUSED_ROPE = ("dynamic", "longrope")
#: Config fields that change attention in a way we do not implement.
_REFUSED_FIELDS = ("attn_logit_softcapping", "attention_chunk_size")


class DecoderFamily(Family):
    """A text is its own target; every prompt becomes keys and values in front of it."""

    banks = ("target",)

    def arrange(self, asked: Asked, encode: Callable[[str], list[int]]) -> Arrangement:
        """Cache all prompts; the text goes on from them."""
        if asked.reading is not None and asked.reading.kind != "words":
            raise InvalidRequestError(
                f"this base model continues texts; it has no {asked.reading.kind} to read off them", param="model"
            )
        bos = self.tokenizer.bos_token_id if self.begins_after_bos(asked.prompts) else None
        return Arrangement(asked.token_ids, asked.prompts, asked.num_public, bos)

    def divide(self, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """All is target."""
        return (), token_ids

    def begins_after_bos(self, chain: Sequence[PromptArtifact]) -> bool:
        """Where the chain's first prompt says so, and where it is a text and the tokenizer puts BOS in front of texts.

        A text prompt begins the sequence exactly as the same text would without prompts.
        """
        if not chain or self.tokenizer.bos_token_id is None:
            return False
        return chain[0].manifest.prompt_after_bos or (chain[0].kind is PromptKind.TEXT and self._adds_bos)

    @cached_property
    def _adds_bos(self) -> bool:
        return bool(self.tokenizer.encode("")[:1] == [self.tokenizer.bos_token_id])

    def read(
        self, embeds: torch.Tensor, positions: torch.Tensor, logits_index: torch.Tensor, batch: Attends
    ) -> torch.Tensor:
        """Read packed targets `[num_tokens, hidden_size]`; return logits `[num_logits, vocab_size]`."""
        with only_tokens(logits_index, len(embeds)):
            output: Any = self.hf(
                inputs_embeds=embeds.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=logits_index,
                batch=batch,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def install(self) -> None:
        """Let the last layer compute what is asked for."""
        narrow_last_layer(self.hf, self._read_two, 2)

    def check_layers(self) -> None:
        """Raise `ModelRefusedError` naming the first layer whose attention does not reach our function."""
        calls = LayerCalls(self.sizes.num_layers)
        with torch.no_grad():
            self._read_two(calls)
        calls.check(type(self.hf).__name__)

    def _read_two(self, batch: Attends) -> torch.Tensor:
        """Read two tokens and ask for what follows the first."""
        ids = torch.zeros(2, dtype=torch.int64, device=self.hf.device)
        return self.read(self.hf.get_input_embeddings()(ids), ids, ids[:1], batch)

    def prove(self) -> Callable[[Any], Magnitudes]:
        """Bare, soft, prefix and chained rows of ragged lengths."""
        probe = probe_of(self.hf, lambda: expected_rows(self.hf, self.sizes))
        return lambda model: prove_rows(model, probe)


def decoder_sizes(config: Any) -> Sizes:
    """Return the sizes, or raise `ModelRefusedError` naming the layer and the feature."""
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
    return Sizes(
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
