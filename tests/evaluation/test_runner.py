"""The runner against the engine's own answers, one at a time; both backends agree."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from promptd_client import AsyncClient
from promptd_store import PromptArtifact

from promptd import LLM, SamplingParams
from promptd.engine.ensemble import majority, mean_probabilities, softmax
from promptd.errors import InvalidRequestError
from promptd.evaluation import (
    BARE_MODEL,
    ENSEMBLE,
    MAJORITY_CLASS,
    TASKS,
    ClientBackend,
    EvaluationResult,
    LLMBackend,
    Task,
    evaluate,
    metrics,
    task_of,
)
from promptd.training import Example, TrainingDataError
from tests.api.conftest import LiveServer
from tests.evaluation.conftest import WORDS

TEXTS = [
    "the quick", "brown fox jumps over", "the lazy dog and", "the restaurant near the river", "is cheap",
    "book a table", "for two people", "play some music", "what is the weather", "in the city tomorrow", "jumps",
    "people play",
]  # fmt: skip
LABELLED = [Example({"text": text}, None, list(WORDS)[at % 3], at + 1) for at, text in enumerate(TEXTS)]
WRITTEN = [Example({"text": text}, f" {text} again\n", None, at + 1) for at, text in enumerate([*TEXTS[:4], TEXTS[0]])]
CLASSIFIERS = ("c0", "c1", "c2")


def run(llm: LLM, examples: Sequence[Example], prompts: Sequence[str | None], **options: Any) -> list[EvaluationResult]:
    """Evaluate in this process, in batches that do not divide the rows."""
    backend = LLMBackend(llm, batch_size=options.pop("batch_size", 10))
    task = options.pop("task", None) or task_of(examples)
    return asyncio.run(evaluate(backend, task, examples, prompts, keep_predictions=True, **options))


def alone(llm: LLM, artifact: PromptArtifact | None, text: str) -> list[float]:
    """Probabilities of one text under one prompt, asked for alone."""
    if artifact is None:
        return softmax(llm.score([f"{text} is a"], list(WORDS.values()))[0])
    return softmax(llm.score([text], list(WORDS.values()), [artifact])[0])


def labels(result: EvaluationResult) -> list[str | None]:
    """The predictions of a result, in the order of the rows."""
    return [row.prediction for row in result.predictions or ()]


def test_an_ensemble_in_one_batch_is_n_single_calls(
    llm: LLM, artifacts: dict[str, PromptArtifact], prompt_files: dict[str, str]
) -> None:
    """Every member's label and the mean vote equal single calls; a control shows that the members really differ."""
    files = [prompt_files[name] for name in CLASSIFIERS]
    most, bare, *members, ensemble = run(llm, LABELLED, [None, *files], ensemble=True, batch_size=1000)
    singles = {name: [alone(llm, artifacts[name], text) for text in TEXTS] for name in CLASSIFIERS}
    names = list(WORDS)
    for name, member in zip(CLASSIFIERS, members, strict=True):
        assert labels(member) == [names[row.index(max(row))] for row in singles[name]]
    means = [mean_probabilities([singles[name][at] for name in CLASSIFIERS]) for at in range(len(TEXTS))]
    assert labels(ensemble) == [names[row.index(max(row))] for row in means]
    assert labels(bare) == [names[row.index(max(row))] for row in (alone(llm, None, text) for text in TEXTS)]
    assert most.subject == MAJORITY_CLASS and most.metrics["accuracy"] == pytest.approx(4 / 12)
    # the control: no member answers all rows as the ensemble does, so a mixed-up row would have been seen
    assert all(labels(member) != labels(ensemble) for member in (*members, bare))
    assert len({tuple(labels(member)) for member in members}) == 3
    assert (bare.subject, ensemble.subject) == (BARE_MODEL, ENSEMBLE)
    assert ensemble.prompt_versions == tuple(artifacts[name].version for name in CLASSIFIERS)


def test_probabilities_in_one_batch_equal_single_calls(llm: LLM, artifacts: dict[str, PromptArtifact]) -> None:
    """The numbers, not only the labels: within 1e-5 in a batch of all prompts and texts; prompts differ by far more."""
    order = [(name, text) for text in TEXTS for name in CLASSIFIERS]
    together = llm.score([text for _, text in order], list(WORDS.values()), [artifacts[name] for name, _ in order])
    for (name, text), scores in zip(order, together, strict=True):
        assert softmax(scores) == pytest.approx(alone(llm, artifacts[name], text), abs=1e-5)
    one, other = (alone(llm, artifacts[name], TEXTS[0]) for name in ("c0", "c1"))
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 1e-3


