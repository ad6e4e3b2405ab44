"""What is pre-trained: a small model of each architecture, and what a window of text becomes for it.

    llama   the next token of the window                                    (the embedded model)
    t5      spans that are cut out of it, each named by a sentinel          Raffel et al. 2020, section 3.1.4
    bart    the whole window, from one with a mask in each span's place     Lewis et al. 2020, text infilling

A T5 that is to be prompted goes on as a prefix language model, the second half of a window from its first (Lester et
al. 2021, section 3.2: LM adaptation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

EOS_ID = 0
NUM_SENTINELS = 32
SENTINELS = [f"<extra_id_{number}>" for number in range(NUM_SENTINELS)]
"""Behind the vocabulary; BART's mask is the first."""

Window = np.ndarray[Any, np.dtype[np.int64]]
Pair = tuple[Window | None, Window]
"""What is read whole, if anything, and what is told from left to right behind an end-of-text token or a first token."""


@dataclass(frozen=True)
class Noise:
    """How much of a window is cut out."""

    share: float
    mean_length: float

    def spans(self, length: int, rng: np.random.Generator) -> tuple[Window, Window]:
        """Return the lengths of kept and of cut spans, which take turns; their sums do not depend on chance."""
        num_cut = round(self.share * length)
        count = min(NUM_SENTINELS, max(1, round(num_cut / self.mean_length)))
        return _parts(length - num_cut, count, rng), _parts(num_cut, count, rng)


def _parts(total: int, count: int, rng: np.random.Generator) -> Window:
    """Cut a number into `count` positive parts, each way as likely."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def next_token(window: Window, vocab_size: int, rng: np.random.Generator) -> Pair:
    """All of it is told."""
    return None, window


def span_corruption(window: Window, vocab_size: int, rng: np.random.Generator, noise: Noise = Noise(0.15, 3.0)) -> Pair:
    """Sentinels stand for what is cut out, and name it."""
    source, target, at = [], [], 0
    for number, (kept, cut) in enumerate(zip(*noise.spans(len(window), rng), strict=True)):
        sentinel = np.array([vocab_size + number])
        source += [window[at : at + kept], sentinel]
        target += [sentinel, window[at + kept : at + kept + cut]]
        at += kept + cut
    return np.concatenate(source), np.concatenate([[EOS_ID], *target, [EOS_ID]])


def infilling(window: Window, vocab_size: int, rng: np.random.Generator, noise: Noise = Noise(0.3, 3.0)) -> Pair:
    """One mask stands for each span that is cut out; the window is told."""
    source, at = [], 0
    for kept, cut in zip(*noise.spans(len(window), rng), strict=True):
        source += [window[at : at + kept], np.array([vocab_size])]
        at += kept + cut
    return np.concatenate(source), np.concatenate([[EOS_ID], window])


def prefix_lm(window: Window, vocab_size: int, rng: np.random.Generator) -> Pair:
    """The first half is read, the second told."""
    half = len(window) // 2
    return window[:half], np.concatenate([[EOS_ID], window[half:]])


OBJECTIVES: Mapping[str, Callable[[Window, int, np.random.Generator], Pair]] = {
    "next_token": next_token,
    "span_corruption": span_corruption,
    "infilling": infilling,
    "prefix_lm": prefix_lm,
}


def _llama(vocab_size: int, size: int, num_layers: int) -> PreTrainedModel:
    """RoPE, RMSNorm, SwiGLU, grouped-query attention, tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=size,
            num_hidden_layers=num_layers,
            num_attention_heads=size // 64,
            num_key_value_heads=max(1, size // 128),
            intermediate_size=3 * size,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=EOS_ID,
            eos_token_id=EOS_ID,
            pad_token_id=None,
        )
    )


def _t5(vocab_size: int, size: int, num_layers: int) -> PreTrainedModel:
    """Relative positions, RMSNorm, ReLU, tied embeddings; as many layers on either side."""
    config = T5Config(
        vocab_size=vocab_size + NUM_SENTINELS,
        d_model=size,
        d_kv=64,
        num_heads=size // 64,
        d_ff=3 * size,
        num_layers=num_layers,
        dropout_rate=0.0,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    config.decoder_start_token_id = EOS_ID  # its signature has none
    return T5ForConditionalGeneration(config)


def _bart(vocab_size: int, size: int, num_layers: int) -> PreTrainedModel:
    """Learned positions, LayerNorm behind each sum, GELU, tied embeddings."""
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=vocab_size + NUM_SENTINELS,
            d_model=size,
            encoder_layers=num_layers,
            decoder_layers=num_layers,
            encoder_attention_heads=size // 64,
            decoder_attention_heads=size // 64,
            encoder_ffn_dim=3 * size,
            decoder_ffn_dim=3 * size,
            max_position_embeddings=512,
            dropout=0.0,
            decoder_start_token_id=EOS_ID,
            bos_token_id=EOS_ID,
            eos_token_id=EOS_ID,
            pad_token_id=EOS_ID,
            forced_eos_token_id=None,
        )
    )


@dataclass(frozen=True)
class Shape:
    """An architecture and what it is pre-trained for."""

    build: Callable[[int, int, int], PreTrainedModel]
    """Of (vocabulary, width, layers of a side)."""
    objective: str
    sentinels: tuple[str, ...] = ()


SHAPES: Mapping[str, Shape] = {
    "llama": Shape(_llama, "next_token"),
    "t5": Shape(_t5, "span_corruption", tuple(SENTINELS)),
    "bart": Shape(_bart, "infilling", tuple(SENTINELS)),
}


@torch.no_grad()
def take_embeddings(model: PreTrainedModel, folder: Path) -> None:
    """Begin with another model's embeddings of the same tokens, brought to the scale of this one's."""
    tensors = load_file(folder / "model.safetensors")
    theirs = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")).float()
    own: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    own[: len(theirs)] = theirs * (own.std() / theirs.std())


def loss_of(model: PreTrainedModel, source: torch.Tensor | None, told: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of all but the first token told; bf16 matrix products, fp32 softmax.

    `source` is `[num_rows, length]` or None, `told` `[num_rows, length]`.
    """
    inputs = {"input_ids": told[:, :-1]} if source is None else {"input_ids": source, "decoder_input_ids": told[:, :-1]}
    with torch.autocast(told.device.type, dtype=torch.bfloat16):
        logits = model(**inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), told[:, 1:].flatten())
