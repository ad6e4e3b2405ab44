"""Training of T5 and BART: gradients are transformers' own, jobs share passes, what is learned is what is served."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from promptd_store import ArtifactError, PromptArtifact, PromptKind, decode, encode, to_peft, write_peft
from transformers import AutoModelForSeq2SeqLM, DynamicCache, EncoderDecoderCache

from promptd.errors import InvalidRequestError
from promptd.jobs import JobData, JobSpec
from promptd.llm import LLM
from promptd.modeling import FrozenModel, load_model
from promptd.training import (
    Example,
    LowRankConfig,
    MethodConfig,
    PrefixTuningConfig,
    PromptedTexts,
    PromptTuningConfig,
    PTuningV2Config,
    ResidualConfig,
    SuperPosConfig,
    TaskFormat,
    TrainingConfig,
    TrainingDataError,
    TrainingJob,
    UlptConfig,
    Watcher,
    build_method,
    chain_context,
    encode_examples,
    evaluate,
    make_artifact,
    objective_for,
    parse_examples,
    train,
)
from promptd.training.forward_pairs import forward_pairs
from promptd.training.passes import run_shares
from promptd.training.plan import JobPrompts, make_job
from tests.engine.seq2seq_oracle import FIRST, LAST, Row, library
from tests.engine.test_seq2seq_peft import PARAMS, TEXTS, answer
from tests.family_models import SEQ2SEQ
from tests.peft_adapters import WARNS
from tests.training.site import CONTENT, spec_of

pytestmark = WARNS
SOURCES = [(FIRST, 5, 6, 7, LAST), (FIRST, 100, LAST), (FIRST, *range(30, 42), LAST)]
TARGETS = [(0, 8, 9), (321,), (0, *range(50, 59))]
SIZES = {"soft": 6, "longer": 11, "both": 7, "decoder": 4, "whole": 3, "bare": 0}
SHARED = {"soft": [0, 1, 2], "longer": [2, 0], "both": [1, 2], "decoder": [1, 2], "whole": [2, 1, 0], "bare": [1]}
"""Group -> its rows: one prompt has several, and prompts of all kinds and lengths share the pass."""
NUM_TARGET = {"both": 3}
"""Of the rows of a soft prompt, those that stand in front of targets."""
QUESTIONS = b"\n".join(b'{"prompt": "the quick brown fox %d"}' % n for n in range(60))
METHODS: dict[str, MethodConfig] = {
    "residual": ResidualConfig(4, bottleneck_size=8, dropout=0.1),
    "prompt_tuning": PromptTuningConfig(9),
    "low_rank": LowRankConfig(5, rank=2),
    "ulpt": UlptConfig(5),
    "superpos": SuperPosConfig(3),
    "prefix_tuning": PrefixTuningConfig(4, network_size=16),
    "decoder": PTuningV2Config(3, banks="decoder"),
    "both": ResidualConfig(4, bottleneck_size=8, num_target_tokens=3),
}


@functools.cache
def frozen(folder: Path) -> FrozenModel:
    """The model under test, loaded once."""
    return load_model(folder)


def prompt_of(model: FrozenModel, name: str) -> torch.Tensor | None:
    """A prompt whose every number counts."""
    count, spec = SIZES[name], model.spec
    generator = torch.Generator().manual_seed(count)
    if name == "bare":
        return None
    if name in ("decoder", "whole"):
        layers = spec.prefix_layers[name == "whole"]
        shape = (layers, 2, spec.num_kv_heads, count, spec.head_dim)
        return torch.randn(shape, generator=generator).requires_grad_()
    noise = torch.randn(count, spec.hidden_size, generator=generator)
    return (noise * model.embedding_std).requires_grad_()


def theirs(folder: Path, prompt: torch.Tensor | None, row: int, num_target: int = 0) -> torch.Tensor:
    """One row through transformers' own forward, with autograd; `[num_target_tokens, vocab_size]`.

    A prefix of the decoder's comes in by transformers' own cache; the other banks by the oracle's attention.
    """
    target = torch.tensor([TARGETS[row]])
    if prompt is not None and prompt.dim() == 5 and len(prompt) > frozen(folder).spec.num_layers:
        whole = Row(folder, (), SOURCES[row])
        whole.banks = whole._parts(prompt)
        whole.moved = dict.fromkeys(whole.moved, prompt.shape[3])
        return type(whole).logits.__wrapped__(whole, TARGETS[row])  # type: ignore[attr-defined,no-any-return]
    hf = plain(folder)
    embeds = hf.get_input_embeddings()(torch.tensor(SOURCES[row]))
    own = DynamicCache()
    if prompt is not None and prompt.dim() == 2:
        embeds = torch.cat([prompt[: len(prompt) - num_target], embeds])
    elif prompt is not None:
        for layer, (key, value) in enumerate(prompt):
            own.update(key[None], value[None], layer)
    cache = EncoderDecoderCache(own, DynamicCache())
    words = hf.get_input_embeddings()(target)
    if prompt is not None and num_target:
        words = torch.cat([prompt[None, -num_target:], words], 1)
    output = hf(inputs_embeds=embeds[None], decoder_inputs_embeds=words, past_key_values=cache, use_cache=True)
    return output.logits[0, num_target:]  # type: ignore[no-any-return]


@functools.cache
def plain(folder: Path) -> Any:
    """Transformers' own model and attention."""
    return AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager").eval()


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    """A loss that weighs every logit differently."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(len(logits)))
    return (torch.log_softmax(logits, -1) * weights).sum()


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_logits_and_gradients_equal_transformers(tiny_seq2seq: dict[str, Path], family: str) -> None:
    """Soft prompts, prefixes of one bank and of three, soft prompts of both sides and no prompt,
    thirteen rows in one pass; no weight learns."""
    folder = tiny_seq2seq[family]
    model = frozen(folder)
    before = model.digest()
    groups = {}
    for name, rows in SHARED.items():
        texts = [TARGETS[row] for row in rows]
        index = torch.arange(sum(map(len, texts)))
        groups[name] = PromptedTexts(
            prompt_of(model, name), texts, index, sources=[SOURCES[row] for row in rows],
            num_target=NUM_TARGET.get(name, 0),
        )  # fmt: skip
    found = dict(zip(groups, forward_pairs(model, list(groups.values())), strict=True))
    torch.autograd.backward([loss_of(logits) for logits in found.values()])
    for name, group in groups.items():
        twin = None if group.prompt is None else group.prompt.detach().clone().requires_grad_()
        expected = torch.cat([theirs(folder, twin, row, group.num_target) for row in SHARED[name]])
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-4 * expected.abs().max().item(), msg=name)
        if twin is None or group.prompt is None:
            continue
        loss_of(expected).backward()
        assert group.prompt.grad is not None and twin.grad is not None
        assert (twin.grad.flatten(1).abs().amax(1) > 1e-4).all()  # every token, every layer of every bank
        torch.testing.assert_close(group.prompt.grad, twin.grad, rtol=0, atol=1e-3 * twin.grad.abs().max().item())
    assert model.digest() == before
    assert all(parameter.grad is None for parameter in model.hf.parameters())
    swapped = dataclasses.replace(groups["longer"], prompt=groups["soft"].prompt)  # control
    assert (forward_pairs(model, [swapped])[0] - found["longer"]).abs().max() > 1e-2 * found["longer"].abs().max()


def rows_of(kind: str) -> list[Example]:
    """Eight rows of one kind."""
    lines = [json.loads(line) for line in CONTENT.splitlines()[:8]]
    if kind == "completions":
        lines = [{"prompt": line["text"], "completion": f" {line['label']} {n}"} for n, line in enumerate(lines)]
    return parse_examples(map(json.dumps, lines))


TASKS = {
    "labels": TaskFormat(None, {"weather": " weather", "music": " music please"}),
    "completions": TaskFormat(),
}


def jobs_of(model: FrozenModel, num_steps: int) -> dict[str, TrainingJob]:
    """A job of every method, of both kinds of rows, with numbers of their own."""
    jobs = {}
    for seed, (name, method) in enumerate(METHODS.items()):
        kind = list(TASKS)[seed % 2]
        config = TrainingConfig(method, num_steps=num_steps, batch_size=2 + seed % 3, num_evaluations=2, seed=seed)
        jobs[name] = TrainingJob(model, config, TASKS[kind], rows_of(kind), rows_of(kind))
    return jobs


@pytest.mark.parametrize("family", ["t5-v1.1", "bart"])
def test_a_mixed_pass_gives_every_job_its_own_gradient(tiny_seq2seq: dict[str, Path], family: str) -> None:
    """Eight ways side by side: at each of five steps a job's gradient is the one it gets alone."""
    model = frozen(tiny_seq2seq[family])
    running = {name: job.shares() for name, job in jobs_of(model, 8).items()}
    waiting = {name: next(shares) for name, shares in running.items()}
    worst, num_compared = 0.0, 0
    for _ in range(5):
        alone = {}
        for name, share in waiting.items():
            prompt = None if share.prompt is None else share.prompt.detach().clone()
            copy = dataclasses.replace(share, prompt=None if prompt is None else prompt.requires_grad_(share.learns))
            run_shares(model, [copy])
            alone[name] = copy.prompt
        run_shares(model, list(waiting.values()))
        for name, share in waiting.items():
            expected = alone[name]
            if share.learns and share.prompt is not None and expected is not None:
                assert share.prompt.grad is not None and expected.grad is not None
                difference = (share.prompt.grad - expected.grad).norm() / expected.grad.norm()
                worst, num_compared = max(worst, difference.item()), num_compared + 1
        waiting = {name: next(shares) for name, shares in running.items()}
    assert worst < 3e-5  # float32: 0.7 to 1.4e-5 as sums are cut; another's gradient would be of the order of 1
    assert num_compared >= 3 * len(METHODS)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_what_is_learned_is_what_is_served(tiny_seq2seq: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Every method beside the others: less loss than without a prompt, the base model untouched; the artifact, read
    back and served, scores the rows as the job did; and PEFT, where it has a layout, answers what we answer."""
    folder = tiny_seq2seq[family]
    model = frozen(folder)
    before, llm = model.digest(), LLM(model)
    results = train(model, jobs_of(model, 12))
    assert model.digest() == before
    start, exported = model.hf.config.decoder_start_token_id, []
    for seed, (name, result) in enumerate(results.items()):
        kind = list(TASKS)[seed % 2]
        task, rows = TASKS[kind], rows_of(kind)
        assert result.report.loss < result.bare.loss, name
        artifact = decode(make_artifact(model, task, result).content, model.spec)
        assert not artifact.manifest.prompt_after_bos
        parts = [artifact.learned, artifact.target_embeddings]
        assert torch.equal(torch.cat([part for part in parts if part is not None]), result.prompt)
        assert [0 if part is None else part.shape[-2] for part in parts] == [
            METHODS[name].num_virtual_tokens, METHODS[name].num_target_tokens,
        ]  # fmt: skip
        encoded = encode_examples(model, task, rows, METHODS[name].num_virtual_tokens)
        objective = objective_for(model, task)
        objective.num_target_tokens = METHODS[name].num_target_tokens
        measured = evaluate(model, result.prompt, encoded, objective)
        if task.label_words:
            words = dict(task.label_words)
            scores = torch.tensor(llm.score([row.fields["text"] for row in rows], list(words.values()), [artifact] * 8))
            truth = torch.tensor([list(words).index(row.label or "") for row in rows])
            assert measured.accuracy == (scores.argmax(1) == truth).float().mean().item()
        found = [_written(folder, [artifact], row.source_ids, row.target_ids, start) for row in encoded]
        assert measured.loss == pytest.approx(-torch.cat(found).mean().item(), rel=1e-3)
        is_soft = artifact.kind is PromptKind.SOFT and artifact.target_embeddings is None
        if is_soft or (name == "decoder" and family == "bart"):
            exported.append(name)
            write_peft(artifact, tmp_path / name, spec=model.spec)
            tuned = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(folder), tmp_path / name).eval()
            (found_text,) = llm.generate(TEXTS[1:2], [artifact], PARAMS)
            assert found_text.token_ids == answer(tuned, TEXTS[1], start)
        else:
            with pytest.raises(ArtifactError):
                to_peft(artifact, spec=model.spec)
    assert len(exported) == (6 if family == "bart" else 5)


def _written(
    folder: Path, chain: Sequence[PromptArtifact], source: tuple[int, ...], target: tuple[int, ...], start: int
) -> torch.Tensor:
    """Transformers' log-probability of each token of a target under a chain of prompts."""
    logits = Row(folder, chain, source).logits((start, *target[:-1]))
    return logits.log_softmax(-1)[range(len(target)), list(target)]


def test_chains_are_read_as_they_are_served(tiny_seq2seq: dict[str, Path]) -> None:
    """A prompt that is learned behind a text, a soft prompt and prefixes of one and three banks gets the loss that the
    served chain has, and so does what a chain in service scores. Control: behind half of the chain it is another."""
    folder = tiny_seq2seq["bart"]
    model = frozen(folder)
    stored = library(folder)
    chain = [stored[7], stored[3], stored[9], stored[5], stored[8]]
    behind = chain_context(model, chain)
    rows = rows_of("completions")
    start = model.hf.config.decoder_start_token_id
    for method in (METHODS["prompt_tuning"], PTuningV2Config(2)):
        config = TrainingConfig(method, num_steps=2, batch_size=4, num_evaluations=1)
        job = TrainingJob(model, config, TaskFormat(), rows, rows, behind=behind, replaces=behind)
        result = train(model, {"job": job})["job"]
        artifact = make_artifact(model, TaskFormat(), result)
        for context, scores in (([*chain, artifact], result.report), (chain, result.bare), (chain, result.before)):
            found = [_written(folder, context, row.source_ids, row.target_ids, start) for row in job.report_rows]
            assert scores.loss == pytest.approx(-torch.cat(found).mean().item(), rel=1e-3)
        other = [*chain[:2], artifact]
        half = [_written(folder, other, row.source_ids, row.target_ids, start) for row in job.report_rows]
        assert abs(result.report.loss + torch.cat(half).mean().item()) > 1e-2


def test_jobs_from_rows(tiny_seq2seq: dict[str, Path], tiny_models: dict[str, Path]) -> None:
    """Labels without label words, no word behind the text; a checkpoint goes on bit for bit; a prompt to begin with;
    and what makes no sense, or does not fit, is a typed error."""
    model = frozen(tiny_seq2seq["t5"])
    job, task = make_job(model, spec_of(None, 0, num_steps=6), JobData(CONTENT, None))
    assert task.template is None and task.label_words == {"music": " music", "weather": " weather"}
    taken: list[bytes] = []
    result = train(model, {"job": job}, {"job": Watcher(on_checkpoint=taken.append, checkpoint_seconds=0)})["job"]
    again, _ = make_job(model, spec_of(None, 0, num_steps=6), JobData(CONTENT, None))
    again.restore(taken[2])
    assert again.step == 3
    assert torch.equal(train(model, {"job": again})["job"].prompt, result.prompt)
    artifact = make_artifact(model, task, result)
    warm, _ = make_job(model, spec_of(None, 0), JobData(CONTENT, None), JobPrompts(artifact.learned, [artifact]))
    assert warm.method.fold().shape == artifact.learned.shape
    for distill, digest, param in (
        ({"text": "a text"}, None, "training_file"),
        ({"text": "a text", "answer_tokens": 0}, "sha256:0", "distill.answer_tokens"),
    ):
        with pytest.raises(InvalidRequestError) as refused:
            make_job(
                model, JobSpec(spec_of(None, 0).method, distill=distill, rows_digest=digest), JobData(QUESTIONS, None)
            )
        assert refused.value.param == param
    decoder_only = PTuningV2Config(2, banks="decoder")
    with pytest.raises(InvalidRequestError, match="of the banks that are learned") as refused:
        build_method(PTuningV2Config(2), model, seed=0, warm_start=build_method(decoder_only, model, seed=0).fold())
    assert refused.value.param == "warm_start"
    both, stored = PromptTuningConfig(4, num_target_tokens=3), torch.randn(6, model.spec.hidden_size)
    begun = build_method(both, model, seed=0, warm_start=stored).fold()
    assert torch.equal(begun[:4], stored[:4]) and begun.shape[0] == 7 and not torch.equal(begun[4:6], stored[4:])
    for config, other in ((both, load_model(tiny_models["llama"])), (PTuningV2Config(2, num_target_tokens=1), model)):
        with pytest.raises(InvalidRequestError, match="num_target_tokens must be 0") as refused:
            build_method(config, other, seed=0)
        assert refused.value.param == "num_target_tokens"
    long = json.dumps({"prompt": "word " * 600, "completion": "a"})
    with pytest.raises(TrainingDataError, match="model's length"):
        encode_examples(model, TaskFormat(), parse_examples([long]), 4)


def test_a_text_is_distilled(tiny_seq2seq: dict[str, Path]) -> None:
    """The teacher writes targets with its text in front of the source, drawn from transformers' own distribution, whose
    divergence from the bare model is the one that is measured; what is learned comes closer."""
    folder = tiny_seq2seq["t5-v1.1"]
    model = frozen(folder)
    text = "the lazy dog plays some music for two people tomorrow"
    settings = {"num_virtual_tokens": 12, "num_steps": 25}
    method = {"type": "prompt_tuning", "prompt_tuning": {"hyperparameters": settings}}
    distill = {"text": text, "answer_tokens": 5, "top_k": 323}
    job, task = make_job(model, JobSpec(method, distill=distill, rows_digest="sha256:0"), JobData(QUESTIONS, None))
    result = train(model, {"job": job})["job"]
    assert 0 < result.report.loss < 0.75 * result.bare.loss
    assert result.distilled is not None and not result.distilled["writes_rows"]
    told = [encode("text", text=text)]
    divergence, start = [], model.hf.config.decoder_start_token_id
    for row in job.report_rows:
        assert 1 <= len(row.target_ids) <= 5
        teacher, bare = (
            Row(folder, chain, row.source_ids).logits((start, *row.target_ids[:-1])).log_softmax(-1)
            for chain in (told, [])
        )
        divergence += (teacher.exp() * (teacher - bare)).sum(-1).tolist()
    assert result.bare.loss == pytest.approx(sum(divergence) / len(divergence), rel=1e-3)
    assert make_artifact(model, task, result).kind is PromptKind.SOFT
