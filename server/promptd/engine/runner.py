"""A schedule to packed rows to answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from promptd.engine.request import ScoreRequest
from promptd.engine.schedule import Schedule, ScheduledLoad, ScheduledRow
from promptd.engine.sequence import Sequence
from promptd.modeling import FrozenModel, KVPool, PackedBatch, PackedRow, Span, Virtual
from promptd.modeling.transfer import to_device


@dataclass(slots=True)
class Answers:
    """What the model said in one step."""

    read: list[torch.Tensor]
    """What was read off each source that is an answer, in the order of the sources; fp32."""
    logits: torch.Tensor
    """`[num_logits, vocab_size]` in the order of the rows, fp32."""


@dataclass(slots=True)
class Made:
    """Tokens that a step has chosen, known on the device."""

    places: Mapping[Sequence, int]
    """Whoever gets one -> where it is in `tokens`."""
    tokens: torch.Tensor
    """`[len(places)]`, int64."""


class Runner:
    """Builds the packed batches of a step and runs the model over them: sources first, then what may read them."""

    def __init__(self, model: FrozenModel, pool: KVPool, block_size: int, *, strict: bool = False) -> None:
        """`strict` rows share no product over a prompt's keys: their bits do not depend on their neighbours."""
        self._model = model
        self._steps = model.steps_over(pool)
        self._strict = strict
        self._pool = pool
        self._block_size = block_size

    def run(self, step: Schedule, made: Made | None = None) -> Answers:
        """Run one step; loads want no answers. `made` has the tokens for which rows have only places yet."""
        read = self._read(step.sources)
        rows = [self._load(load) for load in step.loads]
        pending: list[tuple[int, Sequence]] = []  # packed rows whose last token is in `made`
        for row in step.rows:
            if row.is_final and row.seq.num_pending:
                pending.append((len(rows), row.seq))
            rows.append(self._row(row))
            rows += self._candidates(row)
        if not rows:
            return Answers(read, torch.empty(0, self._model.spec.vocab_size, device=self._model.device))
        batch = PackedBatch(rows, self._pool, shares_spans=not self._strict)
        if pending and made is not None:
            last = [batch.row_starts[number] + len(rows[number].token_ids) - 1 for number, _ in pending]
            index = to_device([made.places[seq] for _, seq in pending], made.tokens.device, torch.int64)
            batch.put_tokens(last, made.tokens.index_select(0, index))
        forward = self._steps or self._model.forward_packed
        return Answers(read, forward(batch).float())

    def _read(self, sources: list[Sequence]) -> list[torch.Tensor]:
        if not sources:
            return []
        rows = [
            PackedRow(
                token_ids=seq.source.token_ids,
                first_position=seq.source_position,
                slots=seq.source_slots(self._block_size),
                context=seq.bank("source"),
                virtual=seq.source.virtual,
            )
            for seq in sources
        ]
        hidden = self._model.read_sources(PackedBatch(rows, self._pool, is_causal=False))
        wanted = [(seq.readout, own) for seq, own in zip(sources, hidden, strict=True) if seq.readout is not None]
        with torch.no_grad():
            return [readout(own).float() for readout, own in wanted]

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
        embeds = segment.embeds
        return PackedRow(
            token_ids=segment.token_ids[start:stop] if embeds is None else [0] * (stop - start),
            first_position=entry.first_position + start,
            slots=entry.slots[start:stop],
            context=context,
            virtual=() if embeds is None else (Virtual(0, embeds[start:stop]),),
        )

    def _row(self, row: ScheduledRow) -> PackedRow:
        seq, start, stop = row.seq, row.start, row.start + row.num_tokens
        if seq.wants_prompt_logprobs and start < seq.num_target_tokens:
            logits: range | tuple[int, ...] = range(row.num_tokens)
        else:
            logits = (row.num_tokens - 1,) if row.is_final else ()
        return PackedRow(
            token_ids=seq.token_ids[start:stop],
            first_position=seq.first_position + start,
            slots=seq.slots(start, stop, self._block_size),
            context=seq.context(start, self._block_size),
            logits=logits,
            virtual=[part for virtual in seq.target_virtual for part in virtual.within(start, stop)],
            cross=seq.cross(self._block_size),
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
                        cross=seq.cross(size),
                    )
                )
                taken += count
        return rows
