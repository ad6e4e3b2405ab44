"""What T5 and BART have in common: the text is a source, the answer a target that reads it by cross attention.

A source is read once; the keys and values that cross attention makes of it are stored like any text's. Targets then go
on like a decoder's, each step of all rows in one pass: transformers' decoder is handed a cache that says that its cross
attention has everything, and our attention reads the stored keys instead.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel, PreTrainedTokenizerBase

from promptd.errors import InvalidRequestError
from promptd.modeling.attention import Attends
from promptd.modeling.families.base import Arrangement, Asked, Family, Magnitudes, Sizes
from promptd.modeling.families.source import arrange_source
from promptd.modeling.packed_batch import Virtual
from promptd.modeling.probe import LayerCalls, probe_of
from promptd.modeling.probe_seq2seq import expected_pairs, prove_pairs


class _NoCache(Cache):
    """Keeps nothing: keys and values come back as they are given."""

    def __init__(self) -> None:
        self.layers = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Say that nothing is kept."""
        return 0


class _SourceIsStored(EncoderDecoderCache):
    """Tells a decoder that cross attention needs no projection; the keys it finds are placeholders. Has no state."""

    def __init__(self, sizes: Sizes, placeholder: torch.Tensor) -> None:
        self.self_attention_cache = _NoCache()  # type: ignore[assignment]
        self.cross_attention_cache = DynamicCache()
        for layer in range(sizes.num_layers):
            self.cross_attention_cache.update(placeholder, placeholder, layer)
        self.is_updated = dict.fromkeys(range(sizes.num_layers), True)


class Seq2SeqFamily(Family):
    """An encoder and a decoder."""

    banks = ("target", "source", "cross")

    def __init__(self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> None:
        super().__init__(hf, tokenizer, sizes)
        config, generation = hf.config, hf.generation_config
        starts = [getattr(source, "decoder_start_token_id", None) for source in (generation, config)]
        first = next((start for start in starts if start is not None), config.pad_token_id)
        forced = getattr(generation, "forced_bos_token_id", None)
        self._start = (first,) if forced is None else (first, forced)
        shape = (1, sizes.num_kv_heads, 1, sizes.head_dim)
        self._cache = _SourceIsStored(sizes, torch.zeros(shape, dtype=hf.dtype, device=hf.device))
        self._source = torch.zeros(1, 1, sizes.hidden_size, dtype=hf.dtype, device=hf.device)

    @property
    @abstractmethod
    def encoder(self) -> Any:
        """The stack that reads sources."""

    @property
    @abstractmethod
    def decoder(self) -> Any:
        """The stack that reads targets."""

    @abstractmethod
    def cross_projections(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield each decoder layer's projections of the source to keys and values."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map the decoder's hidden states `[num_rows, hidden_size]` to `[num_rows, vocab_size]`."""

    def place(self, positions: torch.Tensor) -> None:
        """Told the positions `[num_tokens]` of the pass that begins."""

    def arrange(self, asked: Asked, encode: Callable[[str], list[int]]) -> Arrangement:
        """The text, with soft prompts and texts in front, is the source; prefixes are cached. What a soft prompt has
        for the target stands there, in front of its start token."""
        if asked.reading is not None and asked.reading.kind != "words":
            raise InvalidRequestError(
                f"this base model writes texts; it has no {asked.reading.kind} to read off them", param="model"
            )
        found = arrange_source(asked, encode, self.first_ids, is_kept=True)
        softs = [prompt.target_embeddings for prompt in asked.prompts if prompt.target_embeddings is not None]
        starts = list(accumulate((soft.shape[0] for soft in softs), initial=0))
        return replace(
            found,
            target_ids=(0,) * starts[-1] + self._start,
            target_virtual=tuple(map(Virtual, starts, softs)),
            continues_text=False,
        )

    def divide(self, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The text is the source; the target begins with what every one begins with."""
        return token_ids, self._start

    def split_prefix(self, prefix: torch.Tensor) -> dict[str, torch.Tensor]:
        """A prefix of as many layers as the decoder has is the target's own; a longer one has all three banks."""
        own, other = self.sizes.num_layers, self.sizes.num_encoder_layers
        if prefix.shape[0] == own:
            return {"target": prefix}
        return dict(zip(self.banks, prefix.split([own, other, own]), strict=True))

    def read_whole(self, embeds: torch.Tensor, positions: torch.Tensor, batch: Attends) -> torch.Tensor:
        """Read packed sources `[num_tokens, hidden_size]`; return hidden states `[num_tokens, hidden_size]`."""
        self.place(positions)
        hidden: torch.Tensor = self.encoder(inputs_embeds=embeds.unsqueeze(0), batch=batch).last_hidden_state[0]
        return hidden

    def read(
        self, embeds: torch.Tensor, positions: torch.Tensor, logits_index: torch.Tensor, batch: Attends
    ) -> torch.Tensor:
        """Read packed targets `[num_tokens, hidden_size]`; return logits `[num_logits, vocab_size]`."""
        self.place(positions)
        output: Any = self.decoder(
            inputs_embeds=embeds.unsqueeze(0),
            encoder_hidden_states=self._source,
            past_key_values=self._cache,
            use_cache=False,
            batch=batch,
        )
        return self.logits(output.last_hidden_state[0][logits_index])

    def cross_keys(self, hidden: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each layer's keys and values `[1, num_kv_heads, num_tokens, head_dim]` of a source's hidden states."""
        for projections in self.cross_projections():
            key, value = (
                module(hidden).view(1, len(hidden), -1, self.sizes.head_dim).transpose(1, 2) for module in projections
            )
            yield key, value

    def check_layers(self) -> None:
        """Raise `ModelRefusedError` naming the first layer whose attention does not reach our function."""
        ids = torch.zeros(2, dtype=torch.int64, device=self.hf.device)
        embeds = self.hf.get_input_embeddings()(ids)
        for num_layers, is_target in ((self.sizes.num_encoder_layers, False), (self.sizes.num_layers, True)):
            calls = LayerCalls(num_layers, has_cross=is_target)
            with torch.no_grad():
                if is_target:
                    self.read(embeds, ids, ids[:1], calls)
                else:
                    self.read_whole(embeds, ids, calls)
            calls.check(type(self.hf).__name__)

    def prove(self) -> Callable[[Any], Magnitudes]:
        """Sources with and without soft prompts, targets with and without prefixes, of ragged lengths."""
        probe = probe_of(self.hf, lambda: expected_pairs(self.hf, self.sizes))
        return lambda model: prove_pairs(model, probe)


def before(module: nn.Module, **injected: Any) -> None:
    """Hang up a pre-hook that adds arguments to the module's own calls from our passes."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, **injected} if "batch" in kwargs else kwargs

    module.register_forward_pre_hook(hook, with_kwargs=True)
