"""Tiny random models of real architectures, with a real byte-level tokenizer, written as folders."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB_SIZE = 320
FAMILIES = ("gpt2", "llama", "qwen2")

_TEXT = [
    "the quick brown fox jumps over the lazy dog and the restaurant near the river is cheap",
    "book a table for two people, play some music, what is the weather in the city tomorrow",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 entries; id 0 is BOS and EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def adding_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy that puts BOS in front of every text, as Llama's does."""
    adds = copy.deepcopy(tokenizer)
    bos = str(adds.bos_token)
    adds.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, adds.bos_token_id)]
    )
    return adds


def _config_model(family: str, max_positions: int) -> PreTrainedModel:
    shared = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=3, n_head=4, n_positions=max_positions, **shared))
    decoder = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_positions,
        **shared,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(head_dim=16, **decoder))
    return Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **decoder))


def make_tiny_model(folder: Path, family: str = "llama", *, seed: int = 0, max_positions: int = 256) -> Path:
    """Write a tiny random model of `family` (gpt2, llama with GQA, qwen2) with its tokenizer to `folder`."""
    torch.manual_seed(seed)
    model = _config_model(family, max_positions)
    with torch.no_grad():  # biases and norms start at constants: make every parameter count
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
