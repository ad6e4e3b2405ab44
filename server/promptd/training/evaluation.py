"""How good a prompt is: label accuracy by scoring label words, loss on targets, and the baselines beside them.

Everything here takes the folded prompt (or None for the bare model), never the live parameters: what is measured is
what will be served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from promptd.errors import NumericalError
from promptd.modeling import FrozenModel
from promptd.training.encoding import Encoded, evaluation_batches
from promptd.training.forward import forward_texts

MAX_BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Scores:
    """What one prompt reached on one set of rows."""

    num_rows: int
    loss: float
    """Mean loss in nats per target token."""
    accuracy: float | None = None
    """Share of rows whose label has the best-scored word; None for generation."""

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better: accuracy first, then loss."""
        return (self.accuracy or 0.0, -self.loss)


def evaluate(
    model: FrozenModel, prompt: torch.Tensor | None, rows: Sequence[Encoded], words: Mapping[str, tuple[int, ...]]
) -> Scores:
    """Score rows under a folded prompt; rows with labels are classified by their label words."""
    if not words:
        return Scores(len(rows), token_loss(model, prompt, rows))
    with torch.no_grad():
        scores, truth = scored_labels(model, prompt, rows, words)
    accuracy = (scores.argmax(1) == truth).double().mean().item()
    num_tokens = sum(len(row.target_ids) for row in rows)
    loss = -scores.gather(1, truth.unsqueeze(1)).double().sum().item() / num_tokens
    return Scores(len(rows), loss, accuracy)


def scored_labels(
    model: FrozenModel, prompt: torch.Tensor | None, rows: Sequence[Encoded], words: Mapping[str, tuple[int, ...]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every label word's log-probability, `[num_rows, num_labels]`, and the true label's index, `[num_rows]`."""
    index = {label: at for at, label in enumerate(words)}
    truth = torch.tensor([index[row.example.label or ""] for row in rows], device=model.device)
    return label_scores(model, prompt, [row.text_ids for row in rows], list(words.values())), truth


@torch.no_grad()
def token_loss(model: FrozenModel, prompt: torch.Tensor | None, rows: Sequence[Encoded]) -> float:
    """Return the mean loss in nats per target token."""
    total, count = 0.0, 0
    for batch in evaluation_batches([row.num_tokens for row in rows], MAX_BATCH_TOKENS):
        chosen = [rows[index] for index in batch]
        losses = target_losses(model, prompt, chosen)
        total, count = total + losses.double().sum().item(), count + losses.numel()
    return total / count


def label_scores(
    model: FrozenModel,
    prompt: torch.Tensor | None,
    texts: Sequence[tuple[int, ...]],
    candidates: Sequence[tuple[int, ...]],
) -> torch.Tensor:
    """Return the summed log-probability of every candidate after every text, `[num_texts, num_candidates]`.

    Candidates that differ only in their last token share one row, so single-token words cost one row a text.
    """
    scores = torch.zeros(len(texts), len(candidates), device=model.device)
    stems = sorted({candidate[:-1] for candidate in candidates})
    for stem in stems:
        members = [index for index, candidate in enumerate(candidates) if candidate[:-1] == stem]
        lasts = torch.tensor([candidates[index][-1] for index in members])
        for batch in evaluation_batches([len(text) + len(stem) for text in texts], MAX_BATCH_TOKENS):
            inputs = [texts[index] + stem for index in batch]
            ends = torch.tensor([len(text) for text in inputs]).cumsum(0) - 1
            steps = torch.arange(-len(stem), 1)  # one logits row before each token of the stem, one after it
            logits = forward_texts(model, prompt, inputs, (ends.unsqueeze(1) + steps).flatten())
            log_probs = logits.log_softmax(-1).unflatten(0, (len(batch), len(stem) + 1))
            stem_ids = torch.tensor(stem, dtype=torch.int64, device=model.device)
            inner = log_probs[:, :-1].gather(2, stem_ids.expand(len(batch), -1).unsqueeze(2)).sum((1, 2))
            at = torch.tensor(batch).unsqueeze(1), torch.tensor(members).unsqueeze(0)
            scores[at] = inner.unsqueeze(1) + log_probs[:, -1, lasts]
    if not scores.isfinite().all():
        raise NumericalError("label scores are not finite")
    return scores


def target_losses(model: FrozenModel, prompt: torch.Tensor | None, rows: Sequence[Encoded]) -> torch.Tensor:
    """Return the loss of every target token of the rows, end to end, with autograd to the prompt; inputs have none."""
    index: list[int] = []
    targets: list[int] = []
    start = 0
    for row in rows:
        first = start + len(row.text_ids) - 1
        index.extend(range(first, first + len(row.target_ids)))
        targets.extend(row.target_ids)
        start += row.num_tokens
    logits = forward_texts(model, prompt, [row.input_ids for row in rows], torch.tensor(index))
    return cross_entropy(logits, torch.tensor(targets, device=logits.device), reduction="none")


def majority_share(labels: Sequence[str]) -> tuple[str, float]:
    """Return the most frequent label and its share."""
    label, count = Counter(labels).most_common(1)[0]
    return label, count / len(labels)
