"""Prompts that are trained behind stored ones: as served in a chain, to the last digit, and nothing else moves."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from promptd_store import PromptArtifact, PromptKind, decode, encode
from transformers import AutoModelForCausalLM, DynamicCache

from promptd.engine.request import SamplingParams
from promptd.jobs import JobState
from promptd.llm import LLM
from promptd.modeling import FrozenModel, load_model
from promptd.training import (
    Example,
    MethodConfig,
    PromptedTexts,
    PromptTuningConfig,
    PTuningV2Config,
    ResidualConfig,
    TaskFormat,
    TrainingConfig,
    TrainingJob,
    Watcher,
    chain_context,
    encode_examples,
    evaluate,
    forward_groups,
    make_artifact,
    objective_for,
    prompt_key_values,
    train,
)
from promptd.training.context import CHUNK_TOKENS, text_context
from promptd.training.objectives import LabelObjective
from tests.tiny_models import FAMILIES, make_tiny_model
from tests.training.conftest import WORDS
from tests.training.test_worker import house

TEXTS = [(5, 6, 7), (100,), tuple(range(30, 42))]
CONFIG = TrainingConfig(ResidualConfig(4, bottleneck_size=8, dropout=0.1), num_steps=6, batch_size=3, num_evaluations=2)


def noise(model: FrozenModel, count: int, seed: int = 0) -> torch.Tensor:
    """A soft prompt at the model's scale."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, model.spec.hidden_size, generator=generator) * model.embedding_std


def chain_of(model: FrozenModel, kinds: Sequence[str]) -> list[PromptArtifact]:
    """Stored prompts of these kinds, all different."""
    chain = []
    for seed, kind in enumerate(kinds):
        soft = noise(model, 2 + seed, seed)
        if kind == "text":
            chain.append(encode(PromptKind.TEXT, None, text=f"book a table {seed}"))
        elif kind.startswith("soft"):
            chain.append(encode(PromptKind.SOFT, soft, prompt_after_bos=kind == "soft after bos"))
        else:
            convention: Any = kind.split()[0]
            prefix = prompt_key_values(model, soft).detach().contiguous()
            chain.append(encode(PromptKind.PREFIX, prefix, position_convention=convention))
    return chain


CHAINS = (
    ("soft", "unshifted prefix", "text"),
    ("shifted prefix", "soft"),
    ("text", "shifted prefix"),
    ("soft after bos", "unshifted prefix", "soft"),
)


def cache_of(hf: Any, model: FrozenModel, chain: Sequence[PromptArtifact]) -> tuple[DynamicCache, int]:
    """The chain in transformers' own cache, and the position of what follows."""
    cache, position = DynamicCache(config=hf.config), 0

    def run(embeds: torch.Tensor) -> None:
        nonlocal position
        positions = torch.arange(position, position + len(embeds))[None]
        hf(inputs_embeds=embeds[None], position_ids=positions, past_key_values=cache)
        position += len(embeds)

    if chain[0].manifest.prompt_after_bos:
        run(hf.get_input_embeddings()(torch.tensor([model.bos_token_id])))
    for artifact in chain:
        if artifact.kind is PromptKind.TEXT:
            run(hf.get_input_embeddings()(torch.tensor(model.encode(artifact.manifest.text or ""))))
        elif artifact.kind is PromptKind.SOFT:
            run(artifact.tensors["prompt_embeddings"])
        else:
            prefix = artifact.tensors["prefix"]
            for layer, (key, value) in enumerate(prefix):
                cache.update(key[None], value[None], layer)
            position += prefix.shape[3] if artifact.manifest.position_convention == "shifted" else 0
    return cache, position


