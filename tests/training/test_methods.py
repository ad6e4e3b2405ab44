"""Every method's mathematics against its equation written out, and against PEFT where PEFT has the method."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from promptd.training.methods import (
    LowRankConfig,
    LowRankPrompt,
    PrefixTuning,
    PrefixTuningConfig,
    PromptTuning,
    PromptTuningConfig,
    PTuningV2,
    PTuningV2Config,
    ResidualConfig,
    ResidualPromptTuning,
    SuperPosConfig,
    SuperPosPrompt,
    UlptConfig,
    UltraLowPromptTuning,
)

HIDDEN, NUM_TOKENS = 24, 6


def generator(seed: int = 0) -> torch.Generator:
    """A generator of its own for every test."""
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, std: float = 1.0) -> torch.Tensor:
    """The same normal noise in every test."""
    return torch.randn(*shape, generator=generator(1)) * std


def residual(std: float = 0.5, hidden: int = HIDDEN, **settings: Any) -> ResidualPromptTuning:
    """A residual method at its start."""
    config = ResidualConfig(NUM_TOKENS, **{"bottleneck_size": 10, **settings})
    return ResidualPromptTuning(config, noise(NUM_TOKENS, hidden, std=std), std, generator())


def moved(method: ResidualPromptTuning) -> ResidualPromptTuning:
    """The method with all of its parameters away from their start."""
    draws = generator(2)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    return method


NONLINEARITIES = {
    "relu": lambda x: x * (x > 0),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
}


def written_out(method: ResidualPromptTuning, *, norm: str = "last", nonlinearity: str = "relu") -> torch.Tensor:
    """P + LN(W_up f(W_down P + b_down) + b_up) in float64, without torch.nn; other places of the norm are wrong."""
    weights = {name: tensor.double().squeeze(0) for name, tensor in method.state_dict().items()}

    def layer_norm(x: torch.Tensor) -> torch.Tensor:
        centered = x - x.mean(1, keepdim=True)
        scaled = centered / (centered.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights["gain"] + weights["shift"]

    prompt = weights["prompt"]
    inside = layer_norm(prompt) if norm == "first" else prompt
    hidden = NONLINEARITIES[nonlinearity](inside @ weights["down_weight"] + weights["down_bias"])
    branch = hidden @ weights["up_weight"] + weights["up_bias"]
    if norm == "after skip":
        return layer_norm(prompt + branch)
    return prompt + (layer_norm(branch) if norm == "last" else branch)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_residual_is_the_papers_equation(nonlinearity: str) -> None:
    """P' = P + LN(W_up f(W_down P)), in every digit that float32 has."""
    method = moved(residual(nonlinearity=nonlinearity))
    expected = written_out(method, nonlinearity=nonlinearity)
    torch.testing.assert_close(method.materialize().double(), expected, rtol=1e-5, atol=1e-5)
    others = [name for name in NONLINEARITIES if name != nonlinearity]
    assert all((written_out(method, nonlinearity=name) - expected).abs().max() > 0.1 for name in others)


@pytest.mark.parametrize("norm", ["first", "after skip", "none"])
def test_moving_the_layer_norm_is_noticed(norm: str) -> None:
    """The comparison above fails for a LayerNorm anywhere but last in the branch, before the skip."""
    method = moved(residual())
    assert (method.materialize().double() - written_out(method, norm=norm)).abs().max() > 0.1


def test_residual_without_layer_norm() -> None:
    """The branch is what W_up gives; there are no gain and shift to learn."""
    method = moved(residual(layer_norm=False))
    expected = written_out(method, norm="none")
    torch.testing.assert_close(method.materialize().double(), expected, rtol=1e-5, atol=1e-5)
    assert not {"gain", "shift"} & method.state_dict().keys()


@pytest.mark.parametrize("layer_norm", [True, False])
def test_separate_networks_are_one_method_per_token(layer_norm: bool) -> None:
    """Batched products give what a loop over virtual tokens gives, each with a shared-network method of its own."""
    method = moved(residual(separate_networks=True, layer_norm=layer_norm))
    state = method.state_dict()
    config = ResidualConfig(1, bottleneck_size=10, layer_norm=layer_norm)
    rows = []
    for token in range(NUM_TOKENS):
        single = ResidualPromptTuning(config, torch.zeros(1, HIDDEN), 0.5, generator())
        single.load_state_dict({name: tensor[token : token + 1] for name, tensor in state.items()})
        rows.append(single.materialize())
    torch.testing.assert_close(method.materialize(), torch.cat(rows), rtol=1e-6, atol=1e-6)
    assert (torch.cat(rows[1:] + rows[:1]) - method.materialize()).abs().max() > 0.1
    assert len(set(method.down_weight[:, 0, 0].tolist())) == NUM_TOKENS, "each network has its own start"


