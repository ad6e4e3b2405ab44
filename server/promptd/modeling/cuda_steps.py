"""Decode steps on CUDA, each one launch: recorded as a CUDA graph for a number of rows, replayed for as many or fewer.

A step of single tokens is hundreds of small kernels, and the CPU takes longer to launch them than the device to run
them. A graph launches them all at once, over tensors that stay where they are: a step's inputs are copied there, rows
that are missing repeat the last one (they write the same keys and values to the same slots), and one table of spans
says what each row sees. Graphs are recorded when they are first needed, and tried: a graph must give what the same
operations give one by one, and that what the model gives for the step by itself. Where it does not, steps of its size
stay the model's own; where none can be recorded, all do.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from promptd.modeling.attention_triton import SpanTable, TritonAttention
from promptd.modeling.kv_pool import KVPool
from promptd.modeling.packed_batch import PackedBatch
from promptd.modeling.step_graph import Read
from promptd.modeling.transfer import to_device

if TYPE_CHECKING:
    from promptd.modeling.frozen import FrozenModel

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, *range(16, 257, 8))
"""Numbers of rows that a graph is recorded for; steps of more are the model's own."""
SPANS_PER_ROW = 128
"""Room for so many in the mean: the slots of a text are side by side as far as they can be."""
_SAME, _ALIKE = 1e-3, 0.1
"""Of a row's largest logit: what a replay may differ from its operations, and these, for rows that are missing too,
from the model's own step. Products over other numbers of rows round otherwise."""

_one_recording = threading.Lock()
"""Recordings of two engines of a process may not overlap."""
Run = Callable[[], None]
Record = Callable[[Run], Run]
"""Takes what computes a step into fixed places; returns what does so again without Python."""


class CudaSteps:
    """The steps of one model over one K/V pool."""

    def __init__(self, model: FrozenModel, pool: KVPool, record: Record | None = None) -> None:
        """`record` is for tests alone: they have no device."""
        self._model = model
        self._pool = pool
        self._record = record or CudaRecorder()
        self._graphs: dict[tuple[int, int], _Graph | None] = {}
        """By rows and ranges of keys; None where a graph was not right."""
        self._logits: torch.Tensor | None = None
        """`[SIZES[-1], vocab_size]`: where all graphs write their answers."""
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
        if key not in self._graphs:
            return self._first(key, batch, table)
        graph = self._graphs[key]
        if graph is None:
            return self._model.forward_packed(batch)
        return graph.run(batch, self._model.embed_rows(batch), table)

    def _first(self, key: tuple[int, int], batch: PackedBatch, table: SpanTable) -> torch.Tensor:
        """Record a graph for coming steps; the answer, and the keys and values that stay, are the model's own."""
        expected = self._model.forward_packed(batch)
        if not expected.isfinite().all():  # a hostile prompt's: nothing to compare with
            return expected
        if self._logits is None:
            self._logits = expected.new_empty(SIZES[-1], expected.shape[1])
        try:
            embeds = self._model.embed_rows(batch)
            graph = _Graph(self._model.forward, self._pool, *key, embeds, self._logits[: key[0]])
            graph.fill(batch, embeds, table)
            graph.step()
            alike = self._logits[: len(expected)].clone()
            with _one_recording:
                graph.record(self._record)
            same = graph.run(batch, embeds, table)
            is_right = _is_close(same, alike, _SAME) and _is_close(alike, expected, _ALIKE)
            self._graphs[key] = graph if is_right else None
            if not is_right:
                logger.warning("steps of %d rows are no CUDA graph: one gave other logits than the model", key[0])
        except Exception:  # whatever the device could not do: the model itself has been proven
            logger.warning("steps are no CUDA graphs: recording one of %d rows failed", key[0], exc_info=True)
            self._is_on = False
            self._graphs.clear()
        return self._model.forward_packed(batch)


def _is_close(found: torch.Tensor, expected: torch.Tensor, share: float) -> bool:
    allowed = share * expected.abs().amax(1, keepdim=True)
    return bool(((found - expected).abs() <= allowed).all())


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

    def __init__(
        self, forward: Read, pool: KVPool, size: int, num_splits: int, like: torch.Tensor, logits: torch.Tensor
    ) -> None:
        """`like` is of the embeddings' dtype and width, on their device; `logits` `[size, vocab_size]` are its own."""
        self._forward = forward
        self._logits = logits
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
        self._replay = record(self.step)

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

    def step(self) -> None:
        """Run what was filled in, operation by operation."""
        room = self._room
        self._logits.copy_(self._forward(room.embeds, room.positions, room.index, self._attention))


class CudaRecorder:
    """Records CUDA graphs, which share the memory between their inputs and outputs: one runs at a time."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._memory: Any = None

    def __call__(self, run: Run) -> Run:
        """Run it beside everything else (kernels are compiled, libraries take their workspaces), then record.

        What waits for the device is found before the recording begins: torch does not get over one that breaks off.
        """
        before, mode = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
        try:
            self._stream.wait_stream(before)
            with torch.cuda.stream(self._stream):
                run()
                torch.cuda.set_sync_debug_mode("error")
                run()
                torch.cuda.set_sync_debug_mode(mode)
            before.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
                run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.set_stream(before)
        self._memory = self._memory or graph.pool()
        return graph.replay
