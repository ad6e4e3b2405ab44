"""Losses and scores against transformers' own forward, one row at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from promptd.modeling import FrozenModel
from promptd.training import (
    Encoded,
    Example,
    TaskFormat,
    encode_examples,
    evaluate,
    label_word_ids,
    majority_share,
    objective_for,
)
from promptd.training.encoding import evaluation_batches, training_batches
from promptd.training.forward import forward_groups
from promptd.training.objectives import LANGUAGE_MODEL_SHARE, LabelObjective, Objective, Tally


@pytest.fixture(scope="module")
def oracle(tiny_models: dict[str, Path]) -> PreTrainedModel:
    """The same weights in plain transformers."""
    return AutoModelForCausalLM.from_pretrained(tiny_models["llama"]).eval()


@pytest.fixture(scope="module")
def prompt(llama: FrozenModel) -> torch.Tensor:
    """A soft prompt of five tokens."""
    return torch.randn(5, llama.spec.hidden_size, generator=torch.Generator().manual_seed(1)) * 0.2


@torch.no_grad()
def log_prob(
    oracle: PreTrainedModel, prompt: torch.Tensor | None, text: tuple[int, ...], end: tuple[int, ...]
) -> torch.Tensor:
    """Log-probability of every token of `end` after prompt and text."""
    embeds = oracle.get_input_embeddings()(torch.tensor(text + end))
    if prompt is not None:
        embeds = torch.cat([prompt, embeds])
    logits = oracle(inputs_embeds=embeds.unsqueeze(0)).logits[0, -len(end) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(end).unsqueeze(1)).squeeze(1)


def tally_of(model: FrozenModel, objective: Objective, rows: Sequence[Encoded], prompt: torch.Tensor | None) -> Tally:
    """Run rows in one pass."""
    return objective.tally(rows, forward_groups(model, [objective.texts(rows, prompt)])[0])


def label_scores(
    model: FrozenModel, words: Mapping[str, tuple[int, ...]], texts: list[tuple[int, ...]], prompt: torch.Tensor | None
) -> torch.Tensor:
    """Score every word after every text in one pass."""
    objective = LabelObjective(words)
    return objective.scores(len(texts), forward_groups(model, [objective.continuations(texts, prompt)])[0])


def test_loss_is_on_targets_alone(
    llama: FrozenModel, oracle: PreTrainedModel, prompt: torch.Tensor, text_rows: list[Example]
) -> None:
    """One loss per target token, each that token's negative log-probability; no token of the input counts."""
    rows = encode_examples(llama, TaskFormat(), text_rows, 5)
    expected = torch.cat([-log_prob(oracle, prompt, row.text_ids, row.target_ids) for row in rows])
    objective = objective_for(llama, TaskFormat())
    tally = tally_of(llama, objective, rows, prompt)
    torch.testing.assert_close(tally.loss, expected.sum(), rtol=1e-4, atol=1e-4)
    assert tally.num_terms == objective.num_terms(rows) == tally.num_target_tokens == len(expected)
    parts = [tally_of(llama, objective, part, prompt) for part in (rows[:2], rows[2:])]
    torch.testing.assert_close((parts[0] + parts[1]).loss, tally.loss)
    with_inputs = torch.cat([-log_prob(oracle, prompt, row.text_ids[:1], row.text_ids[1:]) for row in rows])
    assert (with_inputs.sum() - expected.sum()).abs() > 1e-2


def test_changing_an_input_moves_no_mask(llama: FrozenModel, prompt: torch.Tensor, text_rows: list[Example]) -> None:
    """Another input of another length changes the loss of its own row, not the number of terms, and no other row's."""
    changed = [Example({"text": "something longer"}, text_rows[0].completion, None, 1), *text_rows[1:]]
    before, after = (encode_examples(llama, TaskFormat(), rows, 5) for rows in (text_rows, changed))
    objective = objective_for(llama, TaskFormat())
    first, other = (tally_of(llama, objective, rows, prompt) for rows in (before, after))
    own = [tally_of(llama, objective, rows[:1], prompt).loss for rows in (before, after)]
    assert first.num_terms == other.num_terms and (own[0] - own[1]).abs() > 1e-3
    torch.testing.assert_close(first.loss - own[0], other.loss - own[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bare", [True, False])
def test_label_scores_are_summed_log_probabilities(
    llama: FrozenModel, oracle: PreTrainedModel, prompt: torch.Tensor, bare: bool
) -> None:
    """Words of one and of several tokens, also with a common beginning, score as one at a time."""
    words = [" rain", " r", " music please", " music pause", "x"]
    candidates = [tuple(llama.encode(word, add_special_tokens=False)) for word in words]
    assert len({len(candidate) for candidate in candidates}) > 1
    texts = [tuple(llama.encode(text)) for text in ("play", "is it raining now?", "a b")]
    learned = None if bare else prompt
    expected = [[log_prob(oracle, learned, text, end).sum() for end in candidates] for text in texts]
    scores = label_scores(llama, dict(zip(words, candidates, strict=True)), texts, learned)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-3)


def test_label_loss_and_accuracy_follow_from_the_scores(
    llama: FrozenModel, prompt: torch.Tensor, label_task: TaskFormat, label_rows: list[Example]
) -> None:
    """Cross-entropy over the labels plus the stated share of the language-model loss; accuracy is the best score."""
    rows, words = encode_examples(llama, label_task, label_rows, 5), label_word_ids(llama, label_task)
    objective = objective_for(llama, label_task)
    scores = label_scores(llama, words, [row.text_ids for row in rows], prompt)
    truth = torch.tensor([0, 1, 0])
    right = scores[torch.arange(3), truth]
    expected = (scores.logsumexp(1) - right).sum() - LANGUAGE_MODEL_SHARE * right.sum()
    torch.testing.assert_close(tally_of(llama, objective, rows, prompt).loss, expected)
    assert objective.num_terms(rows) == 3
    measured = evaluate(llama, prompt, rows, objective)
    assert measured.accuracy == pytest.approx((scores.argmax(1) == truth).float().mean().item())
    num_tokens = sum(len(row.target_ids) for row in rows)
    assert measured.loss == pytest.approx(-right.sum().item() / num_tokens, rel=1e-5)


def test_every_row_is_seen_once_an_epoch(llama: FrozenModel, text_rows: list[Example]) -> None:
    """Batches of similar length still cover the data, in an order fixed by the seed."""
    rows = encode_examples(llama, TaskFormat(), text_rows, 5)
    epochs = []
    for seed in (0, 0, 1):
        batches = training_batches(rows, 2, seed)
        epochs.append([row for _ in range(5) for row in next(batches)])
    assert sorted(row.example.line for row in epochs[0]) == list(range(9))
    assert epochs[0] == epochs[1] != epochs[2]


def test_evaluation_batches_hold_every_row_within_the_budget() -> None:
    """No row is lost, and no batch pads beyond its budget unless it is one row."""
    lengths = [3, 50, 1, 7, 7, 120, 2]
    batches = list(evaluation_batches(lengths, 30))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 30 for batch in batches)


def test_majority_share() -> None:
    """The most frequent label and how often it stands."""
    assert majority_share(["a", "b", "b"]) == ("b", pytest.approx(2 / 3))