@pytest.mark.parametrize("std", [0.02, 1.0, 10.0])
def test_branch_starts_as_large_as_the_prompt(std: float) -> None:
    """Whatever the scale of a model's embeddings, the branch neither swamps the prompt nor vanishes at the start."""
    method = residual(std, 256, bottleneck_size=None)
    branch = method.materialize() - method.prompt
    assert 0.8 < (branch.norm() / method.prompt.norm()).item() < 1.25
    assert (branch[0] - branch[1]).norm() > 0.1 * branch[0].norm(), "every virtual token has its own branch"
    plain = residual(std, 256, bottleneck_size=None, layer_norm=False)
    share = ((plain.materialize() - plain.prompt).norm() / plain.prompt.norm()).item()
    expected = residual(1.0, 256, bottleneck_size=None, layer_norm=False)
    assert share == pytest.approx(((expected.materialize() - expected.prompt).norm() / expected.prompt.norm()).item())


def test_residual_has_the_papers_size() -> None:
    """2 d m + m + 3 d numbers in a network and n d in the prompt are learned; n d are stored; m is min(800, d)."""
    network = 2 * HIDDEN * 7 + 7 + 3 * HIDDEN
    shared, separate = (residual(bottleneck_size=7, separate_networks=flag) for flag in (False, True))
    assert shared.trainable_params == NUM_TOKENS * HIDDEN + network
    assert separate.trainable_params == NUM_TOKENS * (HIDDEN + network)
    assert shared.stored_params == shared.fold().numel() == separate.stored_params == NUM_TOKENS * HIDDEN
    sizes = [residual(hidden=hidden, bottleneck_size=None).down_bias.shape[-1] for hidden in (768, 1024)]
    assert sizes == [768, 800]


def test_rates_are_in_units_of_the_embedding_std() -> None:
    """What lives at embedding scale learns at rate x std; with std 1 the groups are the paper's."""
    method = residual(0.02, learning_rate=0.3, network_learning_rate=0.01)
    rates = {id(p): group["lr"] for group in method.parameter_groups() for p in group["params"]}
    assert rates.keys() == {id(p) for p in method.parameters()}
    assert rates[id(method.prompt)] == rates[id(method.gain)] == pytest.approx(0.3 * 0.02)
    assert rates[id(method.down_weight)] == pytest.approx(0.01 / 0.02)
    assert rates[id(method.up_weight)] == rates[id(method.down_bias)] == pytest.approx(0.01)


def test_fold_is_a_copy() -> None:
    """A folded prompt does not move with the live parameters, as the one of the authors' code does on the CPU."""
    method = PromptTuning(PromptTuningConfig(2), torch.zeros(2, HIDDEN), 1.0, generator())
    folded, live = method.fold(), method.materialize()
    with torch.no_grad():
        method.prompt += 1
    assert folded.abs().max() == 0 and not folded.requires_grad
    assert live.min() == 1, "what materialize returns does move"


def test_low_rank_is_the_best_product_of_its_rank() -> None:
    """P = A B has the rank, starts as close as that rank can come, and has (n + d) b numbers to learn."""
    start = noise(NUM_TOKENS, HIDDEN, std=0.3)
    method = LowRankPrompt(LowRankConfig(NUM_TOKENS, rank=4), start, 0.3, generator())
    prompt = method.fold()
    assert torch.linalg.matrix_rank(prompt) == 4
    tail = torch.linalg.svdvals(start)[4:].square().sum().sqrt()
    torch.testing.assert_close((start - prompt).norm(), tail)
    torch.testing.assert_close(prompt, method.left @ method.right)
    assert method.trainable_params == (NUM_TOKENS + HIDDEN) * 4 and method.stored_params == NUM_TOKENS * HIDDEN
    full = LowRankPrompt(LowRankConfig(NUM_TOKENS, rank=NUM_TOKENS), start, 0.3, generator())
    torch.testing.assert_close(full.fold(), start)


def test_ulpt_is_the_papers_equation() -> None:
    """P = (z P~) * s + b with n r + 2 d numbers to learn; P~ is N(0, 1) of the projection seed and not stored."""
    config = UlptConfig(NUM_TOKENS, num_dims=5, projection_seed=9)
    method = UltraLowPromptTuning(config, noise(NUM_TOKENS, HIDDEN), 1.0, generator())
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator(3)))
    learned = method.state_dict()
    assert learned.keys() == {"dims", "scale", "offset"}
    assert method.trainable_params == NUM_TOKENS * 5 + 2 * HIDDEN and method.stored_params == NUM_TOKENS * HIDDEN

    def prompt(seed: int) -> torch.Tensor:
        projection = torch.randn(5, HIDDEN, generator=generator(seed))
        return torch.einsum("nr,rd->nd", learned["dims"], projection) * learned["scale"] + learned["offset"]

    torch.testing.assert_close(method.fold(), prompt(9))
    assert (method.fold() - prompt(8)).abs().max() > 0.1, "another projection is noticed"


