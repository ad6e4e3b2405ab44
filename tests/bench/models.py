"""The models of the bench: one set of random weights, written once, read by every contender."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from promptd.demo import DEMO_MODEL_PATH
from promptd.modeling import FrozenModel, PackedBatch, load_model
from tests.tiny_models import make_tiny_model, make_tokenizer


def folder_of(name: str, root: Path) -> Path:
    """Return the folder of a model, made on first use.

    `demo` is the embedded model; where it is not there, random weights of its shape.
    """
    if name == "demo" and (DEMO_MODEL_PATH / "config.json").exists():
        return DEMO_MODEL_PATH
    logging.disable_progress_bar()
    folder = root / name
    if not (folder / "tokenizer.json").exists():
        if name == "tiny":
            return make_tiny_model(folder, "gpt2")
        torch.manual_seed(0)
        _MAKERS[name]().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return folder


def _gpt2_small() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(initializer_range=0.05))  # lively enough that answers differ


def _demo_shape() -> LlamaForCausalLM:
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 5, "vocab_size": 4096}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0))


def _qwen2_small() -> Qwen2ForCausalLM:
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151_936}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    more = {"tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.05}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, **more))  # type: ignore[arg-type]
    return model.to(torch.bfloat16)  # as Qwen's is published, and most models are; GPT-2's is float32


_MAKERS = {"gpt2-small": _gpt2_small, "qwen2-0.5b": _qwen2_small, "demo": _demo_shape}


@functools.cache
def frozen(folder: Path) -> FrozenModel:
    """The model as promptd loads it, once a process, with a stopwatch around its forward pass."""
    model = load_model(folder)
    return TimedModel(**{field.name: getattr(model, field.name) for field in dataclasses.fields(FrozenModel)})


class TimedModel(FrozenModel):
    """Adds up the seconds inside the packed forward pass: everything from the batch's tensors to its logits."""

    def forward_packed(self, batch: PackedBatch) -> torch.Tensor:
        """Run the step, and note how long it took."""
        began = time.perf_counter()
        logits = super().forward_packed(batch)
        FORWARD_SECONDS.append(time.perf_counter() - began)
        return logits


FORWARD_SECONDS: list[float] = []
"""One entry a step since somebody last cleared it."""
