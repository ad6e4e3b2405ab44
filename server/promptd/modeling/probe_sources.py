"""Load-time proof of sources: packed and read whole, they must equal transformers' own forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from promptd.modeling.attention import Attends, Site
from promptd.modeling.families.base import Magnitudes
from promptd.modeling.packed_batch import PackedBatch, PackedRow, Virtual
from promptd.modeling.probe import Probe, largest, probe_pool

if TYPE_CHECKING:
    from promptd.modeling.frozen import FrozenModel


@dataclass(frozen=True)
class ProbeSource:
    """One row and what transformers answered: hidden states `[num_tokens, hidden_size]`."""

    token_ids: list[int]
    virtual: Sequence[Virtual]
    prefix: torch.Tensor
    """`[num_layers, 2, num_kv_heads, n, head_dim]`, n may be 0."""
    expected: torch.Tensor


class Recorder:
    """Passes attention on and keeps the largest keys and values of the first tokens, site by site as they call."""

    def __init__(self, inner: Attends, num_tokens: int) -> None:
        self._inner = inner
        self._num_tokens = num_tokens
        self.keys: list[float] = []
        self.values: list[float] = []

    def attend(self, site: Site, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return what the inner attention does."""
        self.keys += largest(key[:, :, : self._num_tokens])
        self.values += largest(value[:, :, : self._num_tokens])
        return self._inner.attend(site, query, key, value)


@torch.no_grad()
def prove_sources(model: FrozenModel, probe: Probe[ProbeSource]) -> Magnitudes:
    """Run the rows packed and compare; the magnitudes are those of row 0."""
    from promptd.modeling.attention_rows import RowAttention

    pool, rows = probe_pool(model), probe.rows
    packed, free = [], 0
    for row in rows:
        count = row.prefix.shape[3]
        context = ((free, count),) if count else ()
        pool.load_prefix(context, row.prefix)
        free += count
        packed.append(PackedRow(row.token_ids, count, (), context, virtual=row.virtual))
    batch = PackedBatch(packed, pool, is_causal=False)
    for number, (row, found) in enumerate(zip(rows, model.read_sources(batch), strict=True)):
        kinds = ("soft" if row.virtual else "") + ("prefix" if row.prefix.shape[3] else "") or "bare"
        probe.check(model.spec.architecture, f"{number} ({kinds})", found.float(), row.expected)
    recorder = Recorder(RowAttention(batch), len(rows[0].token_ids))
    model.family.read_whole(model.embed(batch.input_ids), batch.position_ids, recorder)
    return Magnitudes(tuple(recorder.keys), tuple(recorder.values))