def test_votes() -> None:
    """The mean over members; the majority, ties to the first."""
    assert mean_probabilities([[0.2, 0.8], [0.6, 0.4]]) == pytest.approx([0.4, 0.6])
    assert majority(["b", "a", "a"]) == 1
    assert majority(["b", "a"]) == 0
    assert majority([None, "a", None]) == 0
    assert softmax([-1000.0, -1000.0]) == [0.5, 0.5]


def test_texts_are_generated_greedily_and_scored(
    llm: LLM, artifacts: dict[str, PromptArtifact], prompt_files: dict[str, str]
) -> None:
    """The prompt's own template and limit, greedy whatever its default; references of equal inputs are put together."""
    (bare, writer) = run(llm, WRITTEN, [None, prompt_files["writer"]])
    params = SamplingParams(temperature=0, max_tokens=5, stop=("zzz",))
    expected = llm.generate(TEXTS[:4], [artifacts["writer"]] * 4, params)
    assert labels(writer) == [completion.text.strip() for completion in expected]
    plain = llm.generate([f"{text} then" for text in TEXTS[:4]], None, params)
    assert labels(bare) == [completion.text.strip() for completion in plain]
    assert (writer.num_rows, writer.num_inputs, writer.template) == (5, 4, "{text} then")
    assert writer.predictions is not None and writer.predictions[0].expected == ("the quick again",) * 2
    texts = [completion.text.strip() for completion in expected]
    references = [[f"{text} again"] for text in TEXTS[:4]]
    assert writer.metrics["chrf"] == pytest.approx(metrics.chrf(texts, references))
    assert "predictions" not in replace(writer, predictions=None).to_dict()


def test_a_prompt_without_template_takes_the_tasks(llm: LLM, prompt_files: dict[str, str]) -> None:
    """An imported prompt reads the rendered text; label words that nobody gives are the labels."""
    task = replace(task_of(LABELLED), template="say {text}:")
    _, bare, plain = run(llm, LABELLED, [None, prompt_files["plain"]], task=task)
    assert plain.template == bare.template == "say {text}:"
    assert plain.label_words == {label: f" {label}" for label in sorted(WORDS)}
    expected = llm.score([f"say {text}:" for text in TEXTS], [f" {label}" for label in sorted(WORDS)])
    names = sorted(WORDS)
    assert labels(bare) == [names[row.index(max(row))] for row in expected]


def test_labels_can_be_generated(llm: LLM, prompt_files: dict[str, str]) -> None:
    """What is not a label is illegal and wrong; a tiny random model says nothing legal."""
    _, bare, member, ensemble = run(
        llm, LABELLED, [None, prompt_files["c0"], prompt_files["c1"]][:3], ensemble=True, answer_by="generate"
    )[:4]
    assert bare.answer_by == "generate" and len(labels(bare)) == len(TEXTS)
    assert set(labels(member)) <= {None, *WORDS}
    assert member.metrics["accuracy"] <= sum(label is not None for label in labels(member)) / len(TEXTS)
    assert len(labels(ensemble)) == len(TEXTS)


def test_both_backends_agree(llm: LLM, server: LiveServer, prompt_files: dict[str, str]) -> None:
    """A server gives the same predictions as the model in this process, for labels and for texts."""

    async def over_http(task: Task, examples: Sequence[Example], prompts: Sequence[str | None], **options: Any) -> Any:
        async with AsyncClient(server.url) as client:
            backend = ClientBackend(client, batch_size=70)
            return await evaluate(backend, task, examples, prompts, keep_predictions=True, **options)

    labelling = task_of(LABELLED)
    for task, examples, names in (
        (labelling, LABELLED, CLASSIFIERS), (labelling, LABELLED, ("plain",)), (task_of(WRITTEN), WRITTEN, ("writer",)),
    ):  # fmt: skip
        files = [prompt_files[name] for name in names]
        here = run(llm, examples, [None, *files], task=task, ensemble=len(names) > 1)
        there = asyncio.run(over_http(task, examples, [None, *names], ensemble=len(names) > 1))
        for ours, theirs in zip(here, there, strict=True):
            assert labels(ours) == labels(theirs)
            assert ours.metrics == pytest.approx(theirs.metrics)
            assert (ours.template, ours.label_words) == (theirs.template, theirs.label_words)
            assert ours.prompt_versions == theirs.prompt_versions


