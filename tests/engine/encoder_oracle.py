"""Answers requests to encoders with transformers' own forward, one at a time; and prompts to ask with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from promptd_store import PromptArtifact, PromptKind, encode
from torch import nn
from transformers import DynamicCache

from promptd.engine.config import EngineConfig
from promptd.engine.engine import Engine
from promptd.engine.request import Output, Request
from tests.engine.harness import frozen

FIRST, LAST, MASK = 320, 321, 322  # the tiny tokenizer's special tokens
TOLERANCE = 1e-4


@functools.cache
def oracle(folder: Path) -> Any:
    """The same weights under transformers' eager attention, untouched by promptd."""
    config = hf.AutoConfig.from_pretrained(folder)
    cls = getattr(hf, config.architectures[0])
    return cls.from_pretrained(folder, attn_implementation="eager").eval()


def random_head(name: str, hidden: int, classes: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A head in the layout of BERT's or RoBERTa's classifier."""
    shapes: dict[str, tuple[int, ...]] = {"weight": (classes, hidden), "bias": (classes,)}
    if name == "roberta":
        shapes = {f"out_proj.{part}": shape for part, shape in shapes.items()}
        shapes |= {"dense.weight": (hidden, hidden), "dense.bias": (hidden,)}
    return {f"head.{part}": torch.randn(shape, generator=generator) for part, shape in shapes.items()}


@functools.cache
def library(folder: Path, family: str) -> tuple[PromptArtifact, ...]:
    """Distinct prompts of ragged sizes: four soft ones (two of them behind the first token, two with a head), three
    prefixes (one with a head), a text."""
    spec = frozen(folder).spec
    generator = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def head(classes: int) -> dict[str, torch.Tensor]:
        return random_head(family, spec.hidden_size, classes, generator)

    prompts = [
        encode("soft", randn(3, spec.hidden_size)),
        encode("soft", randn(9, spec.hidden_size), prompt_after_bos=True),
        encode("soft", {"prompt_embeddings": randn(1, spec.hidden_size), **head(5)}),
        encode("soft", {"prompt_embeddings": randn(6, spec.hidden_size), **head(2)}, prompt_after_bos=True),
    ]
    for count, extra in ((1, {}), (4, {}), (11, head(4))):
        prefix = randn(spec.num_layers, 2, spec.num_kv_heads, count, spec.head_dim)
        prompts.append(encode("prefix", {"prefix": prefix, **extra}))
    return (*prompts, encode("text", text="the quick brown fox"))


def make_engine(folder: Path, *, prompt_tokens: int = 64, strict: bool = False, **limits: int) -> Engine:
    """An engine; a slot that is read before it was written is a NaN."""
    model = frozen(folder, strict=strict)
    cache_bytes = prompt_tokens * model.bytes_per_slot
    engine = Engine(model, EngineConfig(prompt_cache_bytes=cache_bytes, strict=strict, **limits))
    for stored in (engine.pool.keys, engine.pool.values):
        stored.fill_(torch.nan)
    return engine


def run(engine: Engine, requests: Sequence[Request]) -> list[Output]:
    """Answer all in mixed batches, checking every pool after each step."""
    found: dict[str, Output] = {}
    for request in requests:
        engine.add_request(request)
    while engine.has_work:
        for output in engine.step():
            found[output.request_id] = output
        engine.check_integrity()
    return [found[request.request_id] for request in requests]


@torch.no_grad()
def hidden_states(model: Any, folder: Path, prompts: Sequence[PromptArtifact], token_ids: Sequence[int]) -> Any:
    """Run one row through transformers' model; its whole output, with hidden states."""
    embed = model.get_input_embeddings()
    front = []
    cache, num_prefix = DynamicCache(config=model.config), 0
    for prompt in prompts:
        if prompt.kind is PromptKind.PREFIX:
            prefix = prompt.tensors["prefix"]
            num_prefix += prefix.shape[3]
            for layer in range(prefix.shape[0]):
                cache.update(prefix[layer, :1], prefix[layer, 1:], layer)
        elif prompt.kind is PromptKind.SOFT:
            front.append(prompt.tensors["prompt_embeddings"])
        else:
            ids = frozen(folder).encode(prompt.manifest.text or "", add_special_tokens=False)
            front.append(embed(torch.tensor(ids)))
    own = embed(torch.tensor(token_ids))
    standing = [prompt for prompt in prompts if prompt.kind is not PromptKind.PREFIX]
    after_first = bool(standing) and standing[0].manifest.prompt_after_bos and token_ids[0] == FIRST
    at = 1 if after_first else 0
    embeds = torch.cat([own[:at], *front, own[at:]])
    offset = model.config.pad_token_id + 1 if model.config.model_type == "roberta" else 0
    positions = torch.arange(num_prefix, num_prefix + len(embeds)) + offset
    return model(
        inputs_embeds=embeds[None], position_ids=positions[None], past_key_values=cache, output_hidden_states=True
    )


def read_under(model: Any, prompt: torch.Tensor | None, token_ids: Sequence[int]) -> Any:
    """Read one text under what is being learned, with autograd; the output of transformers' base model.

    The prompt is soft `[n, hidden_size]`, behind the first token, or a prefix `[num_layers, 2, num_kv_heads, n,
    head_dim]`.
    """
    embeds = model.get_input_embeddings()(torch.tensor(token_ids)).detach()
    cache, first = DynamicCache(config=model.config), 0
    if prompt is not None and prompt.dim() == 2:
        embeds = torch.cat([embeds[:1], prompt, embeds[1:]])
    elif prompt is not None:
        first = prompt.shape[3]
        for layer, (key, value) in enumerate(prompt):
            cache.update(key[None], value[None], layer)
    offset = model.config.pad_token_id + 1 if model.config.model_type == "roberta" else 0
    positions = torch.arange(first, first + len(embeds)) + offset
    return model.base_model(inputs_embeds=embeds[None], position_ids=positions[None], past_key_values=cache)


def class_scores(folder: Path, prompts: Sequence[PromptArtifact], token_ids: Sequence[int]) -> torch.Tensor:
    """Logits of the classes `[num_classes]`, by the head of the last prompt or else by the model's own."""
    model = oracle(folder)
    head = prompts[-1].head if prompts else {}
    kept = model.classifier
    try:
        if "weight" in head:
            model.classifier = _linear(head["weight"], head["bias"])
        elif head:
            model.classifier = type(kept)(model.config).eval()
            model.classifier.dense = _linear(head["dense.weight"], head["dense.bias"])
            model.classifier.out_proj = _linear(head["out_proj.weight"], head["out_proj.bias"])
        return hidden_states(model, folder, prompts, token_ids).logits[0]
    finally:
        model.classifier = kept


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return linear
