"""Decode steps on CUDA, each one launch: recorded as a CUDA graph for a number of rows, replayed for as many or fewer.

A step of single tokens is hundreds of small kernels, and the CPU takes longer to launch them than the device to run
them. A graph launches them all at once, over tensors that stay where they are: a step's inputs are copied there, rows
that are missing repeat the last one (they write the same keys and values to the same slots), and one table of spans
says what each row sees. Graphs are recorded when they are first needed. The first step of each is also run by the model
itself: where a graph cannot be recorded, or gives something else, every step is the model's own from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from promptd.modeling.attention import Attends
from promptd.modeling.attention_triton import SpanTable, TritonAttention, to_device
from promptd.modeling.kv_pool import KVPool
from promptd.modeling.packed_batch import PackedBatch

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, *range(16, 257, 8))
"""Numbers of rows that a graph is recorded for; steps of more are the model's own."""
SPANS_PER_ROW = 128
"""Room for so many in the mean: the slots of a text are side by side as far as they can be."""
_TOLERANCE = 0.02
"""Of the largest logit: products over other numbers of rows round otherwise, by less than this even in bfloat16."""

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Attends], torch.Tensor]
Run = Callable[[], torch.Tensor]
Record = Callable[[Run], tuple[Callable[[], None], torch.Tensor]]
"""Takes what computes a step, and returns what does so again into the same tensor, and that."""


class Steps(Protocol):
    """What of a model is asked for here."""

    def forward(
        self, embeds: torch.Tensor, positions: torch.Tensor, logits_index: torch.Tensor, batch: Attends
    ) -> torch.Tensor:
        """See `FrozenModel`."""

    def forward_packed(self, batch: PackedBatch) -> torch.Tensor:
        """See `FrozenModel`."""

    def embed_rows(self, batch: PackedBatch) -> torch.Tensor:
        """See `FrozenModel`."""


class CudaSteps:
    """The steps of one model over one K/V pool."""

    def __init__(self, model: Steps, pool: KVPool, record: Record | None = None) -> None:
        """`record` is for tests alone: they have no device."""
        self._model = model
        self._pool = pool
        self._record = record or CudaRecorder()
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._is_on = True

    @torch.no_grad()
    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """Read one step's targets; return logits `[num_logits, vocab_size]`, as `FrozenModel.forward_packed` does."""
        num_rows = len(batch.rows)
        if not (self._is_on and batch.is_step and batch.is_plain and num_rows <= SIZES[-1]):
            return self._model.forward_packed(batch)
        size = next(size for size in SIZES if size >= num_rows)
        table = SpanTable.of(batch)
        num_missing = size - num_rows
        if len(table.firsts) + num_missing * (table.row_spans[-1] - table.row_spans[-2]) > size * SPANS_PER_ROW:
            return self._model.forward_packed(batch)
        key = size, 1 << (table.num_splits - 1).bit_length()
        embeds = self._model.embed_rows(batch)
        graph = self._graphs.get(key)
        if graph is None:
            return self._first(key, batch, embeds, table)
        return graph.run(batch, embeds, table)

    def _first(self, key: tuple[int, int], batch: PackedBatch, embeds: torch.Tensor, table: SpanTable) -> torch.Tensor:
        """Record a graph for this and coming steps; the answer is the model's own."""
        expected = self._model.forward_packed(batch)
        try:
            graph = _Graph(self._model.forward, self._pool, *key, embeds)
            graph.fill(batch, embeds, table)
            graph.record(self._record)
            found = graph.run(batch, embeds, table)
            is_tried = _tried(found, expected)
        except Exception:  # whatever the device could not do: the model itself has been proven
            logger.warning("steps are no CUDA graphs: recording one of %d rows failed", key[0], exc_info=True)
            self._is_on = False
            self._graphs.clear()
        else:
            if is_tried:
                self._graphs[key] = graph
        return expected


