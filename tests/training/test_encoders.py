"""Training where texts are read whole: a prompt and a head are learned together, and served as they were measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from promptd_store import PromptKind, decode
from torch.nn.functional import cross_entropy

from promptd.errors import InvalidRequestError
from promptd.jobs import JobData, JobSpec
from promptd.llm import LLM
from promptd.modeling import FrozenModel, load_model
from promptd.training import (
    METHODS,
    Example,
    MethodConfig,
    PrefixTuningConfig,
    PromptedTexts,
    PromptTuningConfig,
    PTuningV2Config,
    ResidualConfig,
    TaskFormat,
    TrainingConfig,
    TrainingJob,
    Watcher,
    make_artifact,
    parse_examples,
    train,
)
from promptd.training.forward_sources import forward_sources
from promptd.training.methods.headed import split
from promptd.training.plan import JobPrompts, make_job
from tests.engine.encoder_oracle import FIRST, LAST, oracle, read_under
from tests.training.test_job import SNIPS

TEXTS = [(FIRST, 5, 6, 7, LAST), (FIRST, 100, LAST), (FIRST, *range(30, 42), LAST)]
LABELS = ("GetWeather", "PlayMusic")
TASK = TaskFormat(None, {label: label for label in LABELS})
METHOD = ResidualConfig(num_virtual_tokens=4, bottleneck_size=8)
CONFIG = TrainingConfig(METHOD, num_steps=40, batch_size=5, num_evaluations=4, seed=1)


@pytest.fixture(scope="module", params=["bert", "roberta"])
def encoder(tiny_encoders: dict[str, Path], request: pytest.FixtureRequest) -> tuple[FrozenModel, Path]:
    """A tiny encoder and its folder."""
    folder = tiny_encoders[request.param]
    return load_model(folder), folder


@pytest.fixture(scope="module")
def bert(tiny_encoders: dict[str, Path]) -> FrozenModel:
    """A tiny BERT."""
    return load_model(tiny_encoders["bert"])


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    """Ten real voice commands of two intents."""
    return parse_examples(json.dumps({"text": text, "label": label}) for text, label in SNIPS)


def theirs(folder: Path, prompt: torch.Tensor | None, head: torch.Tensor, text: tuple[int, ...]) -> torch.Tensor:
    """One row through transformers' own model and pooler, with autograd; logits `[num_classes]`."""
    output = read_under(oracle(folder), prompt, text)
    features = output.last_hidden_state[:, 0] if output.pooler_output is None else output.pooler_output
    return (features @ head[:, :-1].T + head[:, -1])[0]


def test_logits_and_gradients_equal_transformers(encoder: tuple[FrozenModel, Path]) -> None:
    """A soft prompt, a prefix and no prompt, each with a head of its own size, several texts each, in one pass."""
    model, folder = encoder
    spec, generator = model.spec, torch.Generator().manual_seed(1)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    prompts = {2: leaf(6, spec.hidden_size), 3: leaf(spec.num_layers, 2, spec.num_kv_heads, 4, spec.head_dim), 4: None}
    heads = {count: leaf(count, spec.hidden_size + 1) for count in prompts}
    texts = {2: TEXTS, 3: TEXTS[1:], 4: TEXTS[:1]}
    before = model.digest()
    groups = [
        PromptedTexts(prompt, (), torch.arange(len(texts[count])), sources=texts[count], head=heads[count])
        for count, prompt in prompts.items()
    ]
    found = forward_sources(model, groups)
    weights = [torch.randn(logits.shape, generator=generator) for logits in found]
    sum((logits * weight).sum() for logits, weight in zip(found, weights, strict=True)).backward()  # type: ignore[union-attr]
    for (count, prompt), logits, weight in zip(prompts.items(), found, weights, strict=True):
        twins = [None if one is None else one.detach().clone().requires_grad_() for one in (prompt, heads[count])]
        expected = torch.stack([theirs(folder, twins[0], twins[1], text) for text in texts[count]])  # type: ignore[arg-type]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        (expected * weight).sum().backward()
        for one, twin in zip((prompt, heads[count]), twins, strict=True):
            if one is not None and twin is not None:
                assert one.grad is not None and twin.grad is not None
                assert twin.grad.abs().max() > 1e-3
                torch.testing.assert_close(one.grad, twin.grad, rtol=0, atol=1e-3 * twin.grad.abs().max().item())
    assert model.digest() == before
    swapped = forward_sources(model, [dataclasses.replace(groups[0], prompt=prompts[3])])[0]
    assert (swapped - found[0]).abs().max() > 1e-2  # control