def theirs(hf: Any, cache: DynamicCache, position: int, prompt: torch.Tensor, text: tuple[int, ...]) -> torch.Tensor:
    """Prompt and text behind the cache through transformers, with autograd to the prompt."""
    cache, embeds = copy.deepcopy(cache), hf.get_input_embeddings()(torch.tensor(text))
    if prompt.dim() == 2:
        embeds, start = torch.cat([prompt, embeds]), position
    else:
        for layer, (key, value) in enumerate(prompt):
            cache.update(key[None], value[None], layer)
        start = position + prompt.shape[3]
    positions = torch.arange(start, start + len(embeds))[None]
    logits: torch.Tensor = hf(inputs_embeds=embeds[None], position_ids=positions, past_key_values=cache).logits[0]
    return logits[-len(text) :]


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    """A loss that weighs every logit differently."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(len(logits)))
    return (torch.log_softmax(logits, -1) * weights).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_transformers(tiny_models: dict[str, Path], family: str) -> None:
    """Soft prompts and prefixes behind chains of every kind, all in one pass, against transformers' cache."""
    model = load_model(tiny_models[family])
    hf = AutoModelForCausalLM.from_pretrained(tiny_models[family], attn_implementation="eager").eval()
    chains = [chain_of(model, kinds) for kinds in CHAINS]
    index = torch.arange(sum(map(len, TEXTS)))
    groups = []
    for number, chain in enumerate(chains):
        soft = noise(model, 3 + number, 10 + number)
        prompt = prompt_key_values(model, soft).detach() if number % 2 else soft
        groups.append(PromptedTexts(prompt.requires_grad_(), TEXTS, index, chain_context(model, chain)))
    alone = PromptedTexts(noise(model, 5, 20).requires_grad_(), TEXTS, index)
    logits = forward_groups(model, [*groups, alone])
    torch.autograd.backward([loss_of(own) for own in logits])
    for chain, group, ours in zip(chains, groups, logits, strict=False):
        assert group.prompt is not None and group.prompt.grad is not None
        twin = group.prompt.detach().clone().requires_grad_()
        with torch.no_grad():
            cache, position = cache_of(hf, model, chain)
        expected = torch.cat([theirs(hf, cache, position, twin, text) for text in TEXTS])
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        loss_of(expected).backward()
        assert twin.grad is not None and twin.grad.abs().max() > 1e-3
        torch.testing.assert_close(group.prompt.grad, twin.grad, rtol=0, atol=1e-4 * twin.grad.abs().max().item())
        with torch.no_grad():  # control: one position too early is noticed
            moved = torch.cat([theirs(hf, cache, position - 1, twin, text) for text in TEXTS])
        assert (moved - expected).abs().max() > 1e-2 * expected.abs().max()


def test_a_long_text_runs_in_chunks(tmp_path: Path) -> None:
    """Keys and values of a text are the same whether it goes through the model at once or in parts."""
    model = load_model(make_tiny_model(tmp_path / "long", "llama", max_positions=CHUNK_TOKENS * 2))
    ids = torch.randint(model.spec.vocab_size, (CHUNK_TOKENS + 40,), generator=torch.Generator().manual_seed(0))
    context = text_context(model, ids.tolist())
    assert (context.num_tokens, context.num_positions) == (len(ids), len(ids))
    whole = prompt_key_values(model, model.embed(ids)).detach()
    torch.testing.assert_close(context.key_values, whole, rtol=0, atol=1e-4 * whole.abs().max().item())


@pytest.mark.parametrize("kinds", CHAINS, ids=" > ".join)
@pytest.mark.parametrize("method", [PromptTuningConfig(5), PTuningV2Config(3)], ids=lambda config: config.name)
def test_the_engine_serves_what_was_trained(
    llama: FrozenModel, label_task: TaskFormat, label_rows: list[Example], kinds: Sequence[str], method: MethodConfig
) -> None:
    """Scores of the labels' words through the engine, as the last of the chain, are the trainer's own."""
    chain = chain_of(llama, kinds)
    context = chain_context(llama, chain)
    config = dataclasses.replace(CONFIG, method=method)
    job = TrainingJob(llama, config, label_task, label_rows, label_rows, behind=context)
    result = train(llama, {"job": job})["job"]
    artifact = decode(make_artifact(llama, label_task, result).content, llama.spec)
    assert artifact.num_virtual_tokens == method.num_virtual_tokens  # the new segment alone

    objective = objective_for(llama, label_task)
    assert isinstance(objective, LabelObjective)
    rows = encode_examples(llama, label_task, label_rows, 0)
    group = dataclasses.replace(objective.texts(rows, result.prompt), context=context)
    ours = objective.scores(len(rows), forward_groups(llama, [group])[0])
    llm, texts = LLM(llama), [row.fields["text"] for row in label_rows]
    served = torch.tensor(llm.score(texts, list(WORDS.values()), [[*chain, artifact]] * len(texts)))
    torch.testing.assert_close(ours, served, rtol=0, atol=1e-5 * served.abs().max().item())
    alone = torch.tensor(llm.score(texts, list(WORDS.values()), [artifact] * len(texts)))
    assert (alone - served).abs().max() > 1e-2  # control

    assert evaluate(llama, result.prompt, job.report_rows, job.objective, behind=context).loss == result.report.loss
    bare = evaluate(llama, None, job.report_rows, job.objective, behind=context)
    assert bare == result.bare == result.before
    assert bare.loss != evaluate(llama, None, job.report_rows, job.objective).loss


