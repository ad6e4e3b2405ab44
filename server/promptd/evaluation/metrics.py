"""What a set of answers scores: plain functions, no torch. BLEU and chrF come from sacrebleu.

A prediction of None is an illegal output (no label at all) and counts as wrong everywhere. Scores are fractions in
0..1 (Matthews -1..1); only BLEU and chrF keep sacrebleu's 0..100, as they are published.

Run as a program, it scores texts from stdin: seconds of plain Python are kept out of a process that serves.
"""

from __future__ import annotations

import json
import math
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

Predictions = Sequence[str | None]

PERCENT_METRICS = frozenset({"bleu", "chrf"})
"""Metrics whose scale is 0..100."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ROUGE_WORD = re.compile(r"[a-z0-9]+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


# ------------------------------------------------------------------------------------------------- labels


def accuracy(predictions: Predictions, truth: Sequence[str]) -> float:
    """Share of predictions that are right."""
    return _mean(float(prediction == label) for prediction, label in zip(predictions, truth, strict=True))


def macro_f1(predictions: Predictions, truth: Sequence[str], labels: Sequence[str]) -> float:
    """Mean of the labels' F1; one that is neither true nor predicted anywhere has F1 0, as in scikit-learn."""
    hits = Counter(label for prediction, label in zip(predictions, truth, strict=True) if prediction == label)
    claims = Counter([*predictions, *truth])
    return _mean(2 * hits[label] / claims[label] if claims[label] else 0.0 for label in labels)


def f1(predictions: Predictions, truth: Sequence[str], positive: str) -> float:
    """F1 of one label: 2 TP / (2 TP + FP + FN); 0 where nothing is positive."""
    return macro_f1(predictions, truth, [positive])


def matthews(predictions: Predictions, truth: Sequence[str]) -> float:
    """Matthews correlation for any number of labels (Gorodkin's R_K), -1..1; 0 where one side is constant.

    Illegal outputs are a class of their own, which agrees with nothing.
    """
    total = len(truth)
    hits = sum(prediction == label for prediction, label in zip(predictions, truth, strict=True))
    predicted, true = Counter(predictions), Counter(truth)
    by_chance = sum(predicted[label] * count for label, count in true.items())
    spread = (total**2 - sum(n * n for n in predicted.values())) * (total**2 - sum(n * n for n in true.values()))
    return (hits * total - by_chance) / math.sqrt(spread) if spread else 0.0


def f1_over_answers(predictions: Predictions, truth: Sequence[str], positive: str = "true") -> float:
    """MultiRC's F1a: F1 of `positive` over the answers of all questions; an illegal output is the wrong one of two."""
    wrong = {positive: None}
    filled = [
        wrong.get(label, positive) if prediction is None else prediction
        for prediction, label in zip(predictions, truth, strict=True)
    ]
    return f1(filled, truth, positive)


def grouped_exact_match(predictions: Predictions, truth: Sequence[str], groups: Sequence[Hashable]) -> float:
    """Share of groups (MultiRC: questions) whose every prediction is right."""
    is_right: dict[Hashable, bool] = {}
    for prediction, label, group in zip(predictions, truth, groups, strict=True):
        is_right[group] = is_right.get(group, True) and prediction == label
    return sum(is_right.values()) / len(is_right)


# -------------------------------------------------------------------------------------------------- texts


def normalized(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of texts equal to one of their references in SQuAD's normal form."""
    return _mean(float(normalized(text) in map(normalized, own)) for text, own in zip(texts, references, strict=True))


def token_f1(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """SQuAD's F1 over words in normal form, against the best reference, averaged over texts."""
    return _mean(max(_word_f1(text, each) for each in own) for text, own in zip(texts, references, strict=True))


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, 0..100, by sacrebleu with its defaults (13a tokens, exponential smoothing) and all references."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(texts), _columns(references), force=True).score)  # type: ignore[arg-type]


def chrf(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus chrF2, 0..100, by sacrebleu with its defaults, against the best reference of each."""
    import sacrebleu

    return float(sacrebleu.corpus_chrf(list(texts), _columns(references)).score)  # type: ignore[arg-type]


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L F1 (Lin 2004) as rouge-score defines it, without stemming: against the best reference, averaged."""
    pairs = zip(texts, references, strict=True)
    return _mean(max(_rouge_l_f1(text, each) for each in own) for text, own in pairs)


# ----------------------------------------------------------------------------------------------- by name

TEXT_METRICS: Mapping[str, Callable[[Sequence[str], Sequence[Sequence[str]]], float]] = {
    "bleu": bleu,
    "chrf": chrf,
    "rouge_l": rouge_l,
    "token_f1": token_f1,
    "exact_match": exact_match,
}


def label_scores(
    names: Sequence[str],
    predictions: Predictions,
    truth: Sequence[str],
    *,
    labels: Sequence[str],
    groups: Sequence[Hashable],
) -> dict[str, float]:
    """Return the named metrics of classified rows; `groups` belong together in `grouped_exact_match`."""
    known: Mapping[str, Callable[[], float]] = {
        "accuracy": lambda: accuracy(predictions, truth),
        "macro_f1": lambda: macro_f1(predictions, truth, labels),
        "matthews": lambda: matthews(predictions, truth),
        "f1a": lambda: f1_over_answers(predictions, truth),
        "grouped_em": lambda: grouped_exact_match(predictions, truth, groups),
    }
    return {name: known[name]() for name in names}


def text_scores(names: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the named metrics of generated texts, each with all references of its input."""
    return {name: TEXT_METRICS[name](texts, references) for name in names}


# ------------------------------------------------------------------------------------------------- pieces


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _word_f1(text: str, reference: str) -> float:
    words, wanted = normalized(text).split(), normalized(reference).split()
    if not words or not wanted:
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted))


def _rouge_l_f1(text: str, reference: str) -> float:
    words, wanted = (_ROUGE_WORD.findall(each.lower()) for each in (text, reference))
    return 2 * _common_subsequence(words, wanted) / (len(words) + len(wanted)) if words and wanted else 0.0


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, one row of the table at a time."""
    lengths = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for at, each in enumerate(other, start=1):
            best = diagonal + 1 if word == each else max(lengths[at], lengths[at - 1])
            diagonal, lengths[at] = lengths[at], best
    return lengths[-1]


def _columns(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References as sacrebleu wants them, `[max_references][num_texts]`; None, which its types forget, fills gaps."""
    most = max(len(own) for own in references)
    return [[own[at] if at < len(own) else None for own in references] for at in range(most)]


def main() -> None:
    """Read `{"names", "references", "answers": [texts of one subject, …]}`; write the scores of each subject."""
    asked = json.load(sys.stdin)
    scores = [text_scores(asked["names"], texts, asked["references"]) for texts in asked["answers"]]
    json.dump(scores, sys.stdout)


if __name__ == "__main__":
    main()
