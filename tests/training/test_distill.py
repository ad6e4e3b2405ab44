"""Distillation: the divergence from a teacher that has a text in its context, learned into a few virtual tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from promptd_store import PromptArtifact, PromptKind, encode
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, PreTrainedModel

from promptd.errors import InvalidRequestError
from promptd.jobs import JobData, JobSpec, JobState
from promptd.modeling import FrozenModel
from promptd.training import (
    DistillConfig,
    Encoded,
    Example,
    PTuningV2Config,
    TaskFormat,
    Teacher,
    TrainingConfig,
    TrainingDataError,
    TrainingJob,
    Watcher,
    encode_examples,
    example_of,
    prompt_key_values,
    train,
)
from promptd.training.distill_objective import DistillObjective
from promptd.training.passes import Share, Shares, run_shares
from promptd.training.plan import make_job
from tests.tiny_models import adding_bos
from tests.training.test_worker import house

TEXT = "the restaurant near the river is cheap and the lazy dog plays some music for two people tomorrow"
VERBS, THINGS = ("is", "book", "play"), ("a fox", "the city")
QUESTIONS = [f"{verb} {thing} {n}" for n in range(60) for verb in VERBS for thing in THINGS]


def text_prompt(text: str = TEXT) -> PromptArtifact:
    """A text as a prompt."""
    return encode(PromptKind.TEXT, None, text=text)


def questions(rows: list[str]) -> list[Example]:
    """Rows without targets."""
    return [example_of(line, {"prompt": text}, is_question=True) for line, text in enumerate(rows, start=1)]


def teacher_of(model: FrozenModel, text: str = TEXT, *, seed: int = 0, **config: Any) -> Teacher:
    """A teacher with a text."""
    settings = DistillConfig(text=text, **{"answer_tokens": 8, "top_k": 16} | config)
    return Teacher(model, settings, [text_prompt(text)], writes_rows=False, seed=seed)


def asked(model: FrozenModel, teacher: Teacher, examples: list[Example] | None = None) -> list[Encoded]:
    """Ask the teacher about rows, without a job."""
    rows = teacher.checked(encode_examples(model, TaskFormat(), examples or questions(QUESTIONS[:40]), 0), 0)
    shares: Shares[list[Encoded]] = teacher.complete(rows)
    while True:
        try:
            run_shares(model, [next(shares)])
        except StopIteration as end:
            done: list[Encoded] = end.value
            return done


def reference(hf: PreTrainedModel, before: torch.Tensor, row: Encoded) -> torch.Tensor:
    """transformers' log-probabilities at the row's targets, behind embeddings."""
    ids = torch.tensor([*row.text_ids, *row.target_ids])
    embeds = torch.cat([before, hf.get_input_embeddings()(ids)])
    logits: torch.Tensor = hf(inputs_embeds=embeds[None]).logits[0]
    first = len(before) + len(row.text_ids) - 1
    return logits[first : first + len(row.target_ids)].log_softmax(-1)


def merged(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The probabilities of these tokens, and of all others together."""
    chosen = log_probs.exp().gather(1, ids)
    return torch.cat([chosen, 1 - chosen.sum(1, keepdim=True)], 1)


@pytest.mark.parametrize("top_k", [1, 7, 320])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_divergence_and_gradient_equal_a_reference(
    frozen_models: dict[str, FrozenModel], tiny_models: dict[str, Path], family: str, top_k: int
) -> None:
    """KL over the teacher's k likeliest tokens and the rest, from transformers' own forward and torch's own kl_div."""
    model = frozen_models[family]
    hf = AutoModelForCausalLM.from_pretrained(tiny_models[family], attn_implementation="eager").eval()
    rows = asked(model, teacher_of(model, top_k=top_k), questions(QUESTIONS[:3]))
    prompt = torch.randn(5, model.spec.hidden_size) * model.embedding_std
    ours, theirs = prompt.clone().requires_grad_(), prompt.clone().requires_grad_()
    share = Share(DistillObjective(), rows, ours)
    run_shares(model, [share])
    before = hf.get_input_embeddings()(torch.tensor(model.encode(TEXT)))
    total = torch.zeros(())
    for row in rows:
        with torch.no_grad():
            teacher = reference(hf, before, row)
        student = reference(hf, theirs, row)
        if top_k == 320:  # the whole vocabulary: nothing is merged
            total = total + kl_div(student, teacher, log_target=True, reduction="sum")
        else:
            ids = teacher.topk(top_k).indices
            p, q = merged(teacher, ids), merged(student, ids)
            total = total + (p * (p / q).log()).sum()
    total.backward()
    assert share.result.loss.item() == pytest.approx(total.item(), rel=1e-4)
    assert share.result.num_terms == sum(len(row.target_ids) for row in rows)
    assert ours.grad is not None and theirs.grad is not None and theirs.grad.abs().max() > 1e-3
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-3 * theirs.grad.abs().max().item())


