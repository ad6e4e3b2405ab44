"""One shared prompt in front of many texts equals the prompt in front of each text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from promptd.modeling import FrozenModel, TrainingRow, forward_training, load_model
from promptd.training import forward_texts, prompt_key_values
from tests.tiny_models import FAMILIES

TEXTS = [(5, 6, 7), (100,), tuple(range(30, 42)), (9, 9, 9, 9)]
INDEX = torch.tensor([0, 2, 3, 4, 15, 19])
"""Packed tokens: inside the first text, its last, the lone token, first and last of the third, last of the fourth."""


def soft_prompt(model: FrozenModel, count: int = 6) -> torch.Tensor:
    """A soft prompt at the model's scale that is no row of the vocabulary."""
    generator = torch.Generator().manual_seed(count)
    scale = model.embed(torch.arange(model.spec.vocab_size)).std()
    return (torch.randn(count, model.spec.hidden_size, generator=generator) * scale).requires_grad_()


def one_by_one(model: FrozenModel, prompt: torch.Tensor | None) -> torch.Tensor:
    """The same logits from the engine's training rows, with the prompt repeated in front of every text."""
    rows, keep, start = [], [], 0
    for text in TEXTS:
        embeds, num_soft = model.embed(torch.tensor(text)), 0
        prefix = prompt if prompt is not None and prompt.dim() == 5 else None
        if prompt is not None and prefix is None:
            embeds, num_soft = torch.cat([prompt, embeds]), len(prompt)
        rows.append(TrainingRow(embeds, prefix, 0 if prefix is None else prefix.shape[3]))
        keep += range(start + num_soft, start + num_soft + len(text))
        start += num_soft + len(text)
    return forward_training(model, rows, torch.tensor(keep)[INDEX])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["bare", "soft", "prefix"])
def test_shared_prompt_equals_a_prompt_per_row(frozen_models: dict[str, FrozenModel], family: str, kind: str) -> None:
    """Logits and the prompt's gradient are those of rows that each carry the prompt."""
    model = frozen_models[family]
    prompt = None if kind == "bare" else soft_prompt(model)
    if kind == "prefix" and prompt is not None:
        prompt = prompt_key_values(model, prompt).detach().requires_grad_()
    ours, theirs = forward_texts(model, prompt, TEXTS, INDEX), one_by_one(model, prompt)
    tolerance = 1e-5 * theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    if prompt is not None:
        weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
        own, other = (torch.autograd.grad((logits * weights).sum(), prompt)[0] for logits in (ours, theirs))
        torch.testing.assert_close(own, other, rtol=0, atol=1e-4 * other.abs().max().item())


def test_swapped_prompts_are_noticed(llama: FrozenModel) -> None:
    """The comparison above can fail: another prompt gives other logits."""
    first, second = forward_texts(llama, soft_prompt(llama, 6), TEXTS, INDEX), one_by_one(llama, soft_prompt(llama, 7))
    assert (first - second).abs().max() > 1e-2 * second.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_own_forward(
    frozen_models: dict[str, FrozenModel], tiny_models: dict[str, Path], family: str
) -> None:
    """Soft prompt and text through transformers, one row, no code of ours: the same logits."""
    model = frozen_models[family]
    hf = AutoModelForCausalLM.from_pretrained(tiny_models[family]).eval()
    prompt = soft_prompt(model).detach()
    embeds = torch.cat([prompt, hf.get_input_embeddings()(torch.tensor(TEXTS[2]))])
    expected = hf(inputs_embeds=embeds.unsqueeze(0)).logits[0, -1]
    ours = forward_texts(model, prompt, TEXTS, torch.tensor([15]))[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_gradient_through_packed_linears_is_the_unpacked_one(tiny_models: dict[str, Path]) -> None:
    """A prompt learns the same whether the model's linear layers are packed for serving or not."""
    grads = []
    for packed in (True, False):
        model = load_model(tiny_models["llama"], packed_linears=packed)
        prompt = soft_prompt(model)
        forward_texts(model, prompt, TEXTS, INDEX).square().sum().backward()
        grads.append(prompt.grad)
    assert grads[0] is not None and grads[1] is not None
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-4 * grads[1].abs().max().item())


def test_no_weight_gets_a_gradient(llama: FrozenModel) -> None:
    """Only the prompt is learned."""
    prompt = soft_prompt(llama)
    forward_texts(llama, prompt, TEXTS, INDEX).sum().backward()
    assert prompt.grad is not None and prompt.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in llama.hf.parameters())
