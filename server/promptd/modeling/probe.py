"""Load-time proof: rows of every kind, packed, must equal transformers' own forward, or the model is refused.

Equal to within rounding. In float32 that is the same share of the largest logit for every model. In 16 bits it grows
with a model's depth and with how its layers pass rounding on: transformers' two ways to attend (eager, sdpa) answer
alike to 1.8 % on a random GPT-2 and to 7.5 % on a random Qwen2, in bfloat16. So it is measured there: transformers
answers once more, the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch
from transformers import PreTrainedModel

from promptd.errors import ModelRefusedError
from promptd.modeling.attention import Site, attend_by
from promptd.modeling.families.base import Magnitudes, Sizes
from promptd.modeling.kv_pool import KVPool
from promptd.modeling.packed_batch import PackedBatch, PackedRow, Virtual
from promptd.modeling.reference import ReferenceRow, Segment

if TYPE_CHECKING:
    from promptd.modeling.frozen import FrozenModel

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Largest difference of a number, as a share of the largest one; in 16 bits it may be more."""
_NOISES, _MOST = 1.5, 0.2
"""So many times what transformers' answers differ by among themselves; more than the last would prove nothing."""
_NUM_PROBE_TOKENS = 48


class Answered(Protocol):
    """A row with transformers' answer."""

    @property
    def expected(self) -> torch.Tensor:
        """Logits or hidden states, `[num_tokens, ...]`, float32."""


Row = TypeVar("Row", bound=Answered)


@dataclass(frozen=True)
class Probe(Generic[Row]):
    """Rows with transformers' answers, and how far ours may be from them: a share of the largest number."""

    rows: Sequence[Row]
    tolerance: float

    def check(self, architecture: str, name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Raise `ModelRefusedError` where two answers differ by more than rounding explains."""
        scale = expected.abs().max().item()
        difference = (found - expected).abs().max().item()
        if not difference <= self.tolerance * max(scale, 1.0):
            raise ModelRefusedError(
                f"probe row {name}: packed answers of {architecture} differ from transformers' own by {difference:.3g} "
                f"at scale {scale:.3g}, and rounding explains {self.tolerance:.2%}; it would not be served exactly"
            )


def probe_of(hf: PreTrainedModel, ask: Callable[[], Sequence[Row]]) -> Probe[Row]:
    """Have transformers answer what `ask` asks, the same each time."""
    rows, tolerance = ask(), TOLERANCE[hf.dtype]
    if hf.dtype is torch.float32:
        return Probe(rows, tolerance)
    own = hf.config._attn_implementation
    attend_by(hf, "eager")
    noises = [
        ((row.expected - other.expected).abs().max() / row.expected.abs().max().clamp_min(1.0)).item()
        for row, other in zip(rows, ask(), strict=True)
    ]
    attend_by(hf, own)
    return Probe(rows, min(max(tolerance, _NOISES * max(noises)), _MOST))


@dataclass(frozen=True)
class ProbeRow:
    """One probe request and what transformers answered: logits `[num_tokens, vocab_size]`."""

    chain: list[Segment]
    token_ids: list[int]
    expected: torch.Tensor


def expected_rows(hf: PreTrainedModel, sizes: Sizes) -> list[ProbeRow]:
    """Answer bare, soft, prefix and chained rows of ragged lengths with transformers' own attention."""
    generator = torch.Generator().manual_seed(0)
    vocabulary: int = hf.config.vocab_size

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(0, vocabulary, (count,), generator=generator).to(hf.device)

    def prefix(count: int) -> torch.Tensor:
        shape = (sizes.num_layers, 2, sizes.num_kv_heads, count, sizes.head_dim)
        return torch.randn(shape, generator=generator).to(hf.device, hf.dtype)

    with torch.no_grad():
        soft = hf.get_input_embeddings()(tokens(5)) * 1.1
    chains: list[list[Segment]] = [
        [],
        [("soft", soft)],
        [("prefix", prefix(3))],
        [("soft", soft), ("prefix", prefix(2))],
        [("soft", soft[:1]), ("text", tokens(4)), ("soft", soft[2:])],
    ]
    rows = []
    for chain, length in zip(chains, (_NUM_PROBE_TOKENS, 7, 1, 4, 9), strict=True):
        ids = tokens(length).tolist()
        rows.append(ProbeRow(chain, ids, ReferenceRow(hf, chain).extend(ids)))
    return rows


def probe_pool(model: FrozenModel) -> KVPool:
    """Return room for a few probe rows."""
    return KVPool(**model.pool_sizes(512))


def prove_rows(model: FrozenModel, probe: Probe[ProbeRow]) -> Magnitudes:
    """Run the rows packed and compare; the magnitudes are those of row 0."""
    pool = probe_pool(model)
    packed: list[PackedRow] = []
    free = 0
    for row in probe.rows:
        context: list[tuple[int, int]] = []
        position = 0
        for kind, tensor in row.chain:
            count = tensor.shape[3] if kind == "prefix" else tensor.shape[0]
            if kind == "prefix":
                pool.load_prefix([(free, count)], tensor)
            else:
                ids = tensor.tolist() if kind == "text" else [0] * count
                virtual = (Virtual(0, tensor),) if kind == "soft" else ()
                slots = range(free, free + count)
                packed.append(PackedRow(ids, position, slots, tuple(context), virtual=virtual))
            context.append((free, count))
            free, position = free + count, position + count
        length = len(row.token_ids)
        slots = range(free, free + length)
        packed.append(PackedRow(row.token_ids, position, slots, tuple(context), range(length)))
        free += length
    logits = model.forward_packed(PackedBatch(packed, pool)).float()
    ends = [replace(one, logits=(len(one.logits) - 1,) if one.logits else ()) for one in packed]
    last = model.forward_packed(PackedBatch(ends, pool)).float()
    done = 0
    for number, row in enumerate(probe.rows):
        found = logits[done : done + len(row.token_ids)]
        done += len(row.token_ids)
        kinds = "+".join(kind for kind, _ in row.chain) or "bare"
        probe.check(model.spec.architecture, f"{number} ({kinds})", found, row.expected)
        probe.check(model.spec.architecture, f"{number} ({kinds}), its end", last[number], row.expected[-1])
    num_tokens = len(probe.rows[0].token_ids)
    return Magnitudes(largest(pool.keys[:, :, :num_tokens]), largest(pool.values[:, :, :num_tokens]))


def largest(stored: torch.Tensor) -> tuple[float, ...]:
    """Largest magnitude in every layer, the first dimension."""
    return tuple(stored.abs().flatten(1).amax(1).float().tolist())


class LayerCalls:
    """Counts which layers' attention reached us: a class that bypasses `AttentionInterface` shows none."""

    def __init__(self, num_layers: int, *, has_cross: bool = False) -> None:
        self._missing = {(layer, is_cross) for layer in range(num_layers) for is_cross in {False, has_cross}}

    def attend(self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Note the layer; the result is thrown away."""
        self._missing.discard((site.layer, site.is_cross))
        return torch.zeros_like(query).transpose(1, 2)

    def check(self, architecture: str) -> None:
        """Raise `ModelRefusedError` naming the first layer whose attention did not reach our function."""
        if self._missing:
            raise ModelRefusedError(
                f"layer {min(self._missing)[0]}: the attention of {architecture} bypasses transformers' "
                "AttentionInterface and cannot be served"
            )
