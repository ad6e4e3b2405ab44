"""Load-time proof: rows of every kind, packed, must equal transformers' own forward, or the model is refused."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from promptd.errors import ModelRefusedError
from promptd.modeling.families.decoder import DecoderSizes
from promptd.modeling.frozen import FrozenModel
from promptd.modeling.kv_pool import KVPool
from promptd.modeling.packed_batch import PackedBatch, PackedRow
from promptd.modeling.reference import ReferenceRow, Segment

#: Largest difference of a logit, as a share of the largest logit.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
_NUM_PROBE_TOKENS = 48


@dataclass(frozen=True)
class ProbeRow:
    """One probe request and what transformers answered: logits `[num_tokens, vocab_size]`."""

    chain: list[Segment]
    token_ids: list[int]
    expected: torch.Tensor


def expected_rows(hf: PreTrainedModel, sizes: DecoderSizes) -> list[ProbeRow]:
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


def run_probe(model: FrozenModel, rows: list[ProbeRow]) -> KVPool:
    """Run the rows packed; raise `ModelRefusedError` on a mismatch, return the pool (row 0 lies at its slot 0)."""
    spec = model.spec
    pool = KVPool(
        num_layers=spec.num_layers,
        num_slots=256,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=model.dtype,
        device=model.device,
    )
    packed: list[PackedRow] = []
    answers: list[int] = []  # index of the packed row that answers each probe row
    free = 0
    for probe in rows:
        context: list[tuple[int, int]] = []
        position = 0
        for kind, tensor in probe.chain:
            count = tensor.shape[3] if kind == "prefix" else tensor.shape[0]
            if kind == "prefix":
                pool.load_prefix([(free, count)], tensor)
            else:
                ids = tensor.tolist() if kind == "text" else ()
                embeds = tensor if kind == "soft" else None
                packed.append(PackedRow(ids, position, range(free, free + count), tuple(context), embeds=embeds))
            context.append((free, count))
            free, position = free + count, position + count
        length = len(probe.token_ids)
        slots = range(free, free + length)
        answers.append(len(packed))
        packed.append(PackedRow(probe.token_ids, position, slots, tuple(context), range(length)))
        free += length
    logits = model.forward_packed(PackedBatch(packed, pool)).float()
    done = 0
    for number, probe in enumerate(rows):
        found = logits[done : done + len(probe.token_ids)]
        done += len(probe.token_ids)
        scale = probe.expected.abs().max().item()
        difference = (found - probe.expected).abs().max().item()
        if not difference <= TOLERANCE[model.dtype] * max(scale, 1.0):
            kinds = "+".join(kind for kind, _ in probe.chain) or "bare"
            raise ModelRefusedError(
                f"probe row {number} ({kinds}): packed logits of {spec.architecture} differ from transformers' own "
                f"by {difference:.3g} at scale {scale:.3g}; this model would not be served exactly"
            )
    return pool


class LayerCalls:
    """Counts which layers' attention reached us: a class that bypasses `AttentionInterface` shows none."""

    def __init__(self, sizes: DecoderSizes) -> None:
        self.missing = set(range(sizes.num_layers))

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Note the layer; the result is thrown away."""
        self.missing.discard(layer)
        return torch.zeros_like(query).transpose(1, 2)


def check_layers(model: FrozenModel, sizes: DecoderSizes) -> None:
    """Raise `ModelRefusedError` naming the first layer whose attention does not reach our function."""
    calls = LayerCalls(sizes)
    ids = torch.zeros(2, dtype=torch.int64, device=model.device)
    with torch.no_grad():
        model.forward(model.embed(ids), ids, ids[:1], calls)
    if calls.missing:
        raise ModelRefusedError(
            f"layer {min(calls.missing)}: the attention of {model.spec.architecture} bypasses transformers' "
            "AttentionInterface and cannot be served"
        )