def test_divergence_grows_with_k_and_is_zero_for_the_teacher_itself(llama: FrozenModel) -> None:
    """Merging outcomes hides divergence and never adds any; who has the text itself diverges by nothing."""

    def measured(top_k: int, prompt: torch.Tensor | None) -> float:
        share = Share(DistillObjective(), asked(llama, teacher_of(llama, top_k=top_k)), prompt)
        run_shares(llama, [share])
        return share.result.nll / share.result.num_target_tokens

    bare = [measured(top_k, None) for top_k in (1, 8, 64, 320)]
    assert bare == sorted(bare) and bare[0] > 0 and bare[-1] > 1.02 * bare[0]
    text = llama.embed(torch.tensor(llama.encode(TEXT))).detach()
    for top_k in (1, 64, 320):
        assert abs(measured(top_k, text)) < 1e-5


def test_a_teacher_writes_what_it_would_say(llama: FrozenModel) -> None:
    """Answers follow the seed and the teacher's distribution; a row's answer does not depend on its neighbours."""
    answers = [row.target_ids for row in asked(llama, teacher_of(llama, seed=3))]
    assert answers == [row.target_ids for row in asked(llama, teacher_of(llama, seed=3))]
    assert answers != [row.target_ids for row in asked(llama, teacher_of(llama, seed=4))]
    assert answers != [row.target_ids for row in asked(llama, teacher_of(llama, "music", seed=3))]
    assert answers[:2] == [row.target_ids for row in asked(llama, teacher_of(llama, seed=3), questions(QUESTIONS[:2]))]
    ends = [ids for ids in answers if len(ids) < 8]
    assert all(len(ids) == 8 or ids[-1] in llama.eos_token_ids for ids in answers) and len(ends) < len(answers)
    given = [example_of(1, {"prompt": "is it", "completion": " cheap"}, is_question=True)]
    (row,) = asked(llama, teacher_of(llama), given)
    assert row.target_ids == (*llama.encode(" cheap"), llama.tokenizer.eos_token_id)
    (row,) = asked(llama, teacher_of(llama, answer_tokens=0), questions(QUESTIONS[:1]))
    assert (row.text_ids + row.target_ids, len(row.text_ids)) == (tuple(llama.encode(QUESTIONS[0])), 1)


CONFIG = TrainingConfig(PTuningV2Config(20, learning_rate=0.2), num_steps=150, batch_size=32, num_evaluations=5)


def job_of(
    model: FrozenModel, teacher: Teacher, config: TrainingConfig = CONFIG, texts: list[str] = QUESTIONS
) -> TrainingJob:
    """A job that distills."""
    rows = questions(texts)
    return TrainingJob(model, config, TaskFormat(), rows[40:], rows[:40], teacher=teacher)


def test_the_student_learns_its_teachers_text_and_no_other(llama: FrozenModel) -> None:
    """Held-out divergence falls to a fraction of the bare model's; the same words shuffled teach another thing."""
    job = job_of(llama, teacher_of(llama))
    result = train(llama, {"job": job})["job"]
    words = TEXT.split()
    random.Random(1).shuffle(words)
    other = train(llama, {"job": job_of(llama, teacher_of(llama, " ".join(words)))})["job"]
    share = Share(DistillObjective(), job.report_rows, other.prompt)
    run_shares(llama, [share])
    wrongly = share.result.nll / share.result.num_target_tokens
    assert result.report.loss < 0.4 * result.bare.loss
    assert wrongly > 2 * result.report.loss
    assert (result.report.accuracy, result.majority) == (None, None)


