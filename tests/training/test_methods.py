"""Every method's mathematics against the equation written out, and against PEFT where PEFT has the method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from promptd.errors import InvalidRequestError
from promptd.modeling import FrozenModel
from promptd.training import MethodConfig, build_method
from promptd.training.methods import DirectPrefix, NetworkPrefix, PromptTuning, ResidualPromptTuning
from promptd.training.methods.inits import embedding_std

HIDDEN = 24


def written_out(method: ResidualPromptTuning, *, norm: str = "last") -> torch.Tensor:
    """P + LN(W_up relu(W_down P + b_down) + b_up) in float64, without torch.nn; other places of the norm are wrong."""
    weights = {name: tensor.double() for name, tensor in method.state_dict().items()}

    def layer_norm(x: torch.Tensor) -> torch.Tensor:
        centered = x - x.mean(1, keepdim=True)
        scaled = centered / (centered.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights["norm.weight"] + weights["norm.bias"]

    prompt = weights["prompt"]
    inside = layer_norm(prompt) if norm == "first" else prompt
    hidden = (inside @ weights["down.weight"].T + weights["down.bias"]).clamp_min(0)
    branch = hidden @ weights["up.weight"].T + weights["up.bias"]
    if norm == "after skip":
        return layer_norm(prompt + branch)
    return prompt + (layer_norm(branch) if norm == "last" else branch)


def random_residual(std: float = 0.5) -> ResidualPromptTuning:
    """A residual method all of whose parameters are away from their start."""
    torch.manual_seed(0)
    method = ResidualPromptTuning(torch.randn(6, HIDDEN) * std, std, bottleneck_size=10)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return method


def test_residual_is_the_papers_equation() -> None:
    """P' = P + LN(W_up relu(W_down P)), in every digit that float32 has."""
    method = random_residual()
    torch.testing.assert_close(method.materialize().double(), written_out(method), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["first", "after skip", "none"])
def test_moving_the_layer_norm_is_noticed(norm: str) -> None:
    """The comparison above fails for a LayerNorm anywhere but last in the branch, before the skip."""
    method = random_residual()
    wrong = written_out(method, norm=norm)
    assert (method.materialize().double() - wrong).abs().max() > 0.1


@pytest.mark.parametrize("std", [0.02, 1.0, 10.0])
def test_branch_starts_as_large_as_the_prompt(std: float) -> None:
    """Whatever the scale of a model's embeddings, the branch neither swamps the prompt nor vanishes at the start."""
    torch.manual_seed(0)
    prompt = torch.randn(10, 256) * std
    method = ResidualPromptTuning(prompt, std)
    branch = method.materialize() - prompt
    assert 0.8 < (branch.norm() / prompt.norm()).item() < 1.25
    assert (branch[0] - branch[1]).norm() > 0.1 * branch[0].norm(), "every virtual token has its own branch"


def test_residual_has_the_papers_size() -> None:
    """2 d m + m + 3 d numbers in the network and n d in the prompt are learned; n d are stored; m is min(800, d)."""
    method = ResidualPromptTuning(torch.zeros(10, HIDDEN), 1.0, bottleneck_size=7)
    assert method.trainable_params == 10 * HIDDEN + 2 * HIDDEN * 7 + 7 + 3 * HIDDEN
    assert method.stored_params == method.fold().numel() == 10 * HIDDEN
    assert ResidualPromptTuning(torch.zeros(2, 768), 1.0).down.out_features == 768
    assert ResidualPromptTuning(torch.zeros(2, 1024), 1.0).down.out_features == 800


def test_rates_are_in_units_of_the_embedding_std() -> None:
    """What lives at embedding scale learns at rate x std; with std 1 the groups are the paper's."""
    method = ResidualPromptTuning(torch.zeros(2, HIDDEN), 0.02)
    rates = {id(p): group["lr"] for group in method.parameter_groups(0.3, 0.01) for p in group["params"]}
    assert rates.keys() == {id(p) for p in method.parameters()}
    assert rates[id(method.prompt)] == rates[id(method.norm.weight)] == pytest.approx(0.3 * 0.02)
    assert rates[id(method.down.weight)] == pytest.approx(0.01 / 0.02)
    assert rates[id(method.up.weight)] == pytest.approx(0.01)


def test_fold_is_a_copy() -> None:
    """A folded prompt does not move with the live parameters."""
    method = PromptTuning(torch.zeros(2, HIDDEN), 1.0)
    folded = method.fold()
    with torch.no_grad():
        method.prompt += 1
    assert folded.abs().max() == 0 and not folded.requires_grad


