"""The differentiable packed forward: gradients of prompts are transformers' own, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from promptd.modeling import FrozenModel, TrainingRow, forward_training, load_model
from tests.engine.harness import frozen
from tests.tiny_models import FAMILIES

TEXTS = [(5, 6, 7), (100,), tuple(range(30, 42))]
COUNTS = (4, 1, 6)


def rows_of(model: FrozenModel, kind: str) -> tuple[list[torch.Tensor], list[TrainingRow]]:
    """A learned prompt for every text, and the training rows that hold them."""
    generator = torch.Generator().manual_seed(1)
    spec = model.spec
    prompts, rows = [], []
    for text, count in zip(TEXTS, COUNTS, strict=True):
        embeds = model.embed(torch.tensor(text))
        if kind == "soft":
            prompt = (0.3 * torch.randn(count, spec.hidden_size, generator=generator)).requires_grad_()
            rows.append(TrainingRow(torch.cat([prompt, embeds])))
        else:
            shape = (spec.num_layers, 2, spec.num_kv_heads, count, spec.head_dim)
            prompt = torch.randn(shape, generator=generator).requires_grad_()
            rows.append(TrainingRow(embeds, prompt, position_offset=count))
        prompts.append(prompt)
    return prompts, rows


def theirs(hf: Any, kind: str, prompt: torch.Tensor, text: tuple[int, ...]) -> torch.Tensor:
    """One row through transformers' own forward and cache, with autograd; `[num_tokens, vocab_size]`."""
    embeds = hf.get_input_embeddings()(torch.tensor(text))
    if kind == "soft":
        return whole(hf(inputs_embeds=torch.cat([prompt, embeds])[None]))
    cache = DynamicCache(config=hf.config)
    for layer, (key, value) in enumerate(prompt):
        cache.update(key[None], value[None], layer)
    count = prompt.shape[3]
    positions = torch.arange(count, count + len(text))[None]
    return whole(hf(inputs_embeds=embeds[None], position_ids=positions, past_key_values=cache))


def whole(output: Any) -> torch.Tensor:
    """The logits of the only row."""
    logits: torch.Tensor = output.logits
    return logits[0]


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    """A loss that weighs every logit differently."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(len(logits)))
    return (torch.log_softmax(logits, -1) * weights).sum()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["soft", "prefix"])
@pytest.mark.parametrize("packed", [True, False])
def test_gradients_equal_transformers(tiny_models: dict[str, Path], family: str, kind: str, packed: bool) -> None:
    """Logits and every prompt's gradient, in one packed pass, through packed linears or plain ones."""
    folder = tiny_models[family]
    model = frozen(folder) if packed else load_model(folder, packed_linears=False)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    before = model.digest()
    prompts, rows = rows_of(model, kind)
    logits = forward_training(model, rows).split([len(row.input_embeds) for row in rows])
    sum(loss_of(own) for own in logits).backward()  # type: ignore[union-attr]
    for prompt, text, own in zip(prompts, TEXTS, logits, strict=True):
        twin = prompt.detach().clone().requires_grad_()
        expected = theirs(hf, kind, twin, text)
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        loss_of(expected).backward()
        assert prompt.grad is not None and twin.grad is not None
        assert twin.grad.abs().max() > 1e-3
        torch.testing.assert_close(prompt.grad, twin.grad, rtol=0, atol=1e-3 * twin.grad.abs().max().item())
    assert model.digest() == before
    assert all(parameter.grad is None for parameter in model.hf.parameters())


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_rows_do_not_leak_gradients(tiny_models: dict[str, Path], kind: str) -> None:
    """The loss of one row moves its own prompt and, to the last bit, no other. Control: one row holding both."""
    model = frozen(tiny_models["llama"])
    prompts, rows = rows_of(model, kind)
    start = len(rows[0].input_embeds)
    index = torch.arange(start, start + len(rows[1].input_embeds))
    loss_of(forward_training(model, rows, index)).backward()
    assert prompts[1].grad is not None and prompts[1].grad.abs().max() > 0
    for other in (prompts[0], prompts[2]):
        assert other.grad is None or not other.grad.any()
    joined = TrainingRow(torch.cat([row.input_embeds for row in rows]), rows[0].prefix, rows[0].position_offset)
    prompts[0].grad = None
    loss_of(forward_training(model, [joined], index)).backward()
    assert prompts[0].grad is not None and prompts[0].grad.abs().max() > 0