@pytest.mark.parametrize(
    "method",
    [
        METHOD,
        PromptTuningConfig(num_virtual_tokens=4),
        PrefixTuningConfig(num_virtual_tokens=3),
        PTuningV2Config(num_virtual_tokens=3),
    ],
    ids=lambda method: method.name,
)
def test_what_is_learned_is_what_is_served(bert: FrozenModel, rows: list[Example], method: MethodConfig) -> None:
    """Forty steps tell the two intents apart; the artifact, read back and served, scores every row as the job did; the
    base model is as it was."""
    before = bert.digest()
    config = dataclasses.replace(CONFIG, method=method)
    result = train(bert, {"job": TrainingJob(bert, config, TASK, rows, rows)})["job"]
    assert result.report.accuracy is not None and result.report.accuracy >= 0.8
    assert result.report.loss < result.bare.loss
    assert bert.digest() == before
    artifact = decode(make_artifact(bert, TASK, result).content, bert.spec)
    assert artifact.class_labels == LABELS
    assert artifact.manifest.prompt_after_bos == (artifact.kind is PromptKind.SOFT)
    scores = torch.tensor(LLM(bert).pool([row.fields["text"] for row in rows], "classes", [artifact] * len(rows)))
    truth = torch.tensor([LABELS.index(row.label or "") for row in rows])
    learned, head = split(result.prompt, METHODS[method.name].kind, 2, bert.spec)
    assert torch.equal(learned, artifact.learned)
    texts = [tuple(bert.encode(row.fields["text"])) for row in rows]
    (direct,) = forward_sources(bert, [PromptedTexts(learned, (), torch.arange(len(texts)), sources=texts, head=head)])
    torch.testing.assert_close(scores, direct.detach(), rtol=0, atol=1e-4 * direct.abs().max().item())
    everything = cross_entropy(scores, truth).item()  # selection and report are halves of these rows
    assert everything == pytest.approx((result.selection.loss + result.report.loss) / 2, rel=1e-3)


def test_jobs_that_share_passes_get_what_they_get_alone(bert: FrozenModel, rows: list[Example]) -> None:
    """Two soft prompts and a prefix, with heads of two and three classes, side by side and alone; and from a
    checkpoint in the middle."""
    three = [*rows, *parse_examples([json.dumps({"text": "book a table", "label": "BookRestaurant"})] * 2)]
    tasks = {"a": (METHOD, rows), "b": (PTuningV2Config(num_virtual_tokens=3), rows), "c": (METHOD, three)}

    def job(name: str) -> TrainingJob:
        method, own = tasks[name]
        labels = {row.label or "": row.label or "" for row in own}
        config = TrainingConfig(method, num_steps=6, batch_size=4, num_evaluations=2, seed=3)
        return TrainingJob(bert, config, TaskFormat(None, labels), own, own)

    together = train(bert, {name: job(name) for name in tasks})
    for name in tasks:
        alone = train(bert, {name: job(name)})[name]
        torch.testing.assert_close(alone.prompt, together[name].prompt, rtol=0, atol=1e-4)
    taken: list[bytes] = []
    watcher = Watcher(on_checkpoint=taken.append, checkpoint_seconds=0)
    whole = train(bert, {"a": job("a")}, {"a": watcher})["a"]
    again = job("a")
    again.restore(taken[2])
    assert again.step == 3
    assert torch.equal(train(bert, {"a": again})["a"].prompt, whole.prompt)


def test_a_job_from_rows(bert: FrozenModel) -> None:
    """Labels without label words; no words follow the text; what makes no sense here is a typed error."""
    lines = "\n".join(json.dumps({"text": text, "label": label}) for text, label in SNIPS).encode()
    spec = JobSpec(
        name="intents",
        method={
            "type": "prompt_tuning",
            "prompt_tuning": {"hyperparameters": {"num_virtual_tokens": 3, "num_steps": 2}},
        },
    )
    job, task = make_job(bert, spec, JobData(lines, None))
    assert task.template is None and task.label_words is not None and tuple(task.label_words) == LABELS
    result = train(bert, {"job": job})["job"]
    assert make_artifact(bert, task, result).manifest.labels == LABELS
    completions = b"\n".join(b'{"prompt": "%d", "completion": "b"}' % n for n in range(20))
    with pytest.raises(InvalidRequestError, match="writes no completions"):
        make_job(bert, spec, JobData(completions, None))
    artifact = make_artifact(bert, task, result)
    with pytest.raises(InvalidRequestError) as refused:
        make_job(bert, dataclasses.replace(spec, distill={"text": "a text"}), JobData(lines, None))
    assert refused.value.param == "distill"
    warm, _ = make_job(bert, spec, JobData(lines, None), JobPrompts(artifact.learned, in_service=[artifact]))
    assert torch.equal(warm.method.fold()[: 3 * 48].view(3, 48), artifact.learned)
