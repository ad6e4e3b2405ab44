"""Where prompts start: words, labels, noise, and stored prompts of other trainings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from promptd.errors import InvalidRequestError
from promptd.modeling import FrozenModel
from promptd.training import METHODS, build_method, prompt_key_values
from promptd.training.methods import (
    MethodConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningV2Config,
    SuperPosConfig,
)
from promptd.training.methods.inits import from_text

EXACT_SOFT = (PromptTuningConfig, SuperPosConfig)
"""Methods that can start at any soft prompt exactly."""
PREFIXES = (PTuningV2Config, PrefixTuningConfig)


def words(model: FrozenModel, text: str, count: int) -> torch.Tensor:
    """Embeddings of a text's first tokens."""
    return model.embed(torch.tensor(model.encode(text)[:count]))


def rows_of(model: FrozenModel, prompt: torch.Tensor) -> list[int]:
    """The vocabulary's nearest row of every virtual token, which must be the row itself."""
    table = model.embed(torch.arange(model.spec.vocab_size))
    distances = torch.cdist(prompt, table, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert (distances.values < 1e-5).all()
    return distances.indices.tolist()


@pytest.mark.parametrize("config_class", PREFIXES)
def test_a_prefix_starts_as_the_activations_of_words(
    llama: FrozenModel, tiny_models: dict[str, Path], config_class: type[MethodConfig]
) -> None:
    """Keys and values at the start are those transformers computes for the initial words."""
    method = build_method(config_class(7, init="text", init_text="the quick"), llama, seed=0)
    ids = (llama.encode("the quick") * 7)[:7]
    hf = AutoModelForCausalLM.from_pretrained(tiny_models["llama"]).eval()
    cache = hf(torch.tensor([ids]), use_cache=True).past_key_values
    expected = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
    torch.testing.assert_close(method.materialize(), expected, rtol=1e-3, atol=1e-3)


def test_text_init_is_pefts(llama: FrozenModel) -> None:
    """A text is repeated or cut to length, as PEFT's PromptEmbedding does it; one without tokens is refused."""
    text = "the quick brown fox"
    ids = llama.encode(text, add_special_tokens=False)
    config = PromptTuningConfig(2 * len(ids) + 1, init="text", init_text=text)
    expected = llama.embed(torch.tensor([*ids, *ids, ids[0]]))
    torch.testing.assert_close(build_method(config, llama, seed=0).fold(), expected)


def test_class_labels_init_takes_mean_embeddings(llama: FrozenModel) -> None:
    """Slot i is the mean embedding of label i's tokens; the rest are distinct rows of the vocabulary."""
    label_words = {"a": " weather", "b": " music please"}
    config = PromptTuningConfig(6, init="class_labels")
    prompt = build_method(config, llama, seed=0, label_words=label_words).fold()
    for slot, word in enumerate(label_words.values()):
        ids = torch.tensor(llama.encode(word, add_special_tokens=False))
        torch.testing.assert_close(prompt[slot], llama.embed(ids).mean(0))
    assert len(set(rows_of(llama, prompt[2:]))) == 4
    with pytest.raises(InvalidRequestError, match="label words") as caught:
        build_method(config, llama, seed=0)
    assert caught.value.param == "init"


def test_sampled_vocabulary_is_of_the_first_rows(llama: FrozenModel) -> None:
    """`init_vocabulary` bounds the rows that are sampled, each once while they last; None means all of them."""
    first = build_method(PromptTuningConfig(7, init_vocabulary=7), llama, seed=0).fold()
    assert sorted(rows_of(llama, first)) == list(range(7))
    repeated = build_method(PromptTuningConfig(14, init_vocabulary=7), llama, seed=0).fold()
    assert sorted(rows_of(llama, repeated)) == sorted([*range(7), *range(7)])
    everything = build_method(PromptTuningConfig(llama.spec.vocab_size, init_vocabulary=None), llama, seed=0).fold()
    assert sorted(rows_of(llama, everything)) == list(range(llama.spec.vocab_size))


def test_random_init_has_the_embeddings_scale(llama: FrozenModel) -> None:
    """Noise has the standard deviation of the embedding output, which is measured on the whole vocabulary."""
    std = llama.embed(torch.arange(llama.spec.vocab_size)).std(correction=0).item()
    assert llama.embedding_std == pytest.approx(std, rel=1e-5)
    config = PromptTuningConfig(200, init="random_uniform")
    assert build_method(config, llama, seed=0).fold().std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("config_class", EXACT_SOFT)
@pytest.mark.parametrize("count", [3, 5, 8])
def test_a_soft_prompt_starts_a_soft_prompt(llama: FrozenModel, config_class: type[MethodConfig], count: int) -> None:
    """A stored prompt of 5 virtual tokens is taken as it is, cut to 3, or followed by 3 rows of the vocabulary."""
    stored = words(llama, "the quick brown fox jumps", 5) + 0.1
    prompt = build_method(config_class(count), llama, seed=0, warm_start=stored).fold()
    torch.testing.assert_close(prompt[:5], stored[:count])
    assert len(prompt) == count and len(set(rows_of(llama, prompt[5:]))) == max(0, count - 5)


@pytest.mark.parametrize("config_class", PREFIXES)
@pytest.mark.parametrize("count", [3, 5, 8])
def test_a_soft_prompt_starts_a_prefix(llama: FrozenModel, config_class: type[MethodConfig], count: int) -> None:
    """The prefix starts as the keys and values that the soft prompt has in the model."""
    stored = words(llama, "the quick brown fox jumps", 5) + 0.1
    prefix = build_method(config_class(count), llama, seed=0, warm_start=stored).fold()
    expected = prompt_key_values(llama, stored)[:, :, :, :count]
    torch.testing.assert_close(prefix[:, :, :, :5], expected, rtol=1e-3, atol=1e-3)
    assert prefix.shape[3] == count


@pytest.mark.parametrize("config_class", PREFIXES)
@pytest.mark.parametrize("count", [3, 5, 8])
def test_a_prefix_starts_a_prefix(llama: FrozenModel, config_class: type[MethodConfig], count: int) -> None:
    """Keys and values are taken as they are; missing ones are activations of words at the positions behind them."""
    spec = llama.spec
    stored = torch.randn(
        spec.num_layers, 2, spec.num_kv_heads, 5, spec.head_dim, generator=torch.Generator().manual_seed(0)
    )
    prefix = build_method(config_class(count), llama, seed=3, warm_start=stored).fold()
    torch.testing.assert_close(prefix[:, :, :, :5], stored[:, :, :, :count], rtol=1e-3, atol=1e-3)
    assert prefix.shape[3] == count
    sampled = build_method(config_class(count), llama, seed=3).fold()
    torch.testing.assert_close(prefix[:, :, :, 5:], sampled[:, :, :, 5:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_starts_near_a_stored_prompt(llama: FrozenModel, name: str) -> None:
    """A warm start reaches every method; without one the same seed starts elsewhere."""
    config = METHODS[name].config_class(4)
    stored = words(llama, "the quick brown fox", 4) * 1.5
    target = prompt_key_values(llama, stored) if name in ("prefix_tuning", "p_tuning_v2") else stored
    warm = build_method(config, llama, seed=0, warm_start=stored).fold()
    cold = build_method(config, llama, seed=0).fold()
    assert (warm - target).norm() < 0.8 * (cold - target).norm()


def test_unusable_warm_starts_are_refused(llama: FrozenModel) -> None:
    """A prefix cannot start a soft method; a prompt of another model or without virtual tokens starts nothing."""
    spec = llama.spec
    prefix = torch.zeros(spec.num_layers, 2, spec.num_kv_heads, 5, spec.head_dim)
    for name, prompt, reason in (
        ("residual", prefix, "got a prefix"),
        ("residual", torch.zeros(4, spec.hidden_size + 1), "of this model"),
        ("p_tuning_v2", prefix[:1], "of this model"),
        ("p_tuning_v2", prefix[:, :, :, :0], "of this model"),
        ("prompt_tuning", torch.zeros(0, spec.hidden_size), "of this model"),
        ("prompt_tuning", torch.tensor(1.0), "of this model"),
    ):
        with pytest.raises(InvalidRequestError, match=reason) as caught:
            build_method(METHODS[name].config_class(4), llama, seed=0, warm_start=prompt)
        assert caught.value.param == "warm_start"


def test_words_without_tokens_are_refused(llama: FrozenModel) -> None:
    """The mean of no embeddings is not a number; no text repeats to a length."""
    config = PromptTuningConfig(3, init="class_labels")
    with pytest.raises(InvalidRequestError, match="must have tokens, got ''") as caught:
        build_method(config, llama, seed=0, label_words={"a": " weather", "b": ""})
    assert caught.value.param == "label_words"
    with pytest.raises(InvalidRequestError, match="must have tokens, got ''"):
        from_text(llama, "", 3)