def test_network_prefix_is_pefts_prefix_encoder() -> None:
    """The tanh network is PEFT's PrefixEncoder with projection, in our layout and with the scale taken out."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    layers, heads, count, dim = 3, 2, 5, 4
    key_values = torch.randn(layers, 2, heads, count, dim)
    ours = NetworkPrefix(key_values, HIDDEN, 1.0, network_size=11)
    theirs = peft.PrefixEncoder(
        peft.PrefixTuningConfig(
            prefix_projection=True,
            token_dim=heads * dim,
            num_layers=layers,
            encoder_hidden_size=11,
            num_virtual_tokens=count,
            task_type="CAUSAL_LM",
        )
    )
    theirs.embedding = torch.nn.Embedding.from_pretrained(ours.embedding.detach())
    theirs.transform[0], theirs.transform[2] = ours.inner, ours.outer
    flat = theirs(torch.arange(count).unsqueeze(0))[0]  # [n, layers * 2 * heads * dim]
    expected = flat.view(count, layers * 2, heads, dim).permute(1, 2, 0, 3).unflatten(0, (layers, 2))
    torch.testing.assert_close(ours.materialize(), expected * ours.scale)


@pytest.mark.parametrize("network", [False, True])
def test_prefix_starts_as_the_activations_of_words(
    llama: FrozenModel, tiny_models: dict[str, Path], network: bool
) -> None:
    """Keys and values at the start are those transformers computes for the initial words."""
    config = MethodConfig("prefix", num_virtual_tokens=7, init="text", init_text="the quick", prefix_network=network)
    method = build_method(config, llama, seed=0)
    assert isinstance(method, NetworkPrefix if network else DirectPrefix)
    ids = (llama.encode("the quick") * 7)[:7]
    hf = AutoModelForCausalLM.from_pretrained(tiny_models["llama"]).eval()
    cache = hf(torch.tensor([ids]), use_cache=True).past_key_values
    expected = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
    torch.testing.assert_close(method.materialize(), expected, rtol=1e-3, atol=1e-3)


def test_text_init_is_pefts(llama: FrozenModel) -> None:
    """A text is repeated or cut to length, as PEFT's PromptEmbedding does it."""
    text = "the quick brown fox"
    ids = llama.encode(text, add_special_tokens=False)
    config = MethodConfig("prompt_tuning", num_virtual_tokens=2 * len(ids) + 1, init="text", init_text=text)
    expected = llama.embed(torch.tensor([*ids, *ids, ids[0]]))
    torch.testing.assert_close(build_method(config, llama, seed=0).fold(), expected)


def test_class_labels_init_takes_mean_embeddings(llama: FrozenModel) -> None:
    """Slot i is the mean embedding of label i's tokens; the rest are distinct rows of the vocabulary."""
    words = {"a": " weather", "b": " music please"}
    config = MethodConfig("prompt_tuning", num_virtual_tokens=6, init="class_labels")
    prompt = build_method(config, llama, seed=0, label_words=words).fold()
    for slot, word in enumerate(words.values()):
        ids = torch.tensor(llama.encode(word, add_special_tokens=False))
        torch.testing.assert_close(prompt[slot], llama.embed(ids).mean(0))
    table = llama.embed(torch.arange(llama.spec.vocab_size))
    nearest = torch.cdist(prompt[2:], table).min(1)
    assert nearest.values.max() < 1e-3 and len(set(nearest.indices.tolist())) == 4
    with pytest.raises(InvalidRequestError, match="label words"):
        build_method(config, llama, seed=0)


def test_random_init_has_the_embeddings_scale(llama: FrozenModel) -> None:
    """Noise has the standard deviation of the embedding output, which is measured on the whole vocabulary."""
    std = llama.embed(torch.arange(llama.spec.vocab_size)).std(correction=0).item()
    assert embedding_std(llama) == pytest.approx(std, rel=1e-5)
    config = MethodConfig("prompt_tuning", num_virtual_tokens=200, init="random_uniform")
    assert build_method(config, llama, seed=0).fold().std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", "lora"), ("init", "zeros"), ("num_virtual_tokens", 0), ("bottleneck_size", 0), ("init", "text")],
)
def test_config_errors_name_field_and_value(field: str, value: object) -> None:
    """A wrong setting is refused on creation."""
    with pytest.raises(InvalidRequestError) as caught:
        MethodConfig(**{field: value})  # type: ignore[arg-type]
    assert str(value) in caught.value.message or caught.value.param == "init_text"
