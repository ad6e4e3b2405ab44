"""A schedule to packed rows to logits."""

from __future__ import annotations

import torch

from promptd.engine.request import ScoreRequest
from promptd.engine.scheduler import Schedule, ScheduledLoad, ScheduledRow
from promptd.modeling import FrozenModel, KVPool, PackedBatch, PackedRow, Span


class Runner:
    """Builds the packed batch of a step and runs the model over it."""

    def __init__(self, model: FrozenModel, pool: KVPool, block_size: int) -> None:
        self._model = model
        self._pool = pool
        self._block_size = block_size

    def run(self, step: Schedule) -> torch.Tensor:
        """Return logits `[num_logits, vocab_size]` in the order of the rows, fp32; loads want none."""
        rows = [self._load(load) for load in step.loads]
        for row in step.rows:
            rows.append(self._row(row))
            rows += self._candidates(row)
        return self._model.forward_packed(PackedBatch(rows, self._pool)).float()

    def _load(self, load: ScheduledLoad) -> PackedRow:
        entry = load.entry
        start, stop = load.start, load.start + load.num_tokens
        context: list[Span] = []
        parent = entry.parent
        while parent is not None:
            context[:0] = parent.spans
            parent = parent.parent
        left = start
        for first, length in entry.spans:
            if left > 0:
                context.append((first, min(left, length)))
                left -= length
        segment = entry.segment
        return PackedRow(
            token_ids=segment.token_ids[start:stop],
            first_position=entry.first_position + start,
            slots=entry.slots[start:stop],
            context=context,
            embeds=None if segment.embeds is None else segment.embeds[start:stop],
        )

    def _row(self, row: ScheduledRow) -> PackedRow:
        seq, start, stop = row.seq, row.start, row.start + row.num_tokens
        if seq.wants_prompt_logprobs and start < seq.num_prompt_tokens:
            logits: range | tuple[int, ...] = range(row.num_tokens)
        else:
            logits = (row.num_tokens - 1,) if row.is_final else ()
        return PackedRow(
            token_ids=seq.token_ids[start:stop],
            first_position=seq.first_position + start,
            slots=seq.slots(start, stop, self._block_size),
            context=seq.context(start, self._block_size),
            logits=logits,
        )

    def _candidates(self, row: ScheduledRow) -> list[PackedRow]:
        """Rows that continue the text with all but the last token of each candidate, beside one another."""
        request = row.seq.request
        if not isinstance(request, ScoreRequest) or not row.is_final:
            return []
        size, seq = self._block_size, row.seq
        slots = [block * size + offset for block in row.candidate_blocks for offset in range(size)]
        context = seq.context(len(seq.token_ids), size)
        rows, taken = [], 0
        for candidate in request.candidates:
            count = len(candidate) - 1
            if count:
                rows.append(
                    PackedRow(
                        token_ids=candidate[:-1],
                        first_position=seq.first_position + len(seq.token_ids),
                        slots=slots[taken : taken + count],
                        context=context,
                        logits=range(count),
                    )
                )
                taken += count
        return rows