def test_old_outputs_stay_as_they_were(llama: FrozenModel, text_rows: list[Example]) -> None:
    """A chain's answers are the same tokens before, during and after others continue it, in one batch with them."""
    chain = chain_of(llama, ("soft", "shifted prefix"))
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    inputs = ["book a table", "the quick"]
    before = LLM(llama).generate(inputs, [chain] * 2, params)
    job = TrainingJob(llama, CONFIG, TaskFormat(), text_rows, text_rows, behind=chain_context(llama, chain))
    artifact = make_artifact(llama, TaskFormat(), train(llama, {"job": job})["job"])
    llm = LLM(llama)
    after = llm.generate(inputs * 2, [chain, chain, [*chain, artifact], [*chain, artifact]], params)
    assert [one.token_ids for one in after[:2]] == [one.token_ids for one in before]
    assert [one.token_ids for one in after[2:]] != [one.token_ids for one in before]
    assert llm.engine.prompts.num_resident == 3  # the chain's elements once, and the new one


def test_mixed_and_resumed_it_stays_the_same(llama: FrozenModel, text_rows: list[Example]) -> None:
    """Beside a job without a chain the losses are those of a run alone; from a checkpoint, to the last bit."""
    context = chain_context(llama, chain_of(llama, CHAINS[0]))

    def job() -> TrainingJob:
        return TrainingJob(llama, CONFIG, TaskFormat(), text_rows, text_rows, behind=context)

    saved: list[bytes] = []
    alone = train(llama, {"job": job()}, {"job": Watcher(on_checkpoint=saved.append, checkpoint_seconds=-1)})["job"]
    other = TrainingJob(llama, CONFIG, TaskFormat(), text_rows, text_rows)
    mixed = train(llama, {"other": other, "job": job()})
    assert mixed["job"].report.loss == pytest.approx(alone.report.loss, rel=1e-4)
    assert mixed["other"].report.loss != pytest.approx(alone.report.loss, rel=1e-4)
    resumed = job()
    resumed.restore(saved[2])
    assert torch.equal(train(llama, {"job": resumed})["job"].prompt, alone.prompt)


def test_a_job_behind_a_published_prompt(llama: FrozenModel, tmp_path: Path) -> None:
    """Through the queue: exact versions in the provenance, the gate measures the chain alone, absent ones are named."""

    async def story() -> None:
        async with house(llama, tmp_path) as home:
            base = await home.ended(await home.create(name="task"))
            assert base.result is not None
            before = await home.say("task")
            exact = f"acme/task@{base.result.version}"
            mine = await home.ended(await home.create(name="mine", behind=(exact,), settings={"num_steps": 30}))
            assert mine.state is JobState.SUCCEEDED and mine.spec.behind == (exact,), mine.error
            record = await home.catalog.resolve("acme", "mine")
            assert record.behind == (exact,)
            (together,) = {tuple(await home.say(*names)) for names in (["mine"], ["task", "mine"])}
            alone = [await home.catalog.load(record)]
            assert together not in (tuple(await home.answer(alone)), tuple(before))
            assert (await home.catalog.resolve("acme", "task")).version == base.result.version
            assert await home.say("task") == before
            still = ("prompt_tuning", {"learning_rate": 1e-30})
            gate = {"publish_worse": False}
            worse = await home.ended(await home.create(name="mine", behind=(exact,), method=still, settings=gate))
            assert worse.error is not None and worse.error.code == "prompt_not_better", worse
            assert "mine@1" in worse.error.message
            wild = ("prompt_tuning", {"learning_rate": 1e3})  # for sure worse than nothing
            worse = await home.ended(await home.create(name="new", behind=(exact,), method=wild, settings=gate))
            assert worse.error is not None and "the chain in front of it alone has" in worse.error.message
            missing = await home.ended(await home.create(name="lost", behind=("nobody",)))
            assert missing.error is not None and missing.error.param == "behind"

    asyncio.run(story())
