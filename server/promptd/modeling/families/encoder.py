"""Encoders (BERT, RoBERTa, MiniLM): texts read whole; classes, words at a mask or an embedding read off them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from promptd_store import PromptArtifact
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from promptd.errors import InvalidRequestError, ModelRefusedError
from promptd.modeling.attention import Attends
from promptd.modeling.families.base import Arrangement, Asked, Family, Magnitudes, Sizes
from promptd.modeling.families.heads import Head, artifact_head, base_head, pooled
from promptd.modeling.families.source import arrange_source
from promptd.modeling.packed_batch import Virtual
from promptd.modeling.probe import LayerCalls, probe_of
from promptd.modeling.probe_sources import ProbeSource, prove_sources
from promptd.modeling.readout import ClassReadout, EmbeddingReadout, Reading, Readout, WordReadout

#: Type -> whether positions begin behind the padding id.
ENCODER_TYPES = {"bert": False, "roberta": True, "xlm-roberta": True, "camembert": True}


@dataclass(frozen=True, slots=True)
class Pooling:
    """How a sentence encoder makes one vector of a text: sentence-transformers' modules.json."""

    kind: Literal["mean", "cls"] = "mean"
    is_normalized: bool = False


def encoder_sizes(config: Any) -> Sizes:
    """Return the sizes, or raise `ModelRefusedError` naming the feature."""
    if getattr(config, "position_embedding_type", "absolute") not in (None, "absolute"):
        raise ModelRefusedError(f"layer 0: position_embedding_type {config.position_embedding_type!r} is not served")
    begins_behind_padding = ENCODER_TYPES[config.model_type]
    heads = config.num_attention_heads
    return Sizes(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=heads,
        num_kv_heads=heads,
        head_dim=config.hidden_size // heads,
        max_positions=config.max_position_embeddings - (config.pad_token_id + 1 if begins_behind_padding else 0),
    )


