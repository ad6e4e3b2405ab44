"""What holds for every method: it folds exactly, learns at any embedding scale, repeats itself, resumes bitwise."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache

from promptd.errors import InvalidRequestError
from promptd.modeling import FrozenModel, load_model
from promptd.training import (
    METHODS,
    Encoded,
    Example,
    TaskFormat,
    build_method,
    encode_examples,
    forward_texts,
    method_from_sidecar,
    sidecar_bytes,
)
from promptd.training.methods import (
    LowRankConfig,
    MethodConfig,
    PrefixTuningConfig,
    PromptMethod,
    PTuningV2Config,
    ResidualConfig,
    ResidualPromptTuning,
    SuperPosConfig,
    UlptConfig,
)
from promptd.training.optimizers import build_optimizer
from promptd.training.sidecar import METADATA_KEY, RNG_STATE

CONFIGS: dict[str, MethodConfig] = {
    **{name: method.config_class(4) for name, method in METHODS.items()},
    "residual, separate networks": ResidualConfig(4, separate_networks=True),
    "residual, no LayerNorm": ResidualConfig(4, layer_norm=False),
    "superpos, trained rows": SuperPosConfig(4, num_rows=16, train_rows=True),
}
WITH_DROPOUT: dict[str, MethodConfig] = {
    "residual": ResidualConfig(4, bottleneck_size=8, dropout=0.3),
    "prefix_tuning": PrefixTuningConfig(4, network_size=8, dropout=0.3),
    "p_tuning_v2": PTuningV2Config(4, dropout=0.3),
}
every_method = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
every_dropout = pytest.mark.parametrize("config", WITH_DROPOUT.values(), ids=list(WITH_DROPOUT))


@pytest.fixture(scope="module")
def rows(llama: FrozenModel, text_rows: list[Example]) -> list[Encoded]:
    """Nine short rows that can be learned by heart."""
    return encode_examples(llama, TaskFormat(), text_rows, 4)


@pytest.fixture(scope="module", params=[0.02, 1.0, 10.0])
def scaled(tiny_models: dict[str, Path], request: pytest.FixtureRequest) -> FrozenModel:
    """The tiny Llama with embeddings of another standard deviation; its output layer is its own."""
    model = load_model(tiny_models["llama"])
    weight = model.hf.get_input_embeddings().weight
    with torch.no_grad():
        weight *= request.param / weight.std()
    return model


@pytest.fixture(scope="module")
def plain_models(tiny_models: dict[str, Path]) -> dict[str, torch.nn.Module]:
    """Family name -> the tiny model as transformers alone runs it."""
    return {
        family: AutoModelForCausalLM.from_pretrained(tiny_models[family]).eval().requires_grad_(False)
        for family in ("gpt2", "llama")
    }


def shaken(method: PromptMethod) -> PromptMethod:
    """The method with its parameters away from their start, where a part that is left out would not show."""
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in method.parameters():
            size = parameter.std() if parameter.numel() > 1 else parameter.abs()
            parameter += torch.randn(parameter.shape, generator=draws) * 0.1 * size
    return method


def target_loss(model: FrozenModel, prompt: torch.Tensor, rows: list[Encoded]) -> torch.Tensor:
    """The mean loss of the rows' target tokens in one packed pass."""
    index, start = [], 0
    for row in rows:
        index += [start + len(row.text_ids) - 1 + offset for offset in range(len(row.target_ids))]
        start += row.num_tokens
    logits = forward_texts(model, prompt, [row.input_ids for row in rows], torch.tensor(index))
    return cross_entropy(logits, torch.tensor([token for row in rows for token in row.target_ids]))


def training_of(model: FrozenModel, method: PromptMethod, rows: list[Encoded]) -> Iterator[float]:
    """Steps at the method's own rates, without end; yields the loss before each."""
    optimizer = build_optimizer("adamw", method.parameter_groups(), 1e-5)
    while True:
        loss = target_loss(model, method.materialize(), rows)
        yield loss.item()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def plain_logits(hf: torch.nn.Module, prompt: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """What transformers computes for a text behind a plain prompt."""
    tokens = torch.tensor([ids])
    if prompt.dim() == 2:
        embeds = torch.cat([prompt, hf.get_input_embeddings()(tokens[0])])
        logits: torch.Tensor = hf(inputs_embeds=embeds.unsqueeze(0)).logits[0, len(prompt) :]
        return logits
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prompt):
        cache.update(keys.unsqueeze(0), values.unsqueeze(0), layer)
    cached: torch.Tensor = hf(tokens, past_key_values=cache).logits[0]
    return cached


