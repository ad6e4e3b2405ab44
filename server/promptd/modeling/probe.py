"""Load-time proof: rows of every kind, packed, must equal transformers' own forward, or the model is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from promptd.errors import ModelRefusedError
from promptd.modeling.attention import Site
from promptd.modeling.families.base import Magnitudes, Sizes
from promptd.modeling.kv_pool import KVPool
from promptd.modeling.packed_batch import PackedBatch, PackedRow, Virtual
from promptd.modeling.reference import ReferenceRow, Segment

if TYPE_CHECKING:
    from promptd.modeling.frozen import FrozenModel

#: Largest difference of a logit, as a share of the largest logit.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
_NUM_PROBE_TOKENS = 48


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


def check_equal(model: FrozenModel, name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise `ModelRefusedError` where two answers differ by more than the dtype explains."""
    scale = expected.abs().max().item()
    difference = (found - expected).abs().max().item()
    if not difference <= TOLERANCE[model.dtype] * max(scale, 1.0):
        raise ModelRefusedError(
            f"probe row {name}: packed answers of {model.spec.architecture} differ from transformers' own "
            f"by {difference:.3g} at scale {scale:.3g}; this model would not be served exactly"
        )


def prove_rows(model: FrozenModel, rows: list[ProbeRow]) -> Magnitudes:
    """Run the rows packed and compare; the magnitudes are those of row 0."""
    pool = probe_pool(model)
    packed: list[PackedRow] = []
    free = 0
    for probe in rows:
        context: list[tuple[int, int]] = []
        position = 0
        for kind, tensor in probe.chain:
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
        length = len(probe.token_ids)
        slots = range(free, free + length)
        packed.append(PackedRow(probe.token_ids, position, slots, tuple(context), range(length)))
        free += length
    logits = model.forward_packed(PackedBatch(packed, pool)).float()
    ends = [replace(row, logits=(len(row.logits) - 1,) if row.logits else ()) for row in packed]
    last = model.forward_packed(PackedBatch(ends, pool)).float()
    done = 0
    for number, probe in enumerate(rows):
        found = logits[done : done + len(probe.token_ids)]
        done += len(probe.token_ids)
        kinds = "+".join(kind for kind, _ in probe.chain) or "bare"
        check_equal(model, f"{number} ({kinds})", found, probe.expected)
        check_equal(model, f"{number} ({kinds}), its end", last[number], probe.expected[-1])
    num_tokens = len(rows[0].token_ids)
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
