"""The last layer computes what is asked for, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from promptd.errors import ModelRefusedError
from promptd.modeling import FrozenModel, KVPool, PackedBatch, PackedRow, last_layer, load_model
from promptd.modeling.last_layer import LastLinear
from tests.tiny_models import FAMILIES, make_tiny_model

NUM_LAST = {"gpt2": 3, "llama": 4, "qwen2": 4}
"""Linear layers behind an attention: the heads' output, and the two or three of what follows."""
LENGTHS = (40, 9, 1)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FrozenModel:
    """A tiny model of each family."""
    return load_model(make_tiny_model(tmp_path_factory.mktemp("model"), request.param))


def last_layers(model: FrozenModel) -> list[LastLinear]:
    """What was wrapped."""
    return [module for module in model.hf.modules() if isinstance(module, LastLinear)]


def run(model: FrozenModel, *, wants_all: bool) -> tuple[list[torch.Tensor], KVPool]:
    """Read three texts; return each one's wanted logits, and the pool."""
    generator = torch.Generator().manual_seed(1)
    pool, rows, first = KVPool(**model.pool_sizes(64)), [], 0
    for length in LENGTHS:
        ids = torch.randint(0, model.spec.vocab_size, (length,), generator=generator).tolist()
        logits = range(length) if wants_all else (length - 1,)
        rows.append(PackedRow(ids, 0, range(first, first + length), (), logits))
        first += length
    found = model.forward_packed(PackedBatch(rows, pool))
    return list(found.split([len(row.logits) for row in rows])), pool


def test_answers_and_keys_are_those_of_the_whole_layer(model: FrozenModel) -> None:
    """Bit by bit where a row's bits are its own; of the last tokens only three are computed, of 50."""
    layers, seen = last_layers(model), []
    assert len(layers) == NUM_LAST[model.hf.config.model_type]
    for layer in layers:
        layer.linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    whole, whole_pool = run(model, wants_all=True)
    assert seen == [sum(LENGTHS)] * len(layers)
    seen.clear()
    ends, ends_pool = run(model, wants_all=False)
    assert seen == [len(LENGTHS)] * len(layers)
    for some, every in zip(ends, whole, strict=True):
        torch.testing.assert_close(some[0], every[-1], atol=1e-5, rtol=1e-5)
    used = sum(LENGTHS)
    for name in ("keys", "values"):
        torch.testing.assert_close(getattr(ends_pool, name)[:, :, :used], getattr(whole_pool, name)[:, :, :used])


def test_gradients_are_those_of_the_whole_layer(model: FrozenModel) -> None:
    """What embeddings get from the answer to one token, with and without the others computed."""
    positions = torch.arange(12)
    gradients = []
    for asked in (positions, positions[8:9]):
        embeds = model.embed(positions + 3).detach().requires_grad_()
        answer = model.forward(embeds, positions, asked, _Causal())[8 if len(asked) > 1 else 0]
        gradients += torch.autograd.grad(answer.logsumexp(-1), embeds)
    assert gradients[0][:9].abs().amin(1).max() > 0 and not gradients[0][9:].any()
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


class _Causal:
    """Plain causal attention."""

    def attend(self, site: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Torch's own."""
        attend = torch.nn.functional.scaled_dot_product_attention
        shares = query.shape[1] != key.shape[1]
        return attend(query, key, value, is_causal=True, scale=site.scale, enable_gqa=shares).transpose(1, 2)


def test_the_load_time_proof_covers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrowed layer that answers for the wrong token is refused."""
    forward = LastLinear.forward
    monkeypatch.setattr(LastLinear, "forward", lambda self, hidden: forward(self, hidden).roll(1, 1))
    with pytest.raises(ModelRefusedError, match="probe row"):
        load_model(make_tiny_model(tmp_path, "llama"))


def test_the_proof_asks_for_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only what is narrowed is wrong."""

    def forward(self: LastLinear, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(hidden)
        return found if last_layer._wanted.get() is None else found * 0.5

    monkeypatch.setattr(LastLinear, "forward", forward)
    with pytest.raises(ModelRefusedError, match="its end"):
        load_model(make_tiny_model(tmp_path, "llama"))
