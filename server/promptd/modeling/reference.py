"""The naive oracle: transformers' own forward, one request at a time, its own cache.

It shares no code with the packed path. Used by the load-time probe and by the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

Segment = tuple[str, torch.Tensor]
"""`("soft", [n, hidden_size])`, `("prefix", [num_layers, 2, num_kv_heads, n, head_dim])` or `("text", [n] int64)`."""


class ReferenceRow:
    """One request under transformers' own attention and cache."""

    def __init__(self, hf: PreTrainedModel, chain: Sequence[Segment] = ()) -> None:
        self.hf = hf
        self.cache = DynamicCache(config=hf.config)
        self.num_positions = 0
        self._unread: list[torch.Tensor] = []  # embeddings [n, hidden_size]: what stands side by side is one pass
        for kind, tensor in chain:
            if kind == "prefix":
                self._append_prefix(tensor)
            else:
                self._unread.append(tensor.to(hf.dtype) if kind == "soft" else self._embed(tensor))

    def extend(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Append text tokens and return the logits after each, `[num_tokens, vocab_size]`, fp32."""
        self._unread.append(self._embed(torch.tensor(list(token_ids), device=self.hf.device)))
        return self._read()[-len(token_ids) :]

    def greedy(self, token_ids: Sequence[int], num_new_tokens: int) -> tuple[list[int], torch.Tensor]:
        """Continue greedily; return the new tokens and the logits each was taken from."""
        step = self.extend(token_ids)[-1]
        tokens: list[int] = []
        logits: list[torch.Tensor] = []
        while True:
            tokens.append(int(step.argmax()))
            logits.append(step)
            if len(tokens) == num_new_tokens:
                return tokens, torch.stack(logits)
            step = self.extend(tokens[-1:])[-1]

    @torch.no_grad()
    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        embeds: torch.Tensor = self.hf.get_input_embeddings()(token_ids)
        return embeds

    @torch.no_grad()
    def _read(self) -> torch.Tensor:
        embeds = torch.cat(self._unread)
        self._unread.clear()
        positions = torch.arange(self.num_positions, self.num_positions + len(embeds), device=self.hf.device)
        output: Any = self.hf(
            inputs_embeds=embeds.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.num_positions += len(embeds)
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def _append_prefix(self, prefix: torch.Tensor) -> None:
        if self._unread:
            self._read()
        for layer in range(prefix.shape[0]):
            key, value = prefix[layer].to(self.hf.device, self.hf.dtype).unsqueeze(1)
            self.cache.update(key, value, layer)
        self.num_positions += prefix.shape[3]
