"""How good a prompt is on some rows, in numbers that can be compared and written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any

from promptd.errors import NumericalError
from promptd.training.objectives import Tally


@dataclass(frozen=True, slots=True)
class Scores:
    """What one prompt reached on one set of rows."""

    num_rows: int
    loss: float
    """Mean loss in nats per target token."""
    accuracy: float | None = None
    """Share of rows whose label has the best-scored word; None for generation."""

    @classmethod
    def of(cls, tallies: Sequence[Tally], *, has_labels: bool) -> Scores:
        """Sum up. Raises `NumericalError` where a loss is not finite."""
        total = reduce(add, tallies)
        loss = total.nll / total.num_target_tokens
        if loss - loss != 0:
            raise NumericalError(f"the loss on {total.num_rows} rows is not finite ({loss})")
        return cls(total.num_rows, loss, total.num_right / total.num_rows if has_labels else None)

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better: accuracy first, then loss."""
        return (self.accuracy or 0.0, -self.loss)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, rounded to what the row counts can tell."""
        accuracy = None if self.accuracy is None else round(self.accuracy, 4)
        return {**asdict(self), "loss": round(self.loss, 4), "accuracy": accuracy}


def majority_share(labels: Sequence[str]) -> tuple[str, float]:
    """Return the most frequent label and its share."""
    label, count = Counter(labels).most_common(1)[0]
    return label, count / len(labels)
