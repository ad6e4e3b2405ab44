"""Tiny random models of the families that read texts whole, with real tokenizers, written as folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import processors

from tests.tiny_models import VOCAB_SIZE, make_tokenizer

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<mask>")  # the vocabulary's last ids but for <pad>, which is its first
_LAST = VOCAB_SIZE

ENCODER_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE + 3,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 130,
    "initializer_range": 0.3,
    "num_labels": 3,
    "pad_token_id": 0,
}


def make_encoder_tokenizer() -> hf.PreTrainedTokenizerFast:
    """The byte-level tokenizer of the tiny decoders, with `<s> text </s>` around texts and a mask."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(
        {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>", "pad_token": "<|endoftext|>"}
    )
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<s>", "</s>")}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=list(ids.items())
    )
    return tokenizer


ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER_SIZES)),
    "bert-words": lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER_SIZES)),
    "bert-plain": lambda: hf.BertModel(hf.BertConfig(**ENCODER_SIZES)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER_SIZES)),
    "roberta-words": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**ENCODER_SIZES)),
}


def write_model(make: Callable[[], Any], tokenizer: Any, folder: Path, *, seed: int = 0) -> Path:
    """Write a random model whose every parameter counts."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():  # biases and norms start at constants
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
