"""What is compared with prompts reads as prompts do: plain models of every family, and the tasks' own metrics."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score

from promptd.llm import LLM
from promptd.modeling import load_model
from promptd.training import Encoded, Scores, TaskFormat, encode_examples, objective_for
from promptd.training.forward_sources import forward_sources
from tests.bench.experiments.descent import measure
from tests.bench.experiments.plain import PlainEncoder, plain_of
from tests.bench.experiments.readers import PromptReader
from tests.bench.experiments.superglue_sets import SUPERGLUE, load_halves
from tests.bench.experiments.task_scores import scored
from tests.bench.experiments.weights import WeightConfig, WeightTuning
from tests.family_models import SEQ2SEQ, make_encoder_tokenizer, write_model


def test_a_plain_encoder_reads_as_promptd_does(long_encoder: Path, superglue_data: Path) -> None:
    """The same head over the bare model gives the same logits through both; LoRA begins there, not so another head."""
    model, chosen = load_model(long_encoder), SUPERGLUE["copa-head"]
    examples = load_halves(chosen, superglue_data, 0, num_train=0, num_validation=99, num_held_out=99).held_out
    rows, objective = encode_examples(model, chosen.format, examples, 0), objective_for(model, chosen.format)
    asked = objective.texts(rows, None)
    plain = plain_of(model, long_encoder, num_classes=2, seed=5)
    assert isinstance(plain, PlainEncoder)
    head = torch.cat([plain.head.weight, plain.head.bias.unsqueeze(1)], 1).detach()
    (ours,) = forward_sources(model, [dataclasses.replace(asked, head=head)])
    largest = ours.abs().max().item()
    for kind in ("full", "lora"):
        config = WeightConfig(kind, 1e-3, target_modules=())  # type: ignore[arg-type]
        tuning = WeightTuning(plain, config, seed=0)
        torch.testing.assert_close(plain.logits(asked).detach(), ours, rtol=0, atol=1e-4 * largest)
        assert [len(own["params"]) > 0 for own in tuning.groups] == [True, True]
    other = plain_of(model, long_encoder, num_classes=2, seed=6).logits(asked)
    assert (other - ours).abs().max() > 1e-2 * largest


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_plain_pair_reads_as_promptd_does(name: str, superglue_data: Path, tmp_path: Path) -> None:
    """Label words of several tokens, through both: the same loss; its greedy answers, too."""
    folder = write_model(SEQ2SEQ[name], make_encoder_tokenizer(), tmp_path / name)
    model, chosen = load_model(folder), SUPERGLUE["rte-text"]
    examples = load_halves(chosen, superglue_data, 0, num_train=0, num_validation=99, num_held_out=3).held_out
    rows, objective = encode_examples(model, chosen.format, examples, 0), objective_for(model, chosen.format)
    reader, plain = PromptReader(LLM(model), None), plain_of(model, folder)
    tuning = WeightTuning(plain, WeightConfig("full", 1e-3), seed=0)
    theirs = measure(objective, rows, lambda part: tuning.tally(objective, part))
    assert Scores.of(theirs, has_labels=True).loss == pytest.approx(reader.scores(objective, rows).loss, abs=1e-4)
    texts = [row.source_ids for row in rows]
    made = plain.generate(texts, 6, list(model.eos_token_ids))
    assert [model.decode(ids).split("\n")[0] for ids in made] == reader.answers(texts, 6)


def test_scores_are_the_tasks_own(long_encoder: Path, superglue_data: Path) -> None:
    """What rows are told, one by one, gives the accuracy of all; CB's second metric is scikit-learn's macro F1."""
    model = load_model(long_encoder)
    chosen = SUPERGLUE["cb-head"]
    task = dataclasses.replace(chosen.task, label_words={"neutral": "n", "entailment": "e", "contradiction": "c"})
    given = load_halves(chosen, superglue_data, 0, num_train=99, num_validation=99, num_held_out=99).train
    labels = ("neutral", "entailment", "contradiction", "neutral", "neutral", "entailment")
    examples = [dataclasses.replace(row, label=label) for row, label in zip(given, labels, strict=True)]
    form = TaskFormat(task.template, task.label_words)
    objective = objective_for(model, form)
    rows = encode_examples(model, form, examples, 0)
    size, llm = model.spec.hidden_size, LLM(model)
    for seed in range(40):  # one virtual token and a head, under which rows are told more than one label
        prompt = 3 * torch.randn(size + 3 * (size + 1), generator=torch.Generator().manual_seed(seed))
        reader = PromptReader(llm, prompt)
        said = [_told_alone(reader, objective, row, labels) for row in rows]
        if len(set(said)) > 1:
            break
    assert len(set(said)) > 1
    found = scored(task, reader, objective, lambda rows: encode_examples(model, form, rows, 0), examples)
    assert found["metrics"]["accuracy"] == pytest.approx(reader.scores(objective, rows).accuracy, abs=1e-4)
    expected = f1_score(labels, said, average="macro", labels=list(task.label_words or ()), zero_division=0)
    assert found["metrics"]["macro_f1"] == pytest.approx(expected, abs=1e-4)
    assert found["score"] == pytest.approx((found["metrics"]["accuracy"] + expected) / 2, abs=1e-4)


def _told_alone(reader: PromptReader, objective: Any, row: Encoded, labels: tuple[str, ...]) -> str:
    """The one label under which the row, alone, is right."""
    (said,) = (
        label
        for label in dict.fromkeys(labels)
        if reader.scores(
            objective, [dataclasses.replace(row, example=dataclasses.replace(row.example, label=label))]
        ).accuracy
        == 1
    )
    return said
