"""What an evaluation found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

AnswerBy = Literal["score", "generate"]
"""Labels are scored as candidates, or generated and read; texts are always generated."""


@dataclass(frozen=True, slots=True)
class RowPrediction:
    """One input's answer; a prediction of None is an illegal output, or none at all."""

    line: int
    prediction: str | None
    expected: tuple[str, ...]
    """The label, or all references."""


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """One subject on one set of rows: a prompt, the bare model, an ensemble, or the majority class."""

    subject: str
    task: str
    convention: str
    template: str | None
    """The text that the model saw around the fields; None: the input as it is."""
    label_words: Mapping[str, str] | None
    answer_by: AnswerBy
    metrics: Mapping[str, float]
    """Fractions, but BLEU and chrF in 0..100."""
    num_rows: int
    num_inputs: int
    """Fewer than rows where inputs have several references."""
    num_too_long: int
    """Inputs that exceeded the model's length, virtual tokens included; they count as wrong."""
    prompt_versions: tuple[str, ...]
    seconds: float
    """Wall clock of the run, in which all subjects shared the batches."""
    predictions: tuple[RowPrediction, ...] | None = None
    num_beams: int = 1
    """Of what was generated; 1 is greedy."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; predictions only where they were kept."""
        plain = asdict(self)
        if self.predictions is None:
            del plain["predictions"]
        return plain
