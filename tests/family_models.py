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
        if model.config.is_encoder_decoder:
            _enliven(model)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_PAIR: dict[str, Any] = {"vocab_size": VOCAB_SIZE + 3, "pad_token_id": 0, "eos_token_id": 321}
T5_SIZES: dict[str, Any] = {
    "d_model": 48,
    "d_kv": 12,
    "num_heads": 4,
    "d_ff": 96,
    "num_layers": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "initializer_factor": 1.3,
    **_PAIR,
}
BART_SIZES: dict[str, Any] = {
    "d_model": 48,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 120,
    "init_std": 0.3,
    "decoder_start_token_id": 321,
    "bos_token_id": 320,
    "forced_eos_token_id": None,
    **_PAIR,
}
SEQ2SEQ: dict[str, Callable[[], Any]] = {
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5_SIZES)),
    # num_heads * d_kv != d_model, fewer decoder layers, gated, outputs not scaled: the shapes of FLAN
    "t5-v1.1": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            **{**T5_SIZES, "num_heads": 6, "num_decoder_layers": 3, "feed_forward_proj": "gated-gelu"},
            tie_word_embeddings=False,
        )
    ),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART_SIZES, scale_embedding=True)),
    "mbart": lambda: hf.MBartForConditionalGeneration(
        hf.MBartConfig(**{**BART_SIZES, "encoder_layers": 4, "decoder_layers": 2}, forced_bos_token_id=40)
    ),
}


def _enliven(model: Any) -> None:
    """Weigh down what would make a random decoder say one token for ever: a tied head repeats the token that it reads,
    and behind normalized sums what attention adds at every position prevails."""
    model.get_input_embeddings().weight.mul_(0.1 if hasattr(model, "shared") else 0.3)
    decoder = model.get_decoder()
    for layer in getattr(decoder, "layers", ()):
        layer.encoder_attn.out_proj.weight.mul_(0.15)
        layer.self_attn.out_proj.weight.mul_(0.3)
    if hasattr(decoder, "embed_positions"):
        decoder.embed_positions.weight.mul_(3)