SHORT = dataclasses.replace(CONFIG, num_steps=6, num_evaluations=2)


def test_mixed_and_resumed_it_stays_the_same(llama: FrozenModel, text_rows: list[Example]) -> None:
    """Beside another job the losses are those of a run alone; a checkpoint brings along what the teacher wrote."""
    saved: list[bytes] = []
    alone = train(
        llama,
        {"job": job_of(llama, teacher_of(llama), SHORT, QUESTIONS[:80])},
        {"job": Watcher(on_checkpoint=saved.append, checkpoint_seconds=-1)},
    )["job"]
    other = TrainingJob(llama, SHORT, TaskFormat(), text_rows, text_rows)
    jobs = {"other": other, "job": job_of(llama, teacher_of(llama), SHORT, QUESTIONS[:80])}
    mixed = train(llama, jobs)
    assert mixed["job"].report.loss == pytest.approx(alone.report.loss, rel=1e-4)
    assert mixed["job"].bare.loss == pytest.approx(alone.bare.loss, rel=1e-4)
    apart = train(llama, {"other": TrainingJob(llama, SHORT, TaskFormat(), text_rows, text_rows)})["other"]
    assert mixed["other"].report.loss == pytest.approx(apart.report.loss, rel=1e-4)

    resumed = job_of(llama, teacher_of(llama), SHORT, QUESTIONS[:80])
    resumed.restore(saved[2])
    assert all(row.target_ids for row in resumed.report_rows)  # nothing is left to write
    assert torch.equal(train(llama, {"job": resumed})["job"].prompt, alone.prompt)
    with pytest.raises(InvalidRequestError, match="of other rows"):
        job_of(llama, teacher_of(llama, "another text"), SHORT, QUESTIONS[:80]).restore(saved[2])


def test_a_tokenizer_that_adds_bos(llama: FrozenModel, tiny_models: dict[str, Path]) -> None:
    """The teacher reads BOS, its text, the row; the student its prompt, BOS, the row: one BOS each."""
    tokenizer = adding_bos(llama.tokenizer)
    family = type(llama.family)(llama.hf, tokenizer, llama.family.sizes)
    model = dataclasses.replace(llama, tokenizer=tokenizer, family=family)
    bos = model.bos_token_id
    assert model.begins_after_bos([text_prompt()]) and not llama.begins_after_bos([text_prompt()])
    (row,) = asked(model, teacher_of(model, answer_tokens=4, top_k=320), questions(["is it"]))
    assert row.text_ids == (bos, *llama.encode("is it"))
    hf = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], attn_implementation="eager").eval()
    text = dataclasses.replace(row, text_ids=(bos, *llama.encode(TEXT), *row.text_ids[1:]))
    with torch.no_grad():
        expected = reference(hf, torch.empty(0, model.spec.hidden_size), text)
    assert row.teacher is not None
    found = torch.full_like(expected, 0).scatter(1, row.teacher.token_ids.long(), row.teacher.log_probs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, "text and prompt: give one of them, got None and None"),
        ({"text": "a", "prompt": "b"}, "give one of them, got 'a' and 'b'"),
        ({"text": "a", "top_k": 0}, "top_k must be a whole number from 1 to 16384, got 0"),
        ({"text": "a", "answer_tokens": 2000}, "answer_tokens must be a whole number from 0 to 1024, got 2000"),
        ({"text": "a", "num_rows": 1}, "num_rows must be a whole number from 8 to 10000, got 1"),
        ({"text": "a", "cue": ""}, "cue must have tokens"),
    ],
)
def test_bad_settings_name_field_and_value(config: dict[str, Any], told: str) -> None:
    """Checked on creation."""
    with pytest.raises(InvalidRequestError) as caught:
        DistillConfig(**config)
    assert told in caught.value.message


