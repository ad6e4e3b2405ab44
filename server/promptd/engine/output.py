"""Logits to answers: what each row of a step adds to its request."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as Rows
from typing import TypedDict

import torch

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
from promptd.engine.sampler import SamplingRow, sample, top_logprobs
from promptd.engine.schedule import ScheduledRow
from promptd.engine.sequence import Sequence
from promptd.engine.stats import EngineCounters
from promptd.errors import NumericalError, PromptdError
from promptd.modeling import FrozenModel


class Emitter:
    """Samples, detokenizes, decides what ends."""

    def __init__(self, model: FrozenModel, counters: EngineCounters) -> None:
        self._eos = model.eos_token_ids
        self._counters = counters

    def emit(self, rows: Rows[ScheduledRow], logits: torch.Tensor) -> list[Output]:
        """Consume logits `[num_logits, vocab_size]`, in the order of the rows."""
        outputs: list[Output] = []
        sampled: list[tuple[Sequence, int]] = []  # (sequence, its row of logits)
        finite = torch.isfinite(logits.sum(-1)).tolist() if len(logits) else []
        at = 0
        for row in rows:
            seq = row.seq
            count = _num_logits(row)
            own = slice(at, at + count)
            at += count
            if not count:
                continue
            if not all(finite[own]):
                self._counters.numerical_errors += 1
                outputs.append(self.failure(seq, NumericalError("the model's logits for this row are not finite")))
            elif isinstance(seq.request, ScoreRequest):
                self._note_first(seq, time.monotonic())
                outputs.append(_scored(seq, seq.request, logits[own]))
            else:
                if seq.wants_prompt_logprobs and row.start < seq.num_target_tokens:
                    _note_prompt_logprobs(seq, row, logits[own])
                if row.is_final:
                    sampled.append((seq, at - 1))
        if sampled:
            outputs += self._sample(sampled, logits)
        return outputs

    def emit_read(self, sources: Rows[Sequence], read: Rows[torch.Tensor]) -> list[Output]:
        """Hand out what was read off the sources that are answers themselves."""
        now = time.monotonic()
        outputs: list[Output] = []
        for seq, found in zip([seq for seq in sources if seq.readout is not None], read, strict=True):
            self._note_first(seq, now)
            values = tuple(found.tolist())
            if not all(map(math.isfinite, values)):
                self._counters.numerical_errors += 1
                outputs.append(self.failure(seq, NumericalError("the model's numbers for this text are not finite")))
            elif isinstance(seq.request, ScoreRequest):
                each = tuple((value,) for value in values)
                request_id = seq.request.request_id
                outputs.append(ScoreOutput(request_id, values, each, timings=seq.timings(now), **_counts(seq)))
            else:
                outputs.append(PoolOutput(seq.request.request_id, values, timings=seq.timings(now), **_counts(seq)))
        return outputs

    def failure(self, seq: Sequence, error: PromptdError) -> Output:
        """The last answer of a request that failed."""
        kinds = {ScoreRequest: ScoreOutput, PoolRequest: PoolOutput}
        kind: type[Output] = kinds.get(type(seq.request), RequestOutput)
        return kind(seq.request.request_id, error=error, timings=seq.timings(time.monotonic()), **_counts(seq))

    def _sample(self, sampled: list[tuple[Sequence, int]], logits: torch.Tensor) -> list[Output]:
        index = [at for _, at in sampled]
        chosen = logits if len(index) == len(logits) else logits[index]
        rows, params = [], []
        for seq, _ in sampled:
            own: SamplingParams = seq.request.params  # type: ignore[union-attr]
            params.append(own)
            target = tuple(seq.token_ids[seq.num_target_virtual : seq.num_target_tokens])
            rows.append(SamplingRow(own, seq.seed, target, seq.output_token_ids, self._eos))
        wanted = [number for number, own in enumerate(params) if own.logprobs is not None]
        raw = torch.log_softmax(chosen[wanted], -1) if wanted else None  # before penalties and temperature
        tokens = sample(chosen, rows)
        logprobs: dict[int, TokenLogprob] = {}
        if raw is not None:
            for place, number in enumerate(wanted):
                (logprobs[number],) = top_logprobs(
                    raw[place : place + 1], [tokens[number]], params[number].logprobs or 0
                )
        now = time.monotonic()
        return [
            self._extend(seq, params[number], tokens[number], logprobs.get(number), now)
            for number, (seq, _) in enumerate(sampled)
        ]

    def _extend(
        self, seq: Sequence, params: SamplingParams, token: int, logprob: TokenLogprob | None, now: float
    ) -> RequestOutput:
        """Append one token to a generation and tell what became certain."""
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
        seq.token_ids.append(token)
        self._counters.generation_tokens += 1
        reason, stop_reason, is_hidden = self._finish_of(seq, params, token)
        detokenizer = seq.detokenizer
        text = ""
        if detokenizer is not None:
            may_stop = len(seq.token_ids) - seq.num_target_tokens >= params.min_tokens
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
        num_output = len(seq.token_ids) - seq.num_target_tokens
        if num_output >= params.min_tokens:
            if token in params.stop_token_ids:
                return FinishReason.STOP, token, True
            if token in self._eos and not params.ignore_eos:
                return FinishReason.STOP, None, True
        if num_output >= params.max_tokens:
            return FinishReason.LENGTH, None, False
        return None, None, False


def _num_logits(row: ScheduledRow) -> int:
    """How many logits rows `runner` asked for on behalf of this row."""
    seq = row.seq
    if seq.wants_prompt_logprobs and row.start < seq.num_target_tokens:
        return row.num_tokens
    return 1 + seq.num_candidate_tokens if row.is_final else 0


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


def _scored(seq: Sequence, request: ScoreRequest, logits: torch.Tensor) -> ScoreOutput:
    """Add up each candidate's log-probabilities; row 0 of `logits` is the text's last token."""
    logprobs = torch.log_softmax(logits, -1)
    rows: list[int] = []
    tokens: list[int] = []
    at = 1
    for candidate in request.candidates:
        rows += [0, *range(at, at + len(candidate) - 1)]
        tokens += candidate
        at += len(candidate) - 1
    flat = logprobs[rows, tokens].tolist()
    per_token: list[tuple[float, ...]] = []
    for candidate in request.candidates:
        per_token.append(tuple(flat[: len(candidate)]))
        del flat[: len(candidate)]
    return ScoreOutput(
        request.request_id,
        logprobs=tuple(sum(values) for values in per_token),
        token_logprobs=tuple(per_token),
        timings=seq.timings(time.monotonic()),
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
