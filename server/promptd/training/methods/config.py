"""What the settings of all methods have in common; each method's file adds its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from promptd_store.strict_json import shown

from promptd.errors import InvalidRequestError
from promptd.training.checks import Count, Positive, Rule, check_fields

Init = Literal["sampled_vocabulary", "random_uniform", "class_labels", "text"]

MAX_VIRTUAL_TOKENS = 4096
NUM_FREQUENT_TOKENS = 5000

TokenCount = Annotated[
    int, Rule(f"a whole number from 1 to {MAX_VIRTUAL_TOKENS}", lambda value: 1 <= value <= MAX_VIRTUAL_TOKENS)
]
TargetCount = Annotated[
    int, Rule(f"a whole number from 0 to {MAX_VIRTUAL_TOKENS}", lambda value: 0 <= value <= MAX_VIRTUAL_TOKENS)
]


@dataclass(frozen=True, slots=True)
class MethodConfig:
    """A method's shape, start and learning rate. Checked on creation: `InvalidRequestError` names field and value."""

    name: ClassVar[str]
    """What the method is called in requests and records."""

    num_virtual_tokens: TokenCount = 10
    init: Init = "sampled_vocabulary"
    init_text: str | None = None
    """The text of init 'text'."""
    init_vocabulary: Count | None = NUM_FREQUENT_TOKENS
    """Vocabulary rows that are sampled: the first ones, in most tokenizers the most frequent (None: all)."""
    learning_rate: Positive = 0.3
    """In units of the standard deviation of the embedding output (prefixes: of the layers' activations)."""
    num_target_tokens: TargetCount = 0
    """Of a soft prompt for a sequence-to-sequence model: embeddings that stand in front of the target, learned beside
    those in the source."""

    @property
    def num_learned_tokens(self) -> int:
        """Virtual tokens of both sides: rows of what is learned, the source's first."""
        return self.num_virtual_tokens + self.num_target_tokens

    @property
    def num_before(self) -> int:
        """Virtual tokens that stand before a row's own, on the side that has more of them."""
        return max(self.num_virtual_tokens, self.num_target_tokens)

    def __post_init__(self) -> None:
        check_fields(self)
        if bool(self.init_text) != (self.init == "text"):
            message = f"init_text must be a text for init 'text' and absent otherwise, got {shown(self.init_text)}"
            raise InvalidRequestError(f"{message} for init {self.init!r}", param="init_text")
