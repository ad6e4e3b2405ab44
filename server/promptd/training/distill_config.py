"""What a job that distills asks for: `distill`, beside the job's method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from promptd_store.strict_json import shown

from promptd.errors import InvalidRequestError
from promptd.training.checks import Rule, Size, check_fields

MAX_ANSWER_TOKENS = 1024
MAX_WRITTEN_ROWS = 10_000

AnswerCount = Annotated[
    int, Rule(f"a whole number from 0 to {MAX_ANSWER_TOKENS}", lambda value: 0 <= value <= MAX_ANSWER_TOKENS)
]
TokenCount = Annotated[
    int, Rule(f"a whole number from 2 to {MAX_ANSWER_TOKENS}", lambda value: 2 <= value <= MAX_ANSWER_TOKENS)
]
RowCount = Annotated[
    int, Rule(f"a whole number from 8 to {MAX_WRITTEN_ROWS}", lambda value: 8 <= value <= MAX_WRITTEN_ROWS)
]


@dataclass(frozen=True, slots=True)
class DistillConfig:
    """The teacher, and what it is asked. Checked on creation: `InvalidRequestError` names field and value."""

    text: str | None = None
    """What the teacher has in its context."""
    prompt: str | None = None
    """The stored prompt that the teacher has in its context, in place of a text."""
    top_k: Size = 64
    """The teacher's likeliest tokens at each place, told apart; all others count as one."""
    answer_tokens: AnswerCount = 32
    """Tokens that the teacher writes behind a row that has no completion; 0: the row's own tokens are compared."""
    num_rows: RowCount = 256
    """Rows that the teacher writes itself where the job has none."""
    row_tokens: TokenCount = 64
    """Length of these."""
    cue: str = "\n"
    """How each of these begins."""

    def __post_init__(self) -> None:
        check_fields(self)
        if bool(self.text) == bool(self.prompt):
            raise InvalidRequestError(
                f"text and prompt: give one of them, got {shown(self.text)} and {shown(self.prompt)}", param="text"
            )
        if not self.cue:
            raise InvalidRequestError("cue must have tokens, got ''", param="cue")
