"""Answers requests to T5 and BART with transformers' own forward, one at a time; and prompts to ask with.

Prefixes of the encoder's and of cross attention, which transformers has no place for, come in through an attention
function of its own: the eager formula over the prefix's keys and the row's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from promptd_store import PromptArtifact, PromptKind, encode
from torch import nn

from tests.engine.harness import frozen

FIRST, LAST = 320, 321
_NAME = "with_prefixes"


@functools.cache
def oracle(folder: Path) -> Any:
    """The same weights, untouched by promptd; attention by the formula below."""
    config = hf.AutoConfig.from_pretrained(folder)
    model = getattr(hf, config.architectures[0]).from_pretrained(folder, attn_implementation="eager").eval()
    for stack, cross in ((model.get_encoder(), False), (model.get_decoder(), True)):
        layers = stack.block if hasattr(stack, "block") else stack.layers
        for number, layer in enumerate(layers):
            if hasattr(stack, "block"):
                sites = [layer.layer[0].SelfAttention, *([layer.layer[1].EncDecAttention] if cross else [])]
            else:
                sites = [layer.self_attn, *([layer.encoder_attn] if cross else [])]
            for site, bank in zip(sites, ("target", "cross") if cross else ("source",), strict=True):
                site.oracle_bank, site.oracle_layer = bank, number
                site.oracle_table = (layers[0].layer[0].SelfAttention,) if hasattr(stack, "block") else ()
    for stack in (model, model.get_encoder(), model.get_decoder()):  # T5's have configurations of their own
        stack.set_attn_implementation(_NAME)
    return model


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    banks: dict[str, torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Softmax over the bank's prefix and the row's keys; T5's bias is made anew for keys further left."""
    bank: Any = module.oracle_bank
    prefix = None if banks is None else banks.get(bank)
    count = 0 if prefix is None else prefix.shape[3]
    if prefix is not None:
        own = prefix[module.oracle_layer]
        key, value = torch.cat([own[:1], key], 2), torch.cat([own[1:], value], 2)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    length, total = query.shape[2], key.shape[2]
    if position_bias is not None and bank != "cross":
        (table,) = module.oracle_table  # type: ignore[misc]
        scores = scores + table.compute_bias(length, total, past_seen_tokens=total - length)  # type: ignore[union-attr]
    if bank == "target":
        at = torch.arange(total)
        scores = scores.masked_fill(at > torch.arange(count, count + length).unsqueeze(1), float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


hf.AttentionInterface.register(_NAME, _attention)


@functools.cache
def library(folder: Path) -> tuple[PromptArtifact, ...]:
    """Distinct prompts of ragged sizes: three soft ones, two prefixes of the decoder alone, two of all banks, a text,
    one prefix once more whose positions do not move the text's, and a soft one for the source and the target."""
    model = frozen(folder)
    spec = model.spec
    generator = torch.Generator().manual_seed(9)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    scale = model.embedding_std
    prompts = [encode("soft", scale * randn(count, spec.hidden_size)) for count in (1, 4, 11)]
    prompts[1] = encode("soft", prompts[1].tensors["prompt_embeddings"], prompt_after_bos=True)
    own, whole = spec.prefix_layers
    for layers, count in ((own, 2), (own, 7), (whole, 3), (whole, 5)):
        prompts.append(encode("prefix", 2 * randn(layers, 2, spec.num_kv_heads, count, spec.head_dim)))
    unshifted = encode("prefix", prompts[5].tensors["prefix"], position_convention="unshifted")
    sides = {"prompt_embeddings": scale * randn(2, spec.hidden_size), "target_embeddings": randn(5, spec.hidden_size)}
    both = encode("soft", {**sides, "target_embeddings": scale * sides["target_embeddings"]})
    return (*prompts, encode("text", text="the quick brown fox"), unshifted, both)


class Row:
    """One request: its source under its prompts, and a target that grows."""

    def __init__(self, folder: Path, prompts: Sequence[PromptArtifact], token_ids: Sequence[int]) -> None:
        self.model = oracle(folder)
        embed = self.model.get_input_embeddings()
        front, target = [], []
        self.banks: dict[str, torch.Tensor] = {}
        self.moved = {"source": 0, "target": 0, "cross": 0}
        for prompt in prompts:
            if prompt.kind is PromptKind.SOFT:
                front.append(prompt.tensors["prompt_embeddings"])
                target += [] if prompt.target_embeddings is None else [prompt.target_embeddings]
            elif prompt.kind is PromptKind.TEXT:
                ids = frozen(folder).encode(prompt.manifest.text or "", add_special_tokens=False)
                front.append(embed(torch.tensor(ids)))
            else:
                is_shifted = prompt.manifest.position_convention == "shifted"
                for bank, part in self._parts(prompt.tensors["prefix"]).items():
                    self.banks[bank] = torch.cat([self.banks[bank], part], 3) if bank in self.banks else part
                    self.moved[bank] += part.shape[3] * is_shifted
        standing = [prompt for prompt in prompts if prompt.kind is not PromptKind.PREFIX]
        at = 1 if standing and standing[0].manifest.prompt_after_bos and token_ids[0] == FIRST else 0
        own = embed(torch.tensor(token_ids))
        self.embeds = torch.cat([own[:at], *front, own[at:]]).detach()
        self.target_embeds = torch.cat([own[:0], *target]).detach()

    def _parts(self, prefix: torch.Tensor) -> dict[str, torch.Tensor]:
        config = self.model.config
        own = getattr(config, "num_decoder_layers", None) or config.decoder_layers
        if len(prefix) == own:
            return {"target": prefix}
        return {"target": prefix[:own], "source": prefix[own:-own], "cross": prefix[-own:]}

    @torch.no_grad()
    def logits(self, target_ids: Sequence[int]) -> torch.Tensor:
        """All logits of the target, `[num_tokens, vocab_size]`, in one pass without any cache."""
        handles = [
            self._count_from(stack.embed_positions, self.moved[bank])
            for stack, bank in ((self.model.get_encoder(), "source"), (self.model.get_decoder(), "target"))
            if hasattr(stack, "embed_positions")
        ]
        try:
            own = self.model.get_input_embeddings()(torch.tensor(list(target_ids)))
            output = self.model(
                inputs_embeds=self.embeds[None],
                decoder_inputs_embeds=torch.cat([self.target_embeds, own])[None],
                banks=self.banks,
                use_cache=False,
            )
        finally:
            for handle in handles:
                handle.remove()
        return output.logits[0, len(self.target_embeds) :]  # type: ignore[no-any-return]

    def logits_of(self, start: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """The logits that each of these new tokens is to be taken from, `[num_tokens, vocab_size]`."""
        return self.logits((*start, *tokens[:-1]))[-len(tokens) :]

    @staticmethod
    def _count_from(table: nn.Module, first: int) -> Any:
        """BART's learned positions begin behind the prefix."""

        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            given = kwargs.get("position_ids")
            count = args[0].shape[1] if given is None else given.shape[-1]
            return args, {**kwargs, "position_ids": torch.arange(first, first + count)}

        return table.register_forward_pre_hook(hook, with_kwargs=True)

    def greedy(self, start: Sequence[int], num_new_tokens: int) -> tuple[list[int], torch.Tensor]:
        """Continue greedily; return the new tokens and the logits each was taken from."""
        ids, rows = list(start), []
        for _ in range(num_new_tokens):
            rows.append(self.logits(ids)[-1])
            ids.append(int(rows[-1].argmax()))
        return ids[len(start) :], torch.stack(rows)
