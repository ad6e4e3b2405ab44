"""Which family a config belongs to, and which class of transformers loads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from promptd.errors import ModelRefusedError
from promptd.modeling.families.bart import BART_TYPES, BartFamily, bart_sizes
from promptd.modeling.families.base import Family, Sizes
from promptd.modeling.families.decoder import DecoderFamily, decoder_sizes
from promptd.modeling.families.encoder import ENCODER_TYPES, EncoderFamily, encoder_class, encoder_sizes, read_pooling
from promptd.modeling.families.t5 import T5_TYPES, T5Family, t5_sizes

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
    if getattr(config, "is_encoder_decoder", False):
        return _choose_seq2seq(config)
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


def _choose_seq2seq(config: Any) -> Choice:
    family: type[T5Family] | type[BartFamily]
    if config.model_type in T5_TYPES:
        family, sizes = T5Family, t5_sizes(config)
    elif config.model_type in BART_TYPES:
        family, sizes = BartFamily, bart_sizes(config)
    else:
        raise ModelRefusedError(f"{config.model_type}: of encoder-decoder models {T5_TYPES + BART_TYPES} are served")
    return Choice(AutoModelForSeq2SeqLM, sizes, lambda hf, tokenizer, folder: family(hf, tokenizer, sizes))
