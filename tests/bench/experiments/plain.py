"""Models as transformers runs them, over padded batches: what changes their weights is trained through these.

One class a family; each takes what promptd's own passes take, `PromptedTexts` without a prompt, and returns the same
logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from promptd.modeling import FrozenModel
from promptd.training import PromptedTexts
from promptd.training.methods.headed import HEAD_STD
from tests.bench.peers import quiet


class Plain(ABC):
    """The plain model of a folder."""

    head: nn.Linear | None = None
    """Over what the model pools, where classes are told; it learns beside whatever else does."""
    continues_texts = True
    """Whether what is generated stands behind the text, so that padding stands in front of it."""

    def __init__(self, model: FrozenModel, folder: Path) -> None:
        with quiet():
            self.hf: Any = type(model.hf).from_pretrained(folder, dtype=torch.float32)
        self.hf.eval()  # no dropout, as for prompts

    @abstractmethod
    def logits(self, asked: PromptedTexts) -> torch.Tensor:
        """Return the logits that are asked for, float32, with autograd to the weights."""

    @torch.no_grad()
    def generate(self, texts: Sequence[Sequence[int]], max_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        """Return greedy continuations, in one batch."""
        ids, mask = _padded(texts, in_front=self.continues_texts)
        with quiet():
            made = self.hf.generate(
                input_ids=ids, attention_mask=mask.long(), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0,
                eos_token_id=list(stop_ids),
            )  # fmt: skip
        answers: list[list[int]] = made[:, ids.shape[1] if self.continues_texts else 1 :].tolist()  # 1: the start token
        return answers


class PlainDecoder(Plain):
    """Texts are read left to right."""

    def logits(self, asked: PromptedTexts) -> torch.Tensor:
        """`[num_logits, vocab_size]`."""
        ids, kept = _padded(asked.texts)
        # Padding stands behind a row's own tokens: causality hides it, no mask is needed.
        hidden = self.hf.base_model(input_ids=ids, use_cache=False).last_hidden_state[kept]
        logits: torch.Tensor = self.hf.get_output_embeddings()(hidden[asked.logits_index]).float()
        return logits


class PlainPairs(Plain):
    """Sources are read whole, and targets go on from them."""

    continues_texts = False

    def logits(self, asked: PromptedTexts) -> torch.Tensor:
        """`[num_logits, vocab_size]`."""
        sources = [asked.sources[at % len(asked.sources)] for at in range(len(asked.texts))]
        ids, mask = _padded(sources)
        targets, kept = _padded(asked.texts)
        output = self.hf(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=targets, use_cache=False)
        logits: torch.Tensor = output.logits[kept][asked.logits_index].float()
        return logits


class PlainEncoder(Plain):
    """Texts are read whole, and a linear head tells their classes."""

    head: nn.Linear

    def __init__(self, model: FrozenModel, folder: Path, num_classes: int, seed: int) -> None:
        """The head starts as the one that is learned beside a prompt."""
        super().__init__(model, folder)
        self.head = nn.Linear(model.spec.hidden_size, num_classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=generator) * HEAD_STD)
            self.head.bias.zero_()

    def logits(self, asked: PromptedTexts) -> torch.Tensor:
        """`[num_sources, num_classes]`."""
        ids, mask = _padded(asked.sources, pad=self.hf.config.pad_token_id or 0)
        first = self.hf.base_model(input_ids=ids, attention_mask=mask.long()).last_hidden_state[:, 0]
        pooler = getattr(self.hf.base_model, "pooler", None)
        logits: torch.Tensor = self.head(first if pooler is None else pooler(first.unsqueeze(1)))
        return logits


def plain_of(model: FrozenModel, folder: Path, *, num_classes: int = 0, seed: int = 0) -> Plain:
    """Return the plain model of a promptd model's folder."""
    if model.reads_whole:
        return PlainEncoder(model, folder, num_classes, seed)
    return (PlainPairs if model.has_sources else PlainDecoder)(model, folder)


def _padded(
    texts: Sequence[Sequence[int]], *, in_front: bool = False, pad: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and where they are texts' own, both `[num_texts, longest]`."""
    longest = max(map(len, texts))
    ids = torch.full((len(texts), longest), pad)
    own = torch.zeros(len(texts), longest, dtype=torch.bool)
    for at, text in enumerate(texts):
        where = slice(longest - len(text), longest) if in_front else slice(0, len(text))
        ids[at, where] = torch.tensor(list(text), dtype=torch.int64)
        own[at, where] = True
    return ids, own
