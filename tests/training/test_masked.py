"""Training of encoders by label words at a mask, without a head; and prompts of encoders that stand behind others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from promptd_store import PromptArtifact, decode

from promptd.errors import InvalidRequestError
from promptd.jobs import JobData, JobSpec
from promptd.llm import LLM
from promptd.modeling import load_model
from promptd.training import (
    Example,
    MethodConfig,
    PromptedTexts,
    PromptTuningConfig,
    PTuningV2Config,
    ResidualConfig,
    TaskFormat,
    TrainingConfig,
    TrainingDataError,
    TrainingJob,
    encode_examples,
    make_artifact,
    parse_examples,
    train,
)
from promptd.training.context import chain_context
from promptd.training.forward_sources import forward_sources
from promptd.training.plan import JobPrompts, make_job
from tests.engine.encoder_oracle import FIRST, LAST, MASK, library, oracle, read_under
from tests.engine.harness import frozen
from tests.training.test_job import SNIPS

TEXTS = [(FIRST, 5, 6, MASK, LAST), (FIRST, MASK, LAST), (FIRST, *range(30, 42), MASK, 9, LAST)]
WORDS = {"GetWeather": "w", "PlayMusic": "m"}
TASK = TaskFormat("{text} <mask>", WORDS)
ROWS = "\n".join(json.dumps({"text": text, "label": label}) for text, label in SNIPS).encode()


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    """Ten real voice commands of two intents."""
    return parse_examples(ROWS.decode().splitlines())


def theirs(folder: Path, prompt: torch.Tensor | None, text: tuple[int, ...]) -> torch.Tensor:
    """The vocabulary's logits at the mask by transformers' own masked language model, with autograd; `[vocab_size]`."""
    hf, place = oracle(folder), text.index(MASK)
    if prompt is not None and prompt.dim() == 2:
        place += len(prompt)
    head = hf.lm_head if hasattr(hf, "lm_head") else hf.cls
    return head(read_under(hf, prompt, text).last_hidden_state)[0, place]  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["bert-words", "roberta-words"])
def test_logits_and_gradients_equal_transformers(tiny_encoders: dict[str, Path], family: str) -> None:
    """A soft prompt, a prefix and no prompt, several texts each, in one pass."""
    folder = tiny_encoders[family]
    model = frozen(folder)
    spec, generator, before = model.spec, torch.Generator().manual_seed(1), model.digest()
    soft = torch.randn(6, spec.hidden_size, generator=generator).requires_grad_()
    prefix = torch.randn(spec.num_layers, 2, spec.num_kv_heads, 4, spec.head_dim, generator=generator).requires_grad_()
    groups, sources = [], (TEXTS, TEXTS[1:], TEXTS[:1])
    for prompt, own in zip((soft, prefix, None), sources, strict=True):
        ends = torch.tensor([len(text) for text in own]).cumsum(0).tolist()
        places = [end - len(text) + text.index(MASK) for end, text in zip(ends, own, strict=True)]
        groups.append(PromptedTexts(prompt, (), torch.tensor(places), sources=own))
    found = forward_sources(model, groups)
    weights = [torch.randn(logits.shape, generator=generator) for logits in found]
    sum((logits * weight).sum() for logits, weight in zip(found, weights, strict=True)).backward()  # type: ignore[union-attr]
    for prompt, own, logits, weight in zip((soft, prefix, None), sources, found, weights, strict=True):
        twin = None if prompt is None else prompt.detach().clone().requires_grad_()
        expected = torch.stack([theirs(folder, twin, text) for text in own])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        if prompt is not None and twin is not None:
            (expected * weight).sum().backward()
            assert prompt.grad is not None and twin.grad is not None
            assert twin.grad.abs().max() > 1e-3
            torch.testing.assert_close(prompt.grad, twin.grad, rtol=0, atol=1e-3 * twin.grad.abs().max().item())
    assert model.digest() == before
    swapped = forward_sources(model, [dataclasses.replace(groups[0], prompt=prefix)])[0]
    assert (swapped - found[0]).abs().max() > 1e-2  # control


@pytest.mark.parametrize(
    "method", [ResidualConfig(4, bottleneck_size=8), PTuningV2Config(3)], ids=lambda method: method.name
)
def test_what_is_learned_is_what_is_served(
    tiny_encoders: dict[str, Path], rows: list[Example], method: MethodConfig
) -> None:
    """Forty steps tell the two intents apart by a word at the mask; the artifact has no head, and its words, scored by
    the engine, have the probabilities that the job measured."""
    model = frozen(tiny_encoders["bert-words"])
    config = TrainingConfig(method, num_steps=40, batch_size=5, num_evaluations=4, seed=1)
    job = TrainingJob(model, config, TASK, rows, rows)
    result = train(model, {"job": job})["job"]
    assert result.report.accuracy is not None and result.report.accuracy >= 0.8
    assert result.report.loss < result.bare.loss
    artifact = decode(make_artifact(model, TASK, result).content, model.spec)
    assert artifact.class_labels is None and artifact.manifest.label_words == WORDS
    assert _loss(model, job, [artifact]) == pytest.approx(result.report.loss, rel=1e-3)
    assert _loss(model, job, []) == pytest.approx(result.bare.loss, rel=1e-3)
    assert result.bare.loss > result.report.loss + 0.1  # control: the comparison above tells them apart


def _loss(model: object, job: TrainingJob, chain: list[PromptArtifact]) -> float:
    """The mean loss of the right words on a job's report rows, as the engine serves them under a chain."""
    texts = [f"{row.example.fields['text']} <mask>" for row in job.report_rows]
    bare = [dataclasses.replace(one, manifest=dataclasses.replace(one.manifest, template=None)) for one in chain]
    scores = torch.tensor(LLM(model).score(texts, list(WORDS.values()), [bare] * len(texts)))  # type: ignore[arg-type]
    truth = [list(WORDS).index(row.example.label or "") for row in job.report_rows]
    return -scores[range(len(truth)), truth].mean().item()


