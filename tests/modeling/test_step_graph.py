"""A recorded step gives the bits of the model's own forward, whatever rows come; what is no graph is not made one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from promptd.modeling import FrozenModel, KVPool, PackedBatch, PackedRow, load_model
from promptd.modeling.attention import Attends
from promptd.modeling.quantized_linear import can_quantize
from promptd.modeling.recording import NotOneGraphError
from promptd.modeling.step_graph import StepGraph, step_graph
from tests.family_models import SEQ2SEQ, write_model
from tests.tiny_models import FAMILIES, VOCAB_SIZE, make_tiny_model, make_tokenizer

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "torch's products": {"packed_linears": False},
    "strict": {"strict": True},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family."""
    return make_tiny_model(tmp_path_factory.mktemp("model"), request.param)


def decode(model: FrozenModel, num_rows: int) -> tuple[list[torch.Tensor], KVPool]:
    """Read texts of several lengths, then three steps of their rows; return the steps' logits, and the pool."""
    generator = torch.Generator().manual_seed(num_rows)
    pool = KVPool(**model.pool_sizes(16 * num_rows))
    pool.keys.zero_(), pool.values.zero_()
    lengths = [1 + row % 7 for row in range(num_rows)]
    ids = torch.randint(0, model.spec.vocab_size, (num_rows, 10), generator=generator).tolist()
    texts = [
        PackedRow(own[:length], 0, range(16 * row, 16 * row + length), ())
        for row, (own, length) in enumerate(zip(ids, lengths, strict=True))
    ]
    model.forward_packed(PackedBatch(texts, pool))
    steps = []
    for more in range(3):
        rows = [
            PackedRow([own[length + more]], length + more, [16 * row + length + more], [(16 * row, length + more)], [0])
            for row, (own, length) in enumerate(zip(ids, lengths, strict=True))
        ]
        steps.append(model.forward_packed(PackedBatch(rows, pool)))
    return steps, pool


@pytest.mark.parametrize("setting", SETTINGS)
def test_steps_have_the_bits_of_the_models_own_forward(
    folder: Path, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row, as many as were recorded, and more than any tile has; the model's own Python runs for texts alone."""
    if setting == "int8" and not can_quantize():
        pytest.skip("no 8-bit products here")
    model = load_model(folder, **SETTINGS[setting])
    assert model.step_graph is not None
    own = dataclasses.replace(model, step_graph=None)
    passes: list[int] = []
    model.hf.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for num_rows in (1, 3, 29):
        passes.clear()
        found, found_pool = decode(model, num_rows)
        assert len(passes) == 1
        expected, expected_pool = decode(own, num_rows)
        assert passes[2:] == [num_rows] * 3  # the control: without a graph it runs for steps, too
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(found_pool.keys, expected_pool.keys)
        assert torch.equal(found_pool.values, expected_pool.values)


def write(model: FrozenModel, num_rows: int) -> tuple[list[torch.Tensor], KVPool]:
    """Read sources of several lengths, then write four tokens for each; return the steps' logits, and the pool."""
    generator = torch.Generator().manual_seed(num_rows)
    pool = model.make_pool(64 * num_rows)
    pool.keys.zero_(), pool.values.zero_()
    ids = torch.randint(0, model.spec.vocab_size, (num_rows, 12), generator=generator).tolist()
    lengths = [3 + row % 9 for row in range(num_rows)]
    sources = [
        PackedRow(own[:length], 0, range(64 * row, 64 * row + length), ())
        for row, (own, length) in enumerate(zip(ids, lengths, strict=True))
    ]
    model.read_sources(PackedBatch(sources, pool, is_causal=False))
    steps = []
    for step in range(4):
        rows = [
            PackedRow(
                [own[step]], step, [first + 20 + step], [(first + 20, step)] if step else [], [0], (), [(first, n)]
            )
            for own, first, n in zip(ids, range(0, 64 * num_rows, 64), lengths, strict=True)
        ]
        steps.append(model.forward_packed(PackedBatch(rows, pool)))
    return steps, pool


@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if setting != "strict"])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_targets_of_sources(tiny_seq2seq: dict[str, Path], name: str, setting: str) -> None:
    """Cross attention, relative positions and position tables: the bits of the model's own decoder, which rests."""
    if setting == "int8" and not can_quantize():
        pytest.skip("no 8-bit products here")
    model = load_model(tiny_seq2seq[name], **SETTINGS[setting])
    assert model.step_graph is not None
    own = dataclasses.replace(model, step_graph=None)
    passes: list[int] = []
    model.hf.get_decoder().register_forward_pre_hook(lambda *_: passes.append(1))
    for num_rows in (1, 4, 29):
        passes.clear()
        found, found_pool = write(model, num_rows)
        assert not passes
        expected, expected_pool = write(own, num_rows)
        assert len(passes) == 4  # the control
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert torch.equal(found_pool.keys, expected_pool.keys)
        assert torch.equal(found_pool.values, expected_pool.values)


