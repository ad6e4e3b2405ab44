"""Metrics against scikit-learn, the published libraries, and cases worked out by hand."""

from __future__ import annotations

import asyncio
import random

import pytest
import sacrebleu
import sklearn.metrics
from rouge_score.rouge_scorer import RougeScorer

from promptd.errors import PromptdError
from promptd.evaluation import metrics
from promptd.evaluation.text_scores import score_texts

LABELS = ["a", "b", "c", "d"]


def draw(seed: int, labels: list[str], count: int = 60) -> tuple[list[str | None], list[str]]:
    """Predictions that are often right, sometimes wrong and sometimes illegal; and the truth."""
    rng = random.Random(seed)
    truth = [rng.choice(labels[: rng.randint(2, len(labels))]) for _ in range(count)]
    predictions = [rng.choice([label, label, rng.choice(labels), None]) for label in truth]
    return predictions, truth


def spelled(predictions: list[str | None]) -> list[str]:
    """Illegal outputs as scikit-learn can take them: one more class."""
    return ["illegal" if prediction is None else prediction for prediction in predictions]


@pytest.mark.parametrize("seed", range(12))
def test_label_metrics_are_those_of_scikit_learn(seed: int) -> None:
    """Accuracy, macro-F1 over the task's labels, one label's F1 and Matthews, with illegal outputs among them."""
    predictions, truth = draw(seed, LABELS)
    theirs = spelled(predictions)
    assert metrics.accuracy(predictions, truth) == pytest.approx(sklearn.metrics.accuracy_score(truth, theirs))
    assert metrics.macro_f1(predictions, truth, LABELS) == pytest.approx(
        sklearn.metrics.f1_score(truth, theirs, labels=LABELS, average="macro", zero_division=0)
    )
    assert metrics.matthews(predictions, truth) == pytest.approx(sklearn.metrics.matthews_corrcoef(truth, theirs))
    for label in LABELS:
        expected = sklearn.metrics.f1_score(truth, theirs, labels=[label], average="macro", zero_division=0)
        assert metrics.f1(predictions, truth, label) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(6))
def test_f1_over_answers_turns_illegal_outputs_into_wrong_ones(seed: int) -> None:
    """As in the published evaluation: where no legal label came, the opposite of the truth is counted."""
    predictions, truth = draw(seed, ["false", "true"])
    filled = [
        {"true": "false", "false": "true"}[label] if prediction is None else prediction
        for prediction, label in zip(predictions, truth, strict=True)
    ]
    expected = sklearn.metrics.f1_score(truth, filled, pos_label="true")
    assert metrics.f1_over_answers(predictions, truth) == pytest.approx(expected)
    legal = ["true" if prediction is None else prediction for prediction in predictions]
    assert metrics.f1_over_answers(predictions, truth) < metrics.f1_over_answers(legal, legal) == 1


def test_constant_predictions() -> None:
    """A constant says nothing: Matthews 0, as scikit-learn has it; all wrong is -1, all right 1."""
    truth = ["a", "b", "a"]
    assert metrics.matthews(["a"] * 3, truth) == 0
    assert metrics.matthews(["b", "a", "b"], truth) == pytest.approx(-1)
    assert metrics.matthews(truth, truth) == pytest.approx(1)
    assert metrics.f1(["a"], ["a"], "b") == 0


def test_a_group_is_right_only_as_a_whole() -> None:
    """Question 1 is right, 2 has one wrong answer, 3 an illegal one: 1 of 3."""
    predictions = ["true", "false", "true", "true", None]
    truth = ["true", "false", "true", "false", "false"]
    assert metrics.grouped_exact_match(predictions, truth, [1, 1, 2, 2, 3]) == pytest.approx(1 / 3)


def test_squad_metrics_by_hand() -> None:
    """Case, articles and punctuation do not count; the best reference does."""
    assert metrics.normalized("The  cat's, an OWL!") == "cats owl"
    texts = ["The Denver Broncos!", "in the year 1066", "no"]
    references = [["denver broncos"], ["1066", "the year 1066 AD"], ["yes"]]
    assert metrics.exact_match(texts, references) == pytest.approx(1 / 3)
    # second: {in, year, 1066} and {year, 1066, ad} share 2 of 3 and 3 words; with "1066" alone 1 of 3 and 1
    assert metrics.token_f1(texts, references) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert metrics.token_f1(["the"], [["a"]]) == 1  # both empty in normal form


TEXTS = ["the cat sat on the mat", "a dog ran home", ""]
REFERENCES = [["the cat is on the mat", "there is a cat on the mat"], ["the dog ran all the way home"], ["x y", "z"]]


def test_bleu_and_chrf_are_sacrebleus() -> None:
    """Inputs with fewer references are padded with what sacrebleu ignores: repeating a reference gives the same."""
    padded = [["the cat is on the mat", REFERENCES[1][0], "x y"], ["there is a cat on the mat", REFERENCES[1][0], "z"]]
    assert metrics.bleu(TEXTS, REFERENCES) == pytest.approx(sacrebleu.corpus_bleu(TEXTS, padded).score)
    assert metrics.chrf(TEXTS, REFERENCES) == pytest.approx(sacrebleu.corpus_chrf(TEXTS, padded).score)
    same = [own[0] for own in REFERENCES]
    assert metrics.bleu(same, REFERENCES) == pytest.approx(100)
    first_only = sacrebleu.corpus_bleu(TEXTS, [[own[0] for own in REFERENCES]]).score
    assert metrics.bleu(TEXTS, REFERENCES) != pytest.approx(first_only)  # the other references count


def test_rouge_l_is_rouge_scores() -> None:
    """F1 of the longest common subsequence against the best reference: the cat . on the mat, 5 of 6 and 6."""
    assert metrics.rouge_l(TEXTS[:1], REFERENCES[:1]) == pytest.approx(5 / 6)
    rng = random.Random(5)
    words = ["the", "Cat", "sat,", "on", "a", "mat.", "naïve", "x-ray", "42", "_", "", "\n", "İ"]
    texts = [" ".join(rng.choices(words, k=rng.randint(0, 12))) for _ in range(80)]
    references = [[" ".join(rng.choices(words, k=rng.randint(0, 12))) for _ in range(rng.randint(1, 3))] for _ in texts]
    scorer = RougeScorer(["rougeL"])
    theirs = [scorer.score_multi(own, text)["rougeL"].fmeasure for text, own in zip(texts, references, strict=True)]
    ours = [metrics.rouge_l([text], [own]) for text, own in zip(texts, references, strict=True)]
    assert ours == pytest.approx(theirs)
    assert metrics.rouge_l(texts, references) == pytest.approx(sum(theirs) / len(theirs))
    assert len(set(theirs)) > 20


def test_a_process_of_its_own_gives_the_same_scores() -> None:
    """What travels through JSON is scored as here, also odd characters; what fails there is a typed error here."""
    texts = [*TEXTS[:2], "naïve \U0001f600 \u2028 “x”"]
    references = [*REFERENCES[:2], ["naïve \U0001f600"]]
    names = list(metrics.TEXT_METRICS)
    one, other = asyncio.run(score_texts(names, [texts, TEXTS], references))
    assert one == pytest.approx(metrics.text_scores(names, texts, references))
    assert other == pytest.approx(metrics.text_scores(names, TEXTS, references))
    with pytest.raises(PromptdError, match=r"could not be computed: KeyError: 'absent'"):
        asyncio.run(score_texts(["absent"], [TEXTS], REFERENCES))