@pytest.mark.parametrize("method", [PromptTuningConfig(4), PTuningV2Config(3)], ids=lambda method: method.name)
def test_behind_others(tiny_encoders: dict[str, Path], rows: list[Example], method: MethodConfig) -> None:
    """Behind a text, a soft prompt and a prefix, the loss is that of the served chain, with and without what was
    learned; what is in service is measured, too."""
    model = frozen(tiny_encoders["bert-words"])
    stored = library(tiny_encoders["bert-words"], "bert")
    chain = [stored[1], stored[5], stored[7]]
    behind = chain_context(model, chain)
    config = TrainingConfig(method, num_steps=2, batch_size=5, num_evaluations=1)
    job = TrainingJob(model, config, TASK, rows, rows, behind=behind, replaces=chain_context(model, chain[:2]))
    result = train(model, {"job": job})["job"]
    artifact = make_artifact(model, TASK, result)
    found = [result.report.loss, result.bare.loss, result.before.loss]
    for loss, served in zip(found, ([*chain, artifact], chain, chain[:2]), strict=True):
        assert _loss(model, job, served) == pytest.approx(loss, rel=1e-3)
    assert max(found) - min(found) > 1e-2  # control: the three differ


def test_a_head_is_learned_behind_others(tiny_encoders: dict[str, Path], rows: list[Example]) -> None:
    """A prompt with a head behind a prefix and a soft prompt: the classes that the served chain tells."""
    model = load_model(tiny_encoders["bert"])
    stored = library(tiny_encoders["bert"], "bert")
    chain = [stored[4], stored[1]]
    task = TaskFormat(None, {label: label for label in WORDS})
    config = TrainingConfig(PromptTuningConfig(3), num_steps=3, batch_size=5, num_evaluations=1)
    job = TrainingJob(model, config, task, rows, rows, behind=chain_context(model, chain))
    result = train(model, {"job": job})["job"]
    artifact = make_artifact(model, task, result)
    texts = [row.example.fields["text"] for row in job.report_rows]
    truth = torch.tensor([list(WORDS).index(row.example.label or "") for row in job.report_rows])
    for served, is_same in (([*chain, artifact], True), ([artifact], False)):
        logits = torch.tensor(LLM(model).pool(texts, "classes", [served] * len(texts)))
        loss = torch.nn.functional.cross_entropy(logits, truth).item()
        assert (loss == pytest.approx(result.report.loss, rel=1e-3)) == is_same


def test_jobs_from_rows(tiny_encoders: dict[str, Path]) -> None:
    """The template's mask decides; what does not fit is a typed error that names the field or the line."""
    model = frozen(tiny_encoders["bert-words"])
    spec = JobSpec(
        {"type": "prompt_tuning", "prompt_tuning": {"hyperparameters": {"num_steps": 2}}},
        template="{text} <mask>",
        label_words=WORDS,
    )
    job, task = make_job(model, spec, JobData(ROWS, None))
    artifact = make_artifact(model, task, train(model, {"job": job})["job"])
    assert artifact.manifest.labels is None and artifact.manifest.template == "{text} <mask>"
    again, _ = make_job(model, spec, JobData(ROWS, None), JobPrompts(in_service=[artifact]))
    result = train(model, {"job": again})["job"]
    assert result.before != result.bare  # the prompt in service is measured
    with pytest.raises(InvalidRequestError, match="is one token") as refused:
        make_job(model, dataclasses.replace(spec, label_words=None), JobData(ROWS, None))
    assert refused.value.param == "label_words"
    with pytest.raises(InvalidRequestError, match="predicts words") as refused:
        make_job(load_model(tiny_encoders["bert"]), spec, JobData(ROWS, None))
    assert refused.value.param == "label_words"
    two = parse_examples([json.dumps({"text": "a <mask>", "label": "PlayMusic"})])
    with pytest.raises(TrainingDataError, match=r"line 1.*must have one <mask>, it has 2"):
        encode_examples(model, TASK, two, 4)