def test_ulpt_starts_as_close_as_its_numbers_allow() -> None:
    """z is the least-squares solution: exact with as many numbers as the embeddings have, nearest with fewer."""
    start = noise(NUM_TOKENS, HIDDEN, std=0.02)
    exact = UltraLowPromptTuning(UlptConfig(NUM_TOKENS, num_dims=HIDDEN), start, 0.02, generator())
    torch.testing.assert_close(exact.fold(), start, rtol=1e-3, atol=1e-5)
    nearest = UltraLowPromptTuning(UlptConfig(NUM_TOKENS, num_dims=5), start, 0.02, generator())
    missing = start - nearest.fold()
    assert (missing @ nearest.projection.T).abs().max() < 1e-4 * start.norm(), "nothing is left that P~ can reach"
    assert missing.norm() > 0.1 * start.norm()


@pytest.mark.parametrize("train_rows", [False, True])
def test_superpos_mixes_rows(train_rows: bool) -> None:
    """P = p (E + dE) with m coefficients a token (and m d numbers of dE); it starts at the first rows exactly."""
    rows = noise(9, HIDDEN)
    config = SuperPosConfig(NUM_TOKENS, num_rows=9, train_rows=train_rows)
    method = SuperPosPrompt(config, rows, 1.0, generator())
    assert torch.equal(method.fold(), rows[:NUM_TOKENS])
    assert method.trainable_params == NUM_TOKENS * 9 + train_rows * 9 * HIDDEN
    assert method.stored_params == NUM_TOKENS * HIDDEN
    with torch.no_grad():
        method.coefficients += noise(NUM_TOKENS, 9)
        if method.change is not None:
            method.change += noise(9, HIDDEN, std=0.2)
    base = rows if method.change is None else rows + method.change
    for token, coefficients in enumerate(method.coefficients):
        expected = sum((c * row for c, row in zip(coefficients, base, strict=True)), torch.zeros(HIDDEN))
        torch.testing.assert_close(method.fold()[token], expected, rtol=1e-5, atol=1e-5)
    (method.materialize() ** 2).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(method.rows, rows) and not method.rows.requires_grad


def test_prefix_network_is_pefts_prefix_encoder() -> None:
    """The tanh network is PEFT's PrefixEncoder with projection, in our layout and with the scale taken out."""
    peft = pytest.importorskip("peft")
    layers, heads, count, dim, size = 3, 2, 5, 4, 11
    config = PrefixTuningConfig(count, network_size=size)
    ours = PrefixTuning(config, noise(layers, 2, heads, count, dim), 1.0, generator())
    theirs = peft.PrefixEncoder(
        peft.PrefixTuningConfig(
            prefix_projection=True,
            token_dim=heads * dim,
            num_layers=layers,
            encoder_hidden_size=size,
            num_virtual_tokens=count,
            task_type="CAUSAL_LM",
        )
    )
    theirs.embedding = torch.nn.Embedding.from_pretrained(ours.embedding.detach())
    theirs.transform[0] = torch.nn.Linear(size, size)
    theirs.transform[0].weight, theirs.transform[0].bias = ours.inner_weight, ours.inner_bias
    theirs.transform[2].weight, theirs.transform[2].bias = ours.outer_weight, ours.outer_bias
    flat = theirs(torch.arange(count).unsqueeze(0))[0]  # [n, layers * 2 * heads * dim]
    expected = flat.view(count, layers * 2, heads, dim).permute(1, 2, 0, 3).unflatten(0, (layers, 2))
    torch.testing.assert_close(ours.materialize(), expected * ours.scale)
    outputs = layers * 2 * heads * dim
    assert ours.trainable_params == count * size + size * size + size + size * outputs + outputs
    assert ours.stored_params == count * outputs


def test_direct_prefix_starts_at_its_start() -> None:
    """Keys and values are the parameters, in units of their layer's standard deviation."""
    start = noise(3, 2, 2, 5, 4) * torch.tensor([0.01, 1.0, 50.0]).view(3, 1, 1, 1, 1)
    method = PTuningV2(PTuningV2Config(5), start, 1.0, generator())
    torch.testing.assert_close(method.fold(), start)
    assert method.trainable_params == method.stored_params == start.numel()
    torch.testing.assert_close(method.key_values.std(dim=(2, 3, 4)), torch.ones(3, 2))