def _tried(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether there was anything to compare: a hostile prompt's rows are of no number. Raises `RuntimeError`."""
    is_finite = expected.isfinite().all(1)
    found, expected = found[is_finite], expected[is_finite]
    if not len(expected):
        return False
    worst, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not worst <= _TOLERANCE * largest:
        raise RuntimeError(f"logits differ by {worst:.3g} of {largest:.3g}")
    return True


@dataclass(slots=True)
class _Room:
    """Where a graph's inputs lie."""

    embeds: torch.Tensor
    """`[size, hidden_size]`."""
    positions: torch.Tensor
    """`[size]`, int64, as are the slots."""
    slots: torch.Tensor
    index: torch.Tensor
    """`[size]`, int64: 0 to `size` - 1."""
    rows: torch.Tensor
    """`[2 * size + 1]`, int32: contexts, and where each row's spans begin and the last one's end."""
    spans: torch.Tensor
    """`[3, size * SPANS_PER_ROW]`, int32: firsts, counts, offsets."""


class _Graph:
    """A step of `size` rows of up to `num_splits` ranges of keys."""

    def __init__(self, forward: Forward, pool: KVPool, size: int, num_splits: int, like: torch.Tensor) -> None:
        """`like` is of the embeddings' dtype and width, on their device."""
        self._forward = forward
        self._size = size
        device = like.device
        index = torch.arange(size, device=device)
        self._room = _Room(
            torch.zeros(size, like.shape[1], dtype=like.dtype, device=device),
            torch.zeros_like(index),
            torch.zeros_like(index),
            index,
            torch.zeros(2 * size + 1, dtype=torch.int32, device=device),
            torch.zeros(3, size * SPANS_PER_ROW, dtype=torch.int32, device=device),
        )
        starts, lengths = index.to(torch.int32), torch.ones(size, dtype=torch.int32, device=device)
        columns = [starts, lengths, *self._room.rows.split([size, size + 1]), *self._room.spans.unbind()]
        self._attention = TritonAttention(pool, self._room.slots, [1] * size, columns, num_splits)

    def record(self, record: Record) -> None:
        """Record the step that was filled in."""
        self._replay, self._logits = record(self._step)

    def run(self, batch: PackedBatch, embeds: torch.Tensor, table: SpanTable) -> torch.Tensor:
        """Return the logits of a step, which nobody writes to again."""
        self.fill(batch, embeds, table)
        self._replay()
        return self._logits[: len(batch.rows)].clone()

    def fill(self, batch: PackedBatch, embeds: torch.Tensor, table: SpanTable) -> None:
        """Put a step's inputs where the graph reads them; the last row stands for those that are missing."""
        room, num_rows = self._room, len(batch.rows)
        which = room.index.clamp(max=num_rows - 1)
        for source, target in (
            (embeds, room.embeds),
            (batch.position_ids, room.positions),
            (batch.slot_mapping, room.slots),
        ):
            torch.index_select(source, 0, which, out=target)
        num_missing = self._size - num_rows
        last = slice(table.row_spans[-2], table.row_spans[-1])
        num_last = last.stop - last.start
        ends = [table.row_spans[-1] + num * num_last for num in range(1, num_missing + 1)]
        contexts = table.contexts + table.contexts[-1:] * num_missing
        room.rows.copy_(to_device(contexts + table.row_spans + ends, room.rows.device))
        for column, target in zip((table.firsts, table.counts, table.offsets), room.spans, strict=True):
            values = column + column[last] * num_missing
            target[: len(values)].copy_(to_device(values, target.device))

    def _step(self) -> torch.Tensor:
        room = self._room
        return self._forward(room.embeds, room.positions, room.index, self._attention)


class CudaRecorder:
    """Records CUDA graphs, which share the memory between their inputs and outputs: one runs at a time."""

    def __init__(self) -> None:
        self._memory: Any = None

    def __call__(self, run: Run) -> tuple[Callable[[], None], torch.Tensor]:
        """Run it twice beside everything else (kernels are compiled, libraries take their workspaces), then record."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            logits = run()
        self._memory = self._memory or graph.pool()
        return graph.replay, logits
