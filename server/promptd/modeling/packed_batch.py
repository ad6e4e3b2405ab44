"""One pass's tokens, end to end, and which keys each row of them may see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from promptd.modeling.kv_pool import KVPool
from promptd.modeling.shared_spans import Span
from promptd.modeling.transfer import to_device


@dataclass(frozen=True, slots=True)
class Virtual:
    """Input embeddings that stand for tokens of a row: a soft prompt."""

    offset: int
    embeds: torch.Tensor
    """`[num_tokens, hidden_size]`; they stand for the row's tokens from `offset` on."""

    def within(self, start: int, stop: int) -> Iterator[Virtual]:
        """Yield what of these stands in a row's tokens `[start, stop)`, counted from there; nothing where none does."""
        first, last = max(self.offset, start), min(self.offset + self.embeds.shape[0], stop)
        if first < last:
            yield Virtual(first - start, self.embeds[first - self.offset : last - self.offset])


@dataclass(slots=True)
class PackedRow:
    """Adjacent tokens of one sequence: they see all of `context`, then each other (left to right, or whole)."""

    token_ids: Sequence[int]
    """Anything where `virtual` embeddings stand."""
    first_position: int
    slots: Sequence[int]
    """Where the tokens' own keys and values go; for a source those that its readers see, if it has readers."""
    context: Sequence[Span]
    """Keys before these tokens, in order; may include slots that another row of this batch writes."""
    logits: Sequence[int] = ()
    """Offsets inside this row whose next-token logits are wanted, ascending."""
    virtual: Sequence[Virtual] = ()
    cross: Sequence[Span] = ()
    """Keys of the source that cross attention reads, in order."""


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """A single token of the packed batch, and all keys that it sees, its own among them."""

    token: int
    spans: list[Span]


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A row of several tokens: `[start, start + length)` of the packed batch."""

    start: int
    length: int
    context: Sequence[Span]

    @property
    def end(self) -> int:
        """Where the next row begins."""
        return self.start + self.length


class PackedBatch:
    """Rows packed into one `[1, num_tokens]` forward pass over a `KVPool`.

    `is_causal` rows are read left to right and store their keys and values; others are sources, read whole. What
    adjacent rows begin with, a prompt say, is read once for all of them, unless `shares_spans` is off:
    then only the kernel of single tokens does so, whose bits do not depend on it.
    """

    def __init__(
        self, rows: Sequence[PackedRow], pool: KVPool, *, is_causal: bool = True, shares_spans: bool = True
    ) -> None:
        self.pool = pool
        self.shares_spans = shares_spans
        self.rows = rows
        self.is_causal = is_causal
        self.is_plain = is_causal and not any(row.cross for row in rows)
        self.decode_rows: list[DecodeRow] = []
        self.prefill_rows: list[PrefillRow] = []
        self.row_starts: list[int] = []
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        logits: list[int] = []
        for row in rows:
            start, length = len(ids), len(row.token_ids)
            self.row_starts.append(start)
            ids.extend(row.token_ids)
            positions.extend(range(row.first_position, row.first_position + length))
            slots.extend(row.slots)
            logits.extend(start + offset for offset in row.logits)
            if not is_causal:
                continue
            if length == 1:
                self.decode_rows.append(DecodeRow(start, own_spans(row)))
            else:
                self.prefill_rows.append(PrefillRow(start, length, row.context))
        device = pool.keys.device
        self.num_tokens = len(ids)
        self.num_logits = len(logits)
        self.input_ids, self.position_ids = to_device([ids, positions], device, torch.int64)  # [num_tokens] each
        self.slot_mapping = to_device(slots, device, torch.int64)  # [num_slots]
        self.logits_index = to_device(logits, device, torch.int64)

    def put_tokens(self, places: Sequence[int], token_ids: torch.Tensor) -> None:
        """Put tokens `[len(places)]` that only the device knows yet where the rows have anything."""
        self.input_ids.index_copy_(0, to_device(places, self.input_ids.device, torch.int64), token_ids)

    @property
    def is_step(self) -> bool:
        """Whether it is of single tokens of texts that continue, each asked for what follows it."""
        return self.is_causal and 0 < self.num_tokens == self.num_logits == len(self.rows)


def own_spans(row: PackedRow) -> list[Span]:
    """Return the keys of a single token: its own slot usually continues the last span, and one span covers both."""
    spans, slot = list(row.context), row.slots[0]
    if spans and sum(spans[-1]) == slot:
        spans[-1] = (spans[-1][0], spans[-1][1] + 1)
    else:
        spans.append((slot, 1))
    return spans