def test_rows_that_do_not_fit(llama: FrozenModel) -> None:
    """Too long behind the text, too short to compare, labelled, or too many to remember: told before training."""
    long = "word " * 60
    rows = encode_examples(llama, TaskFormat(), questions(["a", long]), 0)
    with pytest.raises(TrainingDataError, match=r"line 2: \d+ tokens before it .* exceed the model's length of 256"):
        teacher_of(llama, "the city " * 30).checked(rows, 0)
    one = encode_examples(llama, TaskFormat(), questions(["a"]), 0)
    with pytest.raises(TrainingDataError, match="line 1: has one token"):
        teacher_of(llama, answer_tokens=0).checked(one, 0)
    with pytest.raises(TrainingDataError, match="line 1: has a label, 'x'"):
        example_of(1, {"text": "a", "label": "x"}, is_question=True)
    many = [dataclasses.replace(one[0]) for _ in range(20_000)]
    with pytest.raises(InvalidRequestError, match="a smaller top_k") as caught:
        teacher_of(llama, answer_tokens=100, top_k=320).checked(many, 0)
    assert caught.value.param == "distill.top_k"


def test_where_it_begins(llama: FrozenModel) -> None:
    """Without another wish the student begins with the text's first tokens, as embeddings or as keys and values."""
    first = llama.embed(torch.tensor(llama.encode(TEXT)[:4])).detach()
    for method, expected in (("prompt_tuning", first), ("p_tuning_v2", None)):
        hyper = {"num_virtual_tokens": 4, "num_steps": 1}
        spec = JobSpec({"type": method, method: {"hyperparameters": hyper}}, distill={"text": TEXT, "num_rows": 10})
        job, _ = make_job(llama, spec, JobData(b"", None))
        start = job.method.fold()
        if expected is None:
            expected = prompt_key_values(llama, first).detach()
        torch.testing.assert_close(start, expected, rtol=0, atol=1e-5)
        chosen = dataclasses.replace(
            spec, method={"type": method, method: {"hyperparameters": {**hyper, "init": "random_uniform"}}}
        )
        assert not torch.allclose(make_job(llama, chosen, JobData(b"", None))[0].method.fold(), start)


def test_a_text_is_replaced_by_what_was_learned_from_it(llama: FrozenModel, tmp_path: Path) -> None:
    """Through the queue, without any rows: the name that meant a text means virtual tokens that say the same."""

    async def story() -> None:
        async with house(llama, tmp_path) as home:
            await home.catalog.publish("acme", "manual", text_prompt().content)
            asks = {"prompt": "acme/manual", "num_rows": 160, "row_tokens": 8, "top_k": 32}
            settings = {"num_steps": 100, "batch_size": 16, "num_virtual_tokens": 12, "publish_worse": False}
            method = ("p_tuning_v2", {"learning_rate": 0.2})
            job = await home.ended(
                await home.create(None, name="manual", distill=asks, settings=settings, method=method)
            )
            assert job.state is JobState.SUCCEEDED and job.result is not None, job.error
            assert job.result.scores_after["loss"] < 0.6 * job.result.scores_before["loss"]
            record = await home.catalog.resolve("acme", "manual")
            assert (record.kind, record.number, record.num_virtual_tokens) == (PromptKind.PREFIX, 2, 12)
            taught = record.provenance["distilled"]
            assert taught["teacher"] == [text_prompt().version] and taught["writes_rows"] is True
            bad = await home.ended(await home.create(None, name="x", distill={"prompt": "nobody"}))
            assert bad.error is not None and bad.error.param == "distill.prompt"

    asyncio.run(story())


def test_written_tokens_are_the_distributions_own(llama: FrozenModel) -> None:
    """Token by token from kept keys is the whole text at once: each token is the one that its draw falls on."""
    teacher = teacher_of(llama, seed=5, answer_tokens=12, top_k=320)
    for number, row in enumerate(asked(llama, teacher, questions(QUESTIONS[:6]))):
        assert row.teacher is not None
        probs = torch.zeros(len(row.target_ids), 320).scatter(
            1, row.teacher.token_ids.long(), row.teacher.log_probs.exp()
        )
        above = probs.double().cumsum(1)
        for place, (token, draw) in enumerate(zip(row.target_ids, teacher._draws(number), strict=False)):
            low = above[place, token - 1].item() if token else 0.0
            assert low - 1e-4 <= draw <= above[place, token].item() + 1e-4
