"""Logits to answers: what each row of a step adds to its request."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import TypedDict

import torch

from promptd.engine.logprobs import by_candidate, judged, scores, token_logprob, top_logprobs
from promptd.engine.request import (
    FinishReason,
    GenerateRequest,
    Output,
    PoolOutput,
    PoolRequest,
    RequestOutput,
    SamplingParams,
    ScoreOutput,
    ScoreRequest,
    TokenLogprob,
)
from promptd.engine.runner import Answers, Made
from promptd.engine.sampler import SamplingRow, sample
from promptd.engine.schedule import Schedule, ScheduledRow
from promptd.engine.sequence import Sequence, SequenceStatus
from promptd.engine.stats import EngineCounters
from promptd.errors import NumericalError, PromptdError
from promptd.modeling import FrozenModel
from promptd.modeling.transfer import Fetched, to_device


@dataclass(slots=True)
class Picked:
    """What a step found, on its way from the device."""

    rows: Rows[ScheduledRow]
    read: Rows[tuple[Sequence, Fetched]]
    """What was read off sources that are answers themselves."""
    logits: torch.Tensor
    """`[num_logits, vocab_size]`, in the order of the rows; those of rows that draw may have been changed."""
    made: Made
    scored: Mapping[Sequence, Fetched]
    """Candidates' log-probabilities, of those who score."""
    logprobs: Fetched | None
    """`logprobs.judged` of the tokens whose rows want to know, in their order."""
    numbers: Fetched
    """For each row of logits whether it is finite, then the tokens."""

    @property
    def may_wait(self) -> bool:
        """Whether the next step may be planned before this one is known.

        Not where it reads a text whose tokens are all judged: a row that is preempted reads that again, from the start.
        And not where sources are read for their own sake: that looks at numbers itself.
        """
        return not self.read and not any(_judges_text(row) for row in self.rows)


class Emitter:
    """Samples, detokenizes, decides what ends."""

    def __init__(self, model: FrozenModel, counters: EngineCounters) -> None:
        self._eos = model.eos_token_ids
        self._counters = counters

    def pick(self, step: Schedule, answers: Answers) -> Picked:
        """Choose the tokens of a step on the device, without waiting for it; each maker has a place for its own."""
        logits, finite = answers.logits, torch.isfinite(answers.logits.sum(-1))
        makers: dict[Sequence, int] = {}  # -> the last of its rows of logits
        scored: dict[Sequence, Fetched] = {}
        at = 0
        for row in step.rows:
            request, first, at = row.seq.request, at, at + _num_logits(row)
            if row.is_final and isinstance(request, GenerateRequest):
                makers[row.seq] = at - 1
            elif row.is_final and isinstance(request, ScoreRequest):
                scored[row.seq] = Fetched(scores(request, logits[first:at]))
        tokens, logprobs = finite.new_empty(0, dtype=torch.int64), None
        if makers:
            index = to_device([*makers.values()], logits.device, torch.int64)
            chosen = logits if len(makers) == len(logits) else logits.index_select(0, index)
            sampling = [_sampling_row(seq, self._eos) for seq in makers]
            wanted = {
                place: row.params.logprobs for place, row in enumerate(sampling) if row.params.logprobs is not None
            }
            if wanted:  # before penalties and temperature
                which = to_device([*wanted], logits.device, torch.int64)
                raw = torch.log_softmax(chosen.index_select(0, which), -1)
            tokens = sample(chosen, sampling)
            if wanted:
                logprobs = Fetched(judged(raw, tokens.index_select(0, which), max(wanted.values())))
        for seq in makers:
            seq.begin_token()
        made = Made({seq: place for place, seq in enumerate(makers)}, tokens)
        readers = [seq for seq in step.sources if seq.readout is not None]
        read = [(seq, Fetched(found)) for seq, found in zip(readers, answers.read, strict=True)]
        return Picked(step.rows, read, logits, made, scored, logprobs, Fetched(torch.cat([finite.long(), tokens])))

    def emit(self, picked: Picked) -> list[Output]:
        """Wait for what a step found, and tell; of rows that ended meanwhile nothing."""
        outputs = self._emit_read(picked.read)
        numbers = picked.numbers.read()
        logprobs = iter(() if picked.logprobs is None else picked.logprobs.read())
        at, now = 0, time.monotonic()
        for row in picked.rows:
            seq, request = row.seq, row.seq.request
            own = slice(at, at + _num_logits(row))
            at = own.stop
            params = request.params if row.is_final and isinstance(request, GenerateRequest) else None
            own_logprobs = next(logprobs) if params is not None and params.logprobs is not None else None
            if own.start == own.stop or seq.status is SequenceStatus.FINISHED:
                continue
            if not all(numbers[own]):
                self._counters.numerical_errors += 1
                outputs.append(self.failure(seq, NumericalError("the model's logits for this row are not finite")))
            elif isinstance(request, ScoreRequest):
                self._note_first(seq, now)
                each = by_candidate(request, picked.scored[seq].read())
                outputs.append(_scored(seq, request, each, now))
            else:
                if _judges_text(row):
                    _note_prompt_logprobs(seq, row, picked.logits[own])
                if params is not None:
                    token, logprob = numbers[len(picked.logits) + picked.made.places[seq]], None
                    if own_logprobs is not None:
                        logprob = token_logprob(token, own_logprobs, params.logprobs or 0)
                    outputs.append(self._extend(seq, params, token, logprob, now))
        return outputs

    def _emit_read(self, read: Rows[tuple[Sequence, Fetched]]) -> list[Output]:
        """Hand out what was read off the sources that are answers themselves."""
        now = time.monotonic()
        outputs: list[Output] = []
        for seq, found in read:
            if seq.status is SequenceStatus.FINISHED:
                continue
            self._note_first(seq, now)
            values = tuple(found.read())
            if not all(map(math.isfinite, values)):
                self._counters.numerical_errors += 1
                outputs.append(self.failure(seq, NumericalError("the model's numbers for this text are not finite")))
            elif isinstance(seq.request, ScoreRequest):
                outputs.append(_scored(seq, seq.request, tuple((value,) for value in values), now))
            else:
                outputs.append(PoolOutput(seq.request.request_id, values, timings=seq.timings(now), **_counts(seq)))
        return outputs

    def failure(self, seq: Sequence, error: PromptdError) -> Output:
        """The last answer of a request that failed."""
        kinds = {ScoreRequest: ScoreOutput, PoolRequest: PoolOutput}
        kind: type[Output] = kinds.get(type(seq.request), RequestOutput)
        return kind(seq.request.request_id, error=error, timings=seq.timings(time.monotonic()), **_counts(seq))

    def _extend(
        self, seq: Sequence, params: SamplingParams, token: int, logprob: TokenLogprob | None, now: float
    ) -> RequestOutput:
        """Give a generation the token that it has a place for, and tell what became certain."""
        counts = _counts(seq)
        prompt_logprobs = _take_prompt_logprobs(seq)
        self._note_first(seq, now)
        if params.max_tokens == 0:  # only the text's own log-probabilities were asked for
            return RequestOutput(
                seq.request.request_id,
                prompt_logprobs=prompt_logprobs,
                finish_reason=FinishReason.LENGTH,
                timings=seq.timings(now),
                **counts,
            )
        seq.settle_token(token)
        self._counters.generation_tokens += 1
        reason, stop_reason, is_hidden = self._finish_of(seq, params, token)
        detokenizer = seq.detokenizer
        text = ""
        if detokenizer is not None:
            may_stop = seq.num_known - seq.num_target_tokens >= params.min_tokens
            stopped = None if is_hidden else detokenizer.push(token, may_stop=may_stop)
            if stopped is not None:
                reason, stop_reason = FinishReason.STOP, stopped
                detokenizer.drop_unread()
            text = detokenizer.take(is_last=reason is not None)
        return RequestOutput(
            seq.request.request_id,
            text=text,
            token_ids=(token,),
            logprobs=(logprob,) if logprob is not None else (),
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            timings=seq.timings(now) if reason is not None else None,
            sampled=now,
            **counts,
        )

    def _note_first(self, seq: Sequence, now: float) -> None:
        if seq.first_token is None:
            seq.first_token = now
            self._counters.prompt_tokens += seq.num_prompt_tokens
            self._counters.cached_tokens += seq.num_cached_tokens

    def _finish_of(
        self, seq: Sequence, params: SamplingParams, token: int
    ) -> tuple[FinishReason | None, str | int | None, bool]:
        """Return (reason, what stopped it, whether the token stays out of the text)."""
        num_output = seq.num_known - seq.num_target_tokens
        if num_output >= params.min_tokens:
            if token in params.stop_token_ids:
                return FinishReason.STOP, token, True
            if token in self._eos and not params.ignore_eos:
                return FinishReason.STOP, None, True
        if num_output >= params.max_tokens:
            return FinishReason.LENGTH, None, False
        return None, None, False