def encoder_class(config: Any) -> Any:
    """Return the auto class whose heads the checkpoint has."""
    architecture = (config.architectures or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    if architecture.endswith(("ForMaskedLM", "ForPreTraining")):
        return AutoModelForMaskedLM
    return AutoModel


def read_pooling(folder: Path) -> Pooling:
    """Read how sentence-transformers would pool; plain models are pooled by the mean, as it does with them.

    Raises `ModelRefusedError` for modules that are not implemented.
    """
    modules = folder / "modules.json"
    pooling = Pooling()
    for module in json.loads(modules.read_text()) if modules.is_file() else []:
        name = module["type"].rpartition(".")[2]
        if name == "Pooling":
            config = json.loads((folder / module["path"] / "config.json").read_text())
            modes = {key for key, value in config.items() if key.startswith("pooling_mode_") and value is True}
            kinds = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
            if len(modes) != 1 or not modes <= set(kinds):
                raise ModelRefusedError(f"{modules.parent.name}: pooling {sorted(modes)} is not implemented")
            pooling = replace(pooling, kind=kinds[modes.pop()])  # type: ignore[arg-type]
        elif name == "Normalize":
            pooling = replace(pooling, is_normalized=True)
        elif name != "Transformer":
            raise ModelRefusedError(f"{modules.parent.name}: sentence-transformers' {name} is not implemented")
    return pooling


class EncoderFamily(Family):
    """A text is its own source; soft prompts stand in it, prefixes in front of it in every layer."""

    banks = ("source",)
    reads_whole = True
    stores_text = False
    learns_behind_first = True

    def __init__(self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sizes: Sizes, pooling: Pooling) -> None:
        super().__init__(hf, tokenizer, sizes)
        self._pooling = pooling
        self._position_offset = hf.config.pad_token_id + 1 if ENCODER_TYPES[hf.config.model_type] else 0

    def arrange(self, asked: Asked, encode: Callable[[str], list[int]]) -> Arrangement:
        """The text is the source, and what is read off it the answer."""
        if asked.reading is None:
            raise InvalidRequestError("this base model reads texts whole and does not continue them", param="model")
        found = arrange_source(asked, encode, self.first_ids, is_kept=False)
        return replace(found, readout=self._readout(asked, asked.reading, found), continues_text=False)

    def divide(self, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """All is source."""
        return token_ids, ()

    def _readout(self, asked: Asked, reading: Reading, found: Arrangement) -> Readout:
        source = found.source
        ids = source.token_ids if source is not None else ()
        virtual = source.virtual if source is not None else ()
        if reading.kind == "classes":
            return ClassReadout(self._head(asked.prompts))
        stand_in = {at for part in virtual for at in range(part.offset, part.offset + part.embeds.shape[0])}
        text = tuple(at for at in range(len(ids)) if at not in stand_in)
        if reading.kind == "embedding":
            return EmbeddingReadout(text, self._pooling.kind, self._pooling.is_normalized)
        return self._words(reading, [at for at in text if ids[at] == self.tokenizer.mask_token_id])

    def _head(self, prompts: tuple[PromptArtifact, ...]) -> Head:
        head = artifact_head(self.hf, prompts[-1]) if prompts else None
        head = head or base_head(self.hf)
        if head is None:
            raise InvalidRequestError(
                "neither the prompt nor the base model has a classification head; give 'labels' with label words",
                param="labels",
            )
        return head

    def _words(self, reading: Reading, masks: list[int]) -> WordReadout:
        self.check_predicts_words("candidates")
        for word in reading.candidates:
            if len(word) != 1:
                raise InvalidRequestError(
                    f"a word at a mask is one token, {self.tokenizer.decode(list(word))!r} has {len(word)}",
                    param="candidates",
                )
        if len(masks) != 1:
            raise InvalidRequestError(
                f"label words are read at one {self.tokenizer.mask_token}, the text has {len(masks)}", param="prompt"
            )
        return WordReadout(self.predict_words, masks[0], tuple(word[0] for word in reading.candidates))

    def predict_words(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the masked-language-model head's logits, `[num_rows, vocab_size]`."""
        self.check_predicts_words("model")
        logits: torch.Tensor = self._predictor(hidden)  # type: ignore[misc]
        return logits

    def check_predicts_words(self, param: str) -> None:
        """Raise `InvalidRequestError` about a field where the checkpoint has no such head."""
        if self._predictor is None:
            super().check_predicts_words(param)

    @property
    def _predictor(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        return getattr(self.hf, "lm_head", None) or getattr(getattr(self.hf, "cls", None), "predictions", None)

    @property
    def class_labels(self) -> tuple[str, ...] | None:
        """The names in the config, where the checkpoint has a head."""
        if base_head(self.hf) is None:
            return None
        names: dict[int, str] = self.hf.config.id2label  # type: ignore[assignment]
        return tuple(names[index] for index in range(len(names)))

    def read_whole(self, embeds: torch.Tensor, positions: torch.Tensor, batch: Attends) -> torch.Tensor:
        """Read packed sources `[num_tokens, hidden_size]`; return hidden states `[num_tokens, hidden_size]`."""
        output: Any = self.hf.base_model(
            inputs_embeds=embeds.unsqueeze(0),
            position_ids=(positions + self._position_offset).unsqueeze(0),
            batch=batch,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def pooled(self, first: torch.Tensor) -> torch.Tensor:
        """The pooler's output where the model has one, else the states themselves."""
        return pooled(self.hf, first)

    def check_layers(self) -> None:
        """Raise `ModelRefusedError` naming the first layer whose attention does not reach our function."""
        calls = LayerCalls(self.sizes.num_layers)
        ids = torch.zeros(2, dtype=torch.int64, device=self.hf.device)
        with torch.no_grad():
            self.read_whole(self.hf.get_input_embeddings()(ids), ids, calls)
        calls.check(type(self.hf).__name__)

    def prove(self) -> Callable[[Any], Magnitudes]:
        """Bare rows and rows with soft prompts and prefixes, of ragged lengths: all hidden states."""
        probe = probe_of(self.hf, self._expected_sources)
        return lambda model: prove_sources(model, probe)

    @torch.no_grad()
    def _expected_sources(self) -> list[ProbeSource]:
        sizes, hf = self.sizes, self.hf
        generator = torch.Generator().manual_seed(0)
        rows = []
        for length, count, offset, num_prefix in (
            (48, 0, 0, 0),
            (7, 5, 0, 0),
            (9, 3, 1, 0),
            (4, 0, 0, 3),
            (1, 2, 0, 2),
        ):
            ids = torch.randint(0, hf.config.vocab_size, (length + count,), generator=generator).to(hf.device)
            embeds = hf.get_input_embeddings()(ids)
            embeds[offset : offset + count] *= 1.1
            shape = (sizes.num_layers, 2, sizes.num_kv_heads, num_prefix, sizes.head_dim)
            prefix = torch.randn(shape, generator=generator).to(hf.device, hf.dtype)
            cache = DynamicCache(config=hf.config)
            for layer in range(sizes.num_layers) if num_prefix else ():
                cache.update(prefix[layer, :1], prefix[layer, 1:], layer)
            positions = torch.arange(num_prefix, num_prefix + len(ids), device=hf.device) + self._position_offset
            output: Any = hf.base_model(
                inputs_embeds=embeds.unsqueeze(0), position_ids=positions.unsqueeze(0), past_key_values=cache
            )
            virtual = (Virtual(offset, embeds[offset : offset + count]),) if count else ()
            rows.append(ProbeSource(ids.tolist(), virtual, prefix, output.last_hidden_state[0].float()))
        return rows
