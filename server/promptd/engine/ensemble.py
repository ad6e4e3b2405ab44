"""How the answers of several prompts to one input become one answer; plain Python."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def softmax(logprobs: Sequence[float]) -> list[float]:
    """Normalise log-probabilities (nats) to probabilities."""
    top = max(logprobs)
    weights = [math.exp(value - top) for value in logprobs]
    total = sum(weights)
    return [weight / total for weight in weights]


def mean_probabilities(members: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean of several members' probabilities over the same labels, `[num_members][num_labels]`."""
    return [sum(column) / len(members) for column in zip(*members, strict=True)]


def majority(answers: Sequence[Hashable]) -> int:
    """Return the index of the first answer that most members gave; ties go to the first member."""
    votes = Counter(answers)
    return max(range(len(answers)), key=lambda index: votes[answers[index]])  # max keeps the first of equals