@every_method
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_folded_prompt_is_the_live_method(
    frozen_models: dict[str, FrozenModel], plain_models: dict[str, torch.nn.Module], family: str, config: MethodConfig
) -> None:
    """Logits under the fold, through transformers as well, are those under the live parameters within 1e-5."""
    model = frozen_models[family]
    method = shaken(build_method(config, model, seed=0))
    ids = model.encode("book a table")
    index = torch.arange(len(ids))
    with torch.no_grad():
        live = forward_texts(model, method.materialize(), [ids], index)
        folded = method.fold()
        torch.testing.assert_close(forward_texts(model, folded, [ids], index), live, rtol=0, atol=1e-5)
        plain = plain_logits(plain_models[family], folded, ids)
        torch.testing.assert_close(plain, live, rtol=0, atol=1e-5 * live.abs().max().item())
        moved = forward_texts(model, shaken(method).materialize(), [ids], index)
    assert (moved - live).abs().max() > 1e-2, "the logits tell other parameters apart"


def hand_written_gradients(
    method: ResidualPromptTuning, upstream: torch.Tensor, *, skip: bool = True
) -> dict[str, torch.Tensor]:
    """The chain rule through P + LN(W_up relu(W_down P + b) + b) by hand, in float64; `upstream` is dL / dP'."""
    p = {name: tensor.double().squeeze(0) for name, tensor in method.state_dict().items()}
    before = p["prompt"] @ p["down_weight"] + p["down_bias"]
    hidden = before.clamp_min(0)
    branch = hidden @ p["up_weight"] + p["up_bias"]
    deviation = (branch.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    unit = (branch - branch.mean(1, keepdim=True)) / deviation
    d_unit = upstream * p["gain"]
    d_branch = (d_unit - d_unit.mean(1, keepdim=True) - unit * (d_unit * unit).mean(1, keepdim=True)) / deviation
    d_before = (d_branch @ p["up_weight"].T) * (before > 0)
    return {
        "prompt": skip * upstream + d_before @ p["down_weight"].T,
        "down_weight": p["prompt"].T @ d_before,
        "down_bias": d_before.sum(0),
        "up_weight": hidden.T @ d_branch,
        "up_bias": d_branch.sum(0),
        "gain": (upstream * unit).sum(0),
        "shift": upstream.sum(0),
    }


def test_the_residual_gradient_is_the_chain_rule(
    llama: FrozenModel, plain_models: dict[str, torch.nn.Module], rows: list[Encoded]
) -> None:
    """Every parameter's gradient of the packed loss is that of transformers, row by row, carried on by hand."""
    method = shaken(build_method(ResidualConfig(4, bottleneck_size=8), llama, seed=0))
    assert isinstance(method, ResidualPromptTuning)
    target_loss(llama, method.materialize(), rows).backward()  # type: ignore[no-untyped-call]
    prompt = method.fold().requires_grad_()
    losses = []
    for row in rows:
        logits = plain_logits(plain_models["llama"], prompt, list(row.input_ids))[len(row.text_ids) - 1 :]
        losses.append(-logits.log_softmax(1).gather(1, torch.tensor(row.target_ids).unsqueeze(1)))
    torch.cat(losses).mean().backward()  # type: ignore[no-untyped-call]
    assert prompt.grad is not None

    def largest_error(expected: dict[str, torch.Tensor]) -> float:
        errors = []
        for name, parameter in method.named_parameters():
            assert parameter.grad is not None
            difference = parameter.grad.squeeze(0).double() - expected[name]
            errors.append((difference.norm() / expected[name].norm()).item())
        return max(errors)

    assert largest_error(hand_written_gradients(method, prompt.grad.double())) < 1e-4
    assert largest_error(hand_written_gradients(method, prompt.grad.double(), skip=False)) > 0.1


@every_method
def test_every_method_learns_at_any_embedding_scale(
    scaled: FrozenModel, rows: list[Encoded], config: MethodConfig
) -> None:
    """With the default rates the loss falls within 30 steps, on embeddings of std 0.02 as of 10; the model stays."""
    before = scaled.digest()
    method = build_method(config, scaled, seed=0).train()
    training = training_of(scaled, method, rows)
    losses = [next(training) for _ in range(31)]
    assert losses[-1] < 0.9 * losses[0] and min(losses[1:6]) < losses[0]
    assert scaled.digest() == before


def test_rates_that_ignore_the_embedding_scale_fail(tiny_models: dict[str, Path], rows: list[Encoded]) -> None:
    """The test above is about the scale: the same rate on std 10, not in units of it, hardly moves the loss."""
    model = load_model(tiny_models["llama"])
    weight = model.hf.get_input_embeddings().weight
    with torch.no_grad():
        weight *= 10 / weight.std()
    method = build_method(METHODS["prompt_tuning"].config_class(4), model, seed=0)
    method.embedding_std = 0.02
    training = training_of(model, method, rows)
    losses = [next(training) for _ in range(31)]
    assert losses[-1] > 0.9 * losses[0]


@every_method
def test_the_groups_hold_every_parameter_once(llama: FrozenModel, config: MethodConfig) -> None:
    """Nothing is trained twice or forgotten, everything is float32 and has a gradient."""
    method = shaken(build_method(config, llama, seed=0))
    grouped = [p for group in method.parameter_groups() for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, method.parameters()))
    assert all(group["lr"] > 0 for group in method.parameter_groups())
    method.materialize().square().sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.abs().max() > 0 for p in grouped)
    assert method.stored_params == method.fold().numel()


