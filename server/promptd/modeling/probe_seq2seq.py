"""Load-time proof of sequence-to-sequence models: packed sources and targets must equal transformers' own forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from promptd.modeling.attention_rows import RowAttention
from promptd.modeling.families.base import Magnitudes, Sizes
from promptd.modeling.packed_batch import PackedBatch, PackedRow, Virtual
from promptd.modeling.probe import Probe, largest, probe_pool
from promptd.modeling.probe_sources import Recorder

if TYPE_CHECKING:
    from promptd.modeling.frozen import FrozenModel

#: Source tokens, soft prompt tokens, target tokens, prefix tokens of the target's own attention.
_ROWS = ((48, 0, 24, 0), (7, 5, 9, 0), (1, 0, 3, 4), (12, 2, 5, 2), (30, 0, 2, 0))


@dataclass(frozen=True)
class ProbePair:
    """One row and what transformers answered: logits `[num_target_tokens, vocab_size]`."""

    source_ids: list[int]
    virtual: Sequence[Virtual]
    target_ids: list[int]
    prefix: torch.Tensor
    """`[num_layers, 2, num_kv_heads, n, head_dim]`, n may be 0."""
    expected: torch.Tensor


@torch.no_grad()
def expected_pairs(hf: PreTrainedModel, sizes: Sizes) -> list[ProbePair]:
    """Answer the rows with transformers' own attention and caches."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for num_source, num_soft, num_target, num_prefix in _ROWS:
        source, target = (
            torch.randint(0, hf.config.vocab_size, (count,), generator=generator).to(hf.device)
            for count in (num_soft + num_source, num_target)
        )
        embeds = hf.get_input_embeddings()(source)
        embeds[:num_soft] *= 1.1
        shape = (sizes.num_layers, 2, sizes.num_kv_heads, num_prefix, sizes.head_dim)
        prefix = torch.randn(shape, generator=generator).to(hf.device, hf.dtype)
        own = DynamicCache()
        for layer in range(sizes.num_layers) if num_prefix else ():
            own.update(prefix[layer, :1], prefix[layer, 1:], layer)
        output: Any = hf(
            inputs_embeds=embeds.unsqueeze(0),
            decoder_input_ids=target.unsqueeze(0),
            past_key_values=EncoderDecoderCache(own, DynamicCache()),
            use_cache=True,
        )
        virtual = (Virtual(0, embeds[:num_soft]),) if num_soft else ()
        pairs.append(ProbePair(source.tolist(), virtual, target.tolist(), prefix, output.logits[0].float()))
    return pairs


@torch.no_grad()
def prove_pairs(model: FrozenModel, probe: Probe[ProbePair]) -> Magnitudes:
    """Run the rows packed, the last token of each target as a row of its own, and compare."""
    pool, pairs = probe_pool(model), probe.rows
    sources, targets, free = [], [], 0

    def take(count: int) -> range:
        nonlocal free
        free += count
        return range(free - count, free)

    for pair in pairs:
        slots = take(len(pair.source_ids))
        sources.append(PackedRow(pair.source_ids, 0, slots, (), virtual=pair.virtual))
        count, length = pair.prefix.shape[3], len(pair.target_ids)
        front, own = take(count), take(length)
        context = [(front.start, count)] if count else []
        pool.load_prefix(context, pair.prefix)
        cross = [(slots.start, len(slots))]
        most = length - 1
        targets.append(PackedRow(pair.target_ids[:most], count, own[:most], context, range(most), cross=cross))
        read = [*context, (own.start, most)]
        targets.append(PackedRow(pair.target_ids[most:], count + most, own[most:], read, (0,), cross=cross))
    batch = PackedBatch(sources, pool, is_causal=False)
    model.read_sources(batch)
    logits = model.forward_packed(PackedBatch(targets, pool)).float()
    found = logits.split([len(pair.target_ids) for pair in pairs])
    for number, (pair, own_logits) in enumerate(zip(pairs, found, strict=True)):
        kinds = "+".join(["soft"] * bool(pair.virtual) + ["prefix"] * bool(pair.prefix.shape[3])) or "bare"
        probe.check(model.spec.architecture, f"{number} ({kinds})", own_logits, pair.expected)
    recorder = Recorder(RowAttention(batch), len(pairs[0].source_ids))
    model.family.read_whole(model.embed(batch.input_ids), batch.position_ids, recorder)
    num_layers, num_source, end = model.spec.num_layers, len(pairs[0].source_ids), targets[1].slots[0] + 1
    banks = [
        (largest(stored[:num_layers, :, num_source:end]), recorded, largest(stored[:num_layers, :, :num_source]))
        for stored, recorded in ((pool.keys, tuple(recorder.keys)), (pool.values, tuple(recorder.values)))
    ]
    keys, values = (target + source + cross for target, source, cross in banks)
    return Magnitudes(keys, values)
