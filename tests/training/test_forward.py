"""The differentiable pass: logits and gradients of many prompts' texts are transformers' own, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from promptd.modeling import FrozenModel, load_model
from promptd.training import PromptedTexts, forward_groups, forward_texts, prompt_key_values
from promptd.training.padded_rows import MAX_PADDING, _alike
from tests.tiny_models import FAMILIES

TEXTS = [(5, 6, 7), (100,), tuple(range(30, 42)), (9, 9, 9, 9)]
COUNTS = {"soft": 6, "longer": 11, "one": 1, "prefix": 4, "bare": 0}
SHARED = {"soft": TEXTS, "longer": TEXTS[2:], "one": TEXTS[:1], "prefix": TEXTS[1:3], "bare": TEXTS[3:]}
"""Group -> its texts: one prompt stands in front of several, and prompts of all kinds and lengths share the pass."""


def prompt_of(model: FrozenModel, name: str) -> torch.Tensor | None:
    """A prompt at the model's scale that is no row of the vocabulary."""
    count = COUNTS[name]
    generator = torch.Generator().manual_seed(count)
    embeds = torch.randn(count, model.spec.hidden_size, generator=generator) * model.embedding_std
    if name == "bare":
        return None
    return (prompt_key_values(model, embeds).detach() if name == "prefix" else embeds).requires_grad_()


def group_of(model: FrozenModel, name: str) -> PromptedTexts:
    """A group that wants the logits of all of its tokens."""
    texts = SHARED[name]
    return PromptedTexts(prompt_of(model, name), texts, torch.arange(sum(map(len, texts))))


def theirs(hf: Any, prompt: torch.Tensor | None, text: tuple[int, ...]) -> torch.Tensor:
    """One row through transformers' own forward and cache, with autograd; `[num_tokens, vocab_size]`."""
    embeds = hf.get_input_embeddings()(torch.tensor(text))
    if prompt is None or prompt.dim() == 2:
        whole = embeds if prompt is None else torch.cat([prompt, embeds])
        logits: torch.Tensor = hf(inputs_embeds=whole[None]).logits[0, -len(text) :]
        return logits
    cache = DynamicCache(config=hf.config)
    for layer, (key, value) in enumerate(prompt):
        cache.update(key[None], value[None], layer)
    positions = torch.arange(prompt.shape[3], prompt.shape[3] + len(text))[None]
    return hf(inputs_embeds=embeds[None], position_ids=positions, past_key_values=cache).logits[0]


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    """A loss that weighs every logit differently."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(len(logits)))
    return (torch.log_softmax(logits, -1) * weights).sum()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_logits_and_gradients_equal_transformers(tiny_models: dict[str, Path], family: str, packed: bool) -> None:
    """Five prompts and ten texts in one pass, through packed linears or plain ones; no weight gets a gradient."""
    model = load_model(tiny_models[family], packed_linears=packed)
    hf = AutoModelForCausalLM.from_pretrained(tiny_models[family], attn_implementation="eager").eval()
    before = model.digest()
    groups = {name: group_of(model, name) for name in COUNTS}
    logits = dict(zip(groups, forward_groups(model, list(groups.values())), strict=True))
    torch.autograd.backward([loss_of(own) for own in logits.values()])
    for name, group in groups.items():
        twin = None if group.prompt is None else group.prompt.detach().clone().requires_grad_()
        expected = torch.cat([theirs(hf, twin, text) for text in SHARED[name]])
        torch.testing.assert_close(logits[name], expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        if twin is None or group.prompt is None:
            continue
        loss_of(expected).backward()
        assert group.prompt.grad is not None and twin.grad is not None
        assert twin.grad.abs().max() > 1e-3
        torch.testing.assert_close(group.prompt.grad, twin.grad, rtol=0, atol=1e-3 * twin.grad.abs().max().item())
    assert model.digest() == before
    assert all(parameter.grad is None for parameter in model.hf.parameters())


def test_swapped_prompts_are_noticed(llama: FrozenModel) -> None:
    """The comparison above can fail: another prompt gives other logits."""
    index = torch.arange(3)
    first, second = (forward_texts(llama, prompt_of(llama, name), TEXTS[:1], index) for name in ("soft", "longer"))
    assert (first - second).abs().max() > 1e-2 * second.abs().max()


def test_groups_do_not_leak_gradients(llama: FrozenModel) -> None:
    """The loss of one group moves its own prompt and, to the last bit, no other. Control: both texts behind one."""
    groups = {name: group_of(llama, name) for name in COUNTS}
    logits = dict(zip(groups, forward_groups(llama, list(groups.values())), strict=True))
    loss_of(logits["longer"]).backward()
    for name, group in groups.items():
        if group.prompt is not None:
            gradient = group.prompt.grad
            assert (gradient is not None and bool(gradient.any())) == (name == "longer")
    prompt = prompt_of(llama, "soft")
    loss_of(forward_texts(llama, prompt, TEXTS[:2], torch.tensor([3]))).backward()  # a token of the second text
    assert prompt is not None and prompt.grad is not None and prompt.grad.any()


def test_wanted_logits_are_those_asked_for(llama: FrozenModel) -> None:
    """Only the asked tokens' logits come out, in the order in which they were asked for."""
    whole = forward_texts(llama, prompt_of(llama, "soft"), TEXTS, torch.arange(20))
    index = torch.tensor([19, 0, 4])
    torch.testing.assert_close(forward_texts(llama, prompt_of(llama, "soft"), TEXTS, index), whole[index])


def test_a_long_context_makes_no_room_in_front_of_others() -> None:
    """Rows are padded together only with rows of their like, and every row is in one run, in order."""
    lengths = [12, 10, 14, 2000, 2010, 9, 30, 31, 500]
    runs = list(_alike(lengths))
    assert [at for first, last in runs for at in range(first, last)] == list(range(len(lengths)))
    for first, last in runs:
        own = lengths[first:last]
        assert len(own) * max(own) <= MAX_PADDING * sum(own)
    assert len(runs) < len(lengths) and list(_alike([])) == []