def test_a_step_is_of_single_tokens_that_are_all_asked_for(folder: Path) -> None:
    """Anything else is read by the model's own forward."""
    pool = KVPool(**load_model(folder).pool_sizes(64))
    one, other = PackedRow([1], 4, [4], [(0, 4)], [0]), PackedRow([2], 0, [9], (), [0])
    unasked, text = PackedRow([3], 0, [12], ()), PackedRow([3, 4], 0, [16, 17], (), [0, 1])
    assert PackedBatch([one, other], pool).is_step
    for more in (unasked, text):
        assert not PackedBatch([one, more], pool).is_step
    assert not PackedBatch([], pool).is_step


WEIGHT = torch.eye(4)
STATE = [0]
NOBODY: Any = None


def embed(ids: torch.Tensor) -> torch.Tensor:
    """`[num_rows, 4]`."""
    return torch.ones(len(ids), 4) * (ids.unsqueeze(1) + 1)


def plain(embeds: torch.Tensor, positions: torch.Tensor, index: torch.Tensor, batch: Attends) -> torch.Tensor:
    """What can be recorded."""
    hidden = embeds.unsqueeze(0) @ WEIGHT + positions.view(1, -1, 1)
    return hidden.expand(2, -1, -1).reshape(2 * len(embeds), 4)[index]


def changes(embeds: torch.Tensor, positions: torch.Tensor, *rest: Any) -> torch.Tensor:
    """What is changed in place, and a tensor made of a number: recorded, both."""
    count = torch.tensor(0)
    count += (positions > 100).sum()
    return (embeds * 1).add_(1).mul_(torch.tensor(2.0)) + count


def looks(embeds: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Goes by a value."""
    return embeds * 2 if embeds.sum() > 10 else embeds


def lists(embeds: torch.Tensor, positions: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Goes by a value that it reads past torch's operations."""
    return embeds * 2 if max(positions.tolist()) < 10_000 else embeds * 3


def arrays(embeds: torch.Tensor, positions: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The same, another way."""
    return embeds * 2 if positions.numpy().max() < 10_000 else embeds * 3


def counts(embeds: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Goes on for as long as there are rows."""
    for _ in range(len(embeds)):
        embeds = embeds + 1
    return embeds


def one_more(embeds: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Has a size that is no multiple."""
    return torch.cat([embeds, embeds[:1]]).narrow(0, 0, len(embeds) + 1)[:-1]


def remembers(embeds: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Adds what it was called with last."""
    STATE[0] += 1
    return embeds + torch.full((4,), float(STATE[0]))


def random(embeds: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Never gives the same."""
    return embeds + torch.rand(4)


def few(embeds: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Goes another way with many rows."""
    return embeds * 2 if len(embeds) < 64 else embeds * 3


def breaks(embeds: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Is no forward at all."""
    raise KeyError("nothing")


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (looks, "looks at numbers"),
        (lists, "tolist looks at numbers"),
        (arrays, "numpy looks at numbers"),
        (counts, "its length follows the number of rows"),
        (one_more, "with another number of rows"),
        (remembers, "with another number of rows"),
        (random, "rows come out otherwise"),
        (few, "67 rows come out otherwise"),
    ],
)
def test_what_is_no_graph_keeps_its_own_forward(
    read: Callable[..., torch.Tensor], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The reason is told; what can be recorded (the control) is."""
    with pytest.raises(NotOneGraphError, match=reason):
        StepGraph.of(read, embed, 500, 128)
    with caplog.at_level("INFO"):
        assert step_graph(read, embed, 500, 128) is None
    assert reason in caplog.text
    assert step_graph(plain, embed, 500, 128) is not None


def test_a_model_that_cannot_be_recorded_is_served_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever recording it meets."""
    assert step_graph(breaks, embed, 500, 128) is None
    assert "recording one failed" in caplog.text


def test_changes_in_place_last_one_pass() -> None:
    """Three equal calls give the same three times, and what the forward itself gives."""
    graph = StepGraph.of(changes, embed, 500, 128)
    late = embed(torch.arange(4)), torch.full((4,), 120), torch.arange(4), NOBODY
    for _ in range(3):
        assert torch.equal(graph(*late), changes(*late))


def test_experts_are_recorded(tmp_path: Path) -> None:
    """A mixture of experts changes tensors in place; which expert a token goes to is no look at numbers."""
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = load_model(write_model(lambda: MixtralForCausalLM(config), make_tokenizer(), tmp_path / "mixtral"))
    assert model.step_graph is not None
    for num_rows in (1, 29):
        found, expected = (decode(each, num_rows) for each in (model, dataclasses.replace(model, step_graph=None)))
        assert all(torch.equal(one, other) for one, other in zip(found[0], expected[0], strict=True))