@every_method
def test_the_seed_decides_everything(llama: FrozenModel, config: MethodConfig) -> None:
    """Equal seeds give equal bits, other seeds others; torch's global generator is neither read nor moved."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_method(config, llama, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = build_method(config, llama, seed=0), build_method(config, llama, seed=1)
    assert sidecar_bytes(first) == sidecar_bytes(second) != sidecar_bytes(other)
    assert not torch.equal(first.fold(), other.fold())


@every_dropout
def test_dropout_is_the_methods_own(llama: FrozenModel, config: MethodConfig) -> None:
    """What others draw, and folding in between, changes nothing; the share that is dropped is the one asked for."""
    alone = build_method(config, llama, seed=0).train()
    expected = [alone.materialize() for _ in range(3)]
    assert not torch.equal(expected[0], expected[1]), "each pass drops others"
    mixed, other = build_method(config, llama, seed=0).train(), build_method(config, llama, seed=1).train()
    state = torch.get_rng_state()
    for index in range(3):
        other.materialize()
        torch.rand(index + 1)
        assert torch.equal(mixed.materialize(), expected[index])
        mixed.fold()
        assert mixed.training
    torch.set_rng_state(state)
    with torch.no_grad():
        values = alone.dropped(torch.ones(100, 100), 0.3)
    assert values.unique().tolist() == pytest.approx([0, 1 / 0.7]) and values.mean().item() == pytest.approx(
        1, abs=0.03
    )
    assert torch.equal(alone.eval().materialize(), alone.materialize())


@every_dropout
def test_training_goes_on_bitwise(llama: FrozenModel, rows: list[Encoded], config: MethodConfig) -> None:
    """Parameters, random state and optimizer restored, the next steps are those of a training that never stopped."""
    method = build_method(config, llama, seed=0).train()
    optimizer = build_optimizer("adamw", method.parameter_groups(), 1e-5)

    def steps(method: PromptMethod, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        for _ in range(2):
            loss = target_loss(llama, method.materialize(), rows)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return method.fold()

    steps(method, optimizer)
    sidecar, state = sidecar_bytes(method), copy.deepcopy(optimizer.state_dict())
    expected = steps(method, optimizer)

    def resumed(*, forget_draws: bool) -> torch.Tensor:
        again = method_from_sidecar(sidecar, config, llama).train()
        if forget_draws:
            again.generator.manual_seed(0)
        restored = build_optimizer("adamw", again.parameter_groups(), 1e-5)
        restored.load_state_dict(state)
        return steps(again, restored)

    assert torch.equal(resumed(forget_draws=False), expected)
    assert not torch.equal(resumed(forget_draws=True), expected)


@every_method
def test_a_sidecar_is_the_whole_method(llama: FrozenModel, config: MethodConfig) -> None:
    """Written, read and written again: the same bytes, the same prompt; rates and dropout may change, no more."""
    method = shaken(build_method(config, llama, seed=0))
    sidecar = sidecar_bytes(method)
    again = method_from_sidecar(sidecar, config, llama)
    assert sidecar_bytes(again) == sidecar and torch.equal(again.fold(), method.fold())
    slower = dataclasses.replace(config, learning_rate=1e-3, init="class_labels")
    resumed = method_from_sidecar(sidecar, slower, llama)
    assert resumed.config == slower and torch.equal(resumed.fold(), method.fold())


def test_sidecars_of_other_methods_are_refused(llama: FrozenModel) -> None:
    """Settings under which the numbers would mean something else, foreign tensors and no sidecar at all."""
    sidecar = sidecar_bytes(build_method(UlptConfig(4), llama, seed=0))
    tensors, rng_state = load(sidecar), load(sidecar)[RNG_STATE]
    written = {METADATA_KEY: json.dumps({"type": "ulpt"})}
    defaults = save({**tensors, "dims": torch.zeros(10, 64)}, written)
    method_from_sidecar(defaults, UlptConfig(), llama)
    for content, config, reason in (
        (sidecar, UlptConfig(4, projection_seed=1), "other settings"),
        (sidecar, UlptConfig(5), "other settings"),
        (sidecar, LowRankConfig(4), "other settings"),
        (save(tensors, written), UlptConfig(), "holds the tensors"),
        (save({"dims": torch.zeros(10, 64), RNG_STATE: rng_state}, written), UlptConfig(), "holds the tensors"),
        (save({**load(defaults), RNG_STATE: rng_state[:9]}, written), UlptConfig(), "unusable rng_state"),
        (save({**load(defaults), RNG_STATE: rng_state.float()}, written), UlptConfig(), "unusable rng_state"),
        (save(tensors, {METADATA_KEY: '{"type": "lora"}'}), UlptConfig(), "no usable"),
        (save(tensors, {METADATA_KEY: "{"}), UlptConfig(), "no usable"),
        (save(tensors), UlptConfig(), "no usable"),
        (b"\x00" * 20, UlptConfig(), "not a safetensors file"),
    ):
        with pytest.raises(InvalidRequestError, match=reason) as caught:
            method_from_sidecar(content, config, llama)
        assert caught.value.param == "resume_from"
