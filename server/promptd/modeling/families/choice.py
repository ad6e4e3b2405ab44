"""Which family a config belongs to, and which class of transformers loads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from promptd.modeling.families.base import Family, Sizes
from promptd.modeling.families.decoder import DecoderFamily, decoder_sizes
from promptd.modeling.families.encoder import ENCODER_TYPES, EncoderFamily, encoder_class, encoder_sizes, read_pooling

MakeFamily = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Path], Family]


@dataclass(frozen=True, slots=True)
class Choice:
    """How one model is loaded and served."""

    auto_class: Any
    sizes: Sizes
    make: MakeFamily
    takes_head: bool = False
    """Whether a classification head may come with a prompt."""

    def drop_missing(self, hf: PreTrainedModel, missing: set[str]) -> set[str]:
        """Take out a pooler that the checkpoint does not have; return the other tensors that it lacks."""
        poolers = {name for name in missing if ".pooler." in f".{name}"}
        if poolers:
            hf.base_model.pooler = None  # type: ignore[assignment]
        return missing - poolers


def choose(config: Any) -> Choice:
    """Return the family's choice, or raise `ModelRefusedError` naming the layer and the feature."""
    if config.model_type in ENCODER_TYPES and not getattr(config, "is_decoder", False):
        sizes = encoder_sizes(config)
        return Choice(
            encoder_class(config),
            sizes,
            lambda hf, tokenizer, folder: EncoderFamily(hf, tokenizer, sizes, read_pooling(folder)),
            takes_head=True,
        )
    sizes = decoder_sizes(config)
    return Choice(AutoModelForCausalLM, sizes, lambda hf, tokenizer, folder: DecoderFamily(hf, tokenizer, sizes))
