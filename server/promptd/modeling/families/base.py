"""What a model family tells the rest of the house, so that nobody else asks which family a model is of.

A text is read in up to two ways. A *source* is read whole, each token seeing all others; a *target* is read left to
right and may go on growing. A decoder's text is all target, an encoder's all source; a sequence-to-sequence model has
the text as its source and writes a target that begins with a start token.

Prompts that are keys and values in front of a text, or become that, are *cached*, in one bank for each kind of
attention. In front of a source a soft prompt stands as embeddings in the row itself: there every key depends on the
whole text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from promptd_store import PromptArtifact
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from promptd.errors import InvalidRequestError
from promptd.modeling.attention import Attends
from promptd.modeling.packed_batch import Virtual
from promptd.modeling.readout import Reading, Readout

Bank = Literal["target", "source", "cross"]
"""Which attention reads a prefix: the target's own, the source's own, or the target's to the source."""


@dataclass(frozen=True)
class Sizes:
    """The numbers that a prompt must fit. `num_layers` counts those of the stack that answers."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    num_encoder_layers: int = 0
    """Layers of a second stack, which reads sources; 0 where there is one stack only."""
    has_position_table: bool = True
    """Whether `max_positions` is a limit of the model, and not of what it was trained with."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The parts of one request."""

    prompts: tuple[PromptArtifact, ...]
    token_ids: tuple[int, ...]
    reading: Reading | None = None
    """What shall be read off the text; None where a continuation is wanted."""
    num_public: int = 0
    """Prompts at the chain's beginning that everybody may share."""


@dataclass(frozen=True, slots=True)
class Source:
    """A text that is read whole, soft prompts and all."""

    token_ids: tuple[int, ...]
    """0 where embeddings stand."""
    virtual: tuple[Virtual, ...] = ()
    is_kept: bool = False
    """Whether a target reads it, so that its cross attention keys are stored."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Where the parts of one request go."""

    target_ids: tuple[int, ...] = ()
    """0 where embeddings stand."""
    cached: tuple[PromptArtifact, ...] = ()
    num_public: int = 0
    """Of the cached prompts, from their beginning."""
    bos_token_id: int | None = None
    """Cached first, where the prompts stand behind it."""
    source: Source | None = None
    readout: Readout | None = None
    """What is read off the source, where that is the answer."""
    target_virtual: tuple[Virtual, ...] = ()
    """Soft prompts in front of the target's own tokens."""
    continues_text: bool = True
    """Whether the target is the text itself, so that its own log-probabilities can be told."""


@dataclass(frozen=True, slots=True)
class Magnitudes:
    """The largest |K| and |V| on a probe text, layer by layer in the order of a whole prefix."""

    keys: tuple[float, ...]
    values: tuple[float, ...]


class Family(ABC):
    """One family's ways with one model. Holds no state of any request."""

    banks: ClassVar[tuple[Bank, ...]]
    """The banks of a whole prefix, in the order in which its layers are stored; a prefix of the first alone is one."""
    reads_whole: ClassVar[bool] = False
    """Whether answers are read off sources, and nothing is written."""
    stores_text: ClassVar[bool] = True
    """Whether texts leave keys and values behind."""
    learns_behind_first: ClassVar[bool] = False
    """Whether a soft prompt that is learned stands behind the first token of the text (of `first_ids`)."""

    def __init__(self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> None:
        self.hf = hf
        self.tokenizer = tokenizer
        self.sizes = sizes

    def install(self) -> None:  # noqa: B027 - most families need nothing
        """Hang up forward pre-hooks. Raises `AttributeError` where a target is missing."""

    @abstractmethod
    def arrange(self, asked: Asked, encode: Callable[[str], list[int]]) -> Arrangement:
        """Say where the parts of a request go; `encode` tokenizes without special tokens.

        Raises `InvalidRequestError` for what this family cannot answer.
        """

    @abstractmethod
    def divide(self, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return what of a text is read whole, and what its target begins with."""

    @property
    def first_ids(self) -> frozenset[int]:
        """Tokens that may begin a text, and behind which prompts may stand."""
        return frozenset(
            token_id for token_id in (self.tokenizer.cls_token_id, self.tokenizer.bos_token_id) if token_id is not None
        )

    def begins_after_bos(self, chain: Sequence[PromptArtifact]) -> bool:
        """Whether BOS is cached in front of a chain of prompts, so that the text behind it needs none."""
        return False

    @property
    def class_labels(self) -> tuple[str, ...] | None:
        """The classes that the base model's own head tells apart; None where it has none."""
        return None

    def read(
        self, embeds: torch.Tensor, positions: torch.Tensor, logits_index: torch.Tensor, batch: Attends
    ) -> torch.Tensor:
        """Read packed targets `[num_tokens, hidden_size]`; return logits `[num_logits, vocab_size]`."""
        raise InvalidRequestError("this base model reads texts whole and does not continue them", param="model")

    def read_whole(self, embeds: torch.Tensor, positions: torch.Tensor, batch: Attends) -> torch.Tensor:
        """Read packed sources `[num_tokens, hidden_size]`; return hidden states `[num_tokens, hidden_size]`."""
        raise InvalidRequestError("this base model reads texts from left to right only", param="model")

    def pooled(self, first: torch.Tensor) -> torch.Tensor:
        """Return what a linear classification head reads, of rows' first hidden states `[num_rows, hidden_size]`."""
        raise InvalidRequestError("this base model has no use for a classification head", param="model")

    def check_predicts_words(self, param: str) -> None:
        """Raise `InvalidRequestError` about a field where this model has no head that predicts words at a mask."""
        raise InvalidRequestError(
            "this base model has no head that predicts words, so it cannot tell labels by their words", param=param
        )

    def predict_words(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of the words at masks, `[num_rows, vocab_size]`, of hidden states there."""
        raise InvalidRequestError("this base model has no head that predicts words at a mask", param="model")

    def cross_keys(self, hidden: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each layer's keys and values `[1, num_kv_heads, num_tokens, head_dim]` of a source's hidden states."""
        return iter(())

    def split_prefix(self, prefix: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cut a prefix `[num_layers of its banks, 2, num_kv_heads, n, head_dim]` into its banks."""
        return {self.banks[0]: prefix}

    @abstractmethod
    def check_layers(self) -> None:
        """Raise `ModelRefusedError` naming the first layer whose attention does not reach our function."""

    @abstractmethod
    def prove(self) -> Callable[[Any], Magnitudes]:
        """Answer probe rows with transformers' own forward, before anything is switched.

        Returns what answers the same rows packed, once everything is (it takes the `FrozenModel`), and raises
        `ModelRefusedError` where the answers differ.
        """