def test_inputs_longer_than_the_model_count_as_wrong(
    llm: LLM, server: LiveServer, prompt_files: dict[str, str]
) -> None:
    """They are found, counted and hurt nothing else, here and on a server; an ensemble votes without them."""
    spec = llm.model.spec
    room = spec.max_model_len - len(llm.model.encode(" is a")) - len(llm.model.encode(WORDS["dog"]))
    tight = "a" * (room - 4)  # one token a letter: with 2 virtual tokens it fits, with 5 it does not
    long = [*LABELLED[:5], Example({"text": "a" * 400}, None, "fox", 90), *LABELLED[5:]]
    tight_rows = [*long, Example({"text": tight}, None, "fox", 91)]
    names = ("c0", "c1")
    here = run(llm, tight_rows, [prompt_files[name] for name in names], ensemble=True)

    async def over_http() -> list[EvaluationResult]:
        async with AsyncClient(server.url) as client:
            backend, task = ClientBackend(client), task_of(tight_rows)
            return await evaluate(backend, task, tight_rows, names, ensemble=True, keep_predictions=True)

    for _, c0, c1, ensemble in (here, asyncio.run(over_http())):
        assert [result.num_too_long for result in (c0, c1, ensemble)] == [1, 2, 1]
        assert [labels(c0)[5], labels(c1)[5], labels(c1)[-1], labels(ensemble)[5]] == [None] * 4
        assert labels(ensemble)[-1] == labels(c0)[-1] is not None
        short = run(llm, LABELLED, [prompt_files["c0"]])[1]
        assert labels(c0)[:5] + labels(c0)[6:-1] == labels(short)
    written = [*WRITTEN, Example({"text": "a" * 400}, " b", None, 9)]
    (writer,) = run(llm, written, [prompt_files["writer"]])
    assert (writer.num_too_long, labels(writer)[-1]) == (1, None)


def test_what_does_not_fit_is_refused_before_anything_runs(llm: LLM, prompt_files: dict[str, str]) -> None:
    """A label without a word, a field that a template wants, an ensemble of one: each with its line or its prompt."""
    before = llm.engine.stats()
    strange = [*LABELLED, Example({"text": "x"}, None, "cat", 77)]
    with pytest.raises(TrainingDataError, match=r"line 77: label 'cat' has no label word for .*c0"):
        run(llm, strange, [prompt_files["c0"]])
    with pytest.raises(TrainingDataError, match=r"line 5: template field 'text' was not given"):
        run(llm, [Example({"question": "x"}, None, "fox", 5)], [prompt_files["c0"]])
    with pytest.raises(InvalidRequestError, match="every row has the label 'fox' and 'bare model' knows no other"):
        run(llm, LABELLED[:1], [None])
    with pytest.raises(InvalidRequestError, match="at least two prompts, got 1"):
        run(llm, LABELLED, [prompt_files["c0"]], ensemble=True)
    with pytest.raises(InvalidRequestError, match="must have the same labels"):
        run(llm, LABELLED, [prompt_files["c0"], prompt_files["plain"]], ensemble=True)
    assert llm.engine.stats() == before


def test_the_constant_that_scores_best(llm: LLM) -> None:
    """Accuracy: the most frequent label. F1a: all `true`, although `false` is more frequent, as SuperGLUE has it."""
    truth = ["false", "false", "true", "false", "true"]
    rows = [
        Example({"paragraph": "the fox", "question": "q", "answer": str(at)}, None, label, at)
        for at, label in enumerate(truth)
    ]
    constant = run(llm, rows, [None], task=TASKS["multirc"])[0]
    assert labels(constant) == ["true"] * 5
    assert constant.metrics == {"f1a": pytest.approx(2 * 2 / (5 + 2)), "grouped_em": 0}
    assert labels(run(llm, rows, [None], task=replace(TASKS["multirc"], metrics=("accuracy",)))[0]) == ["false"] * 5


def test_progress_counts_inputs(llm: LLM, prompt_files: dict[str, str]) -> None:
    """Two subjects in batches of ten questions: five inputs at a time."""
    seen: list[tuple[int, int]] = []
    run(llm, LABELLED, [None, prompt_files["c0"]], on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 12), (10, 12), (12, 12)]