def _sampling_row(seq: Sequence, eos: frozenset[int]) -> SamplingRow:
    params: SamplingParams = seq.request.params  # type: ignore[union-attr]
    target = seq.token_ids[seq.num_target_virtual : seq.num_target_tokens] if params.looks_back else ()
    return SamplingRow(params, seq.seed, target, seq.output_token_ids, eos)


def _num_logits(row: ScheduledRow) -> int:
    """How many logits rows `runner` asked for on behalf of this row."""
    if _judges_text(row):
        return row.num_tokens
    return 1 + row.seq.num_candidate_tokens if row.is_final else 0


def _judges_text(row: ScheduledRow) -> bool:
    """Whether log-probabilities of the text's own tokens are wanted, and it is being read."""
    return row.seq.wants_prompt_logprobs and row.start < row.seq.num_target_tokens


class _Counts(TypedDict):
    num_prompt_tokens: int
    num_virtual_tokens: int
    num_cached_tokens: int


def _counts(seq: Sequence) -> _Counts:
    return {
        "num_prompt_tokens": seq.num_prompt_tokens,
        "num_virtual_tokens": seq.num_virtual_tokens,
        "num_cached_tokens": seq.num_cached_tokens,
    }


def _scored(seq: Sequence, request: ScoreRequest, per_token: tuple[tuple[float, ...], ...], now: float) -> ScoreOutput:
    """Add up each candidate's log-probabilities."""
    return ScoreOutput(
        request.request_id,
        logprobs=tuple(map(sum, per_token)),
        token_logprobs=per_token,
        timings=seq.timings(now),
        **_counts(seq),
    )


def _note_prompt_logprobs(seq: Sequence, row: ScheduledRow, logits: torch.Tensor) -> None:
    """Keep the log-probabilities of the text tokens that follow this chunk's tokens."""
    following = seq.token_ids[row.start + 1 : min(row.start + row.num_tokens + 1, seq.num_target_tokens)]
    if following and isinstance(seq.request, GenerateRequest):
        logprobs = torch.log_softmax(logits[: len(following)], -1)
        seq.prompt_logprobs += top_logprobs(logprobs, following, seq.request.params.prompt_logprobs or 0)


def _take_prompt_logprobs(seq: Sequence) -> tuple[TokenLogprob | None, ...] | None:
    if not seq.wants_prompt_logprobs or seq.first_token is not None:
        return None
    return (None, *seq.prompt_logprobs)
