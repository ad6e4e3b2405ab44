"""Beam search over the engine's own requests: each step asks for one more token of every beam of every input.

The rules are transformers' (`generate` with `early_stopping=False`): of the best continuations of all beams together,
those that end and are among the first `num_beams` are kept as answers, by their mean log-probability per token (to the
power of the length penalty); the best others go on, until none of them can be better than the worst answer kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from promptd.engine.request import MAX_LOGPROBS, SamplingParams, TokenLogprob
from promptd.errors import InvalidRequestError

if TYPE_CHECKING:
    from promptd.llm import LLM, Input, Prompt

Beam = tuple[float, tuple[int, ...]]
"""Sum of log-probabilities (nats), or an answer's score; tokens."""


@dataclass(slots=True)
class _Search:
    """One input's beams."""

    num_beams: int
    num_kept: int
    max_tokens: int
    length_penalty: float
    ends: frozenset[int]
    running: list[Beam] = field(default_factory=lambda: [(0.0, ())])
    answers: list[Beam] = field(default_factory=list)

    def advance(self, following: Sequence[TokenLogprob]) -> None:
        """Take the likeliest next tokens of every running beam."""
        continued = [
            (total + logprob, (*tokens, token_id))
            for (total, tokens), found in zip(self.running, following, strict=True)
            for token_id, logprob in found.top
        ]
        continued = sorted(continued, key=lambda beam: beam[0], reverse=True)[: self.num_kept]
        length = len(self.running[0][1]) + 1
        is_last = length == self.max_tokens
        ended = [is_last or tokens[-1] in self.ends for _, tokens in continued]
        scale = length**self.length_penalty
        first = zip(continued[: self.num_beams], ended, strict=False)
        self.answers += [(total / scale, tokens) for (total, tokens), has_ended in first if has_ended]
        self.answers = sorted(self.answers, key=lambda beam: beam[0], reverse=True)[: self.num_beams]
        open_beams = [beam for beam, has_ended in zip(continued, ended, strict=True) if not has_ended]
        self.running = open_beams[: self.num_beams]
        is_full = len(self.answers) == self.num_beams
        if self.running and is_full and self.running[0][0] / scale <= self.answers[-1][0]:
            self.running = []


def beam_search(
    llm: LLM,
    inputs: Sequence[Input],
    prompts: Sequence[Prompt | None],
    *,
    num_beams: int,
    max_tokens: int,
    length_penalty: float = 1.0,
) -> list[tuple[int, ...]]:
    """Return the best answer's tokens for each input under its prompt, its ending token and all.

    Raises `InvalidRequestError` for more beams than the engine tells alternatives for.
    """
    ends = llm.model.eos_token_ids
    num_kept = max(2, 1 + len(ends)) * num_beams
    if num_beams < 1 or num_kept > MAX_LOGPROBS:
        raise InvalidRequestError(
            f"num_beams must be from 1 to {MAX_LOGPROBS // max(2, 1 + len(ends))}, got {num_beams}", param="num_beams"
        )
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=num_kept)
    searches = [_Search(num_beams, num_kept, max_tokens, length_penalty, ends) for _ in inputs]
    while open_places := [place for place, search in enumerate(searches) if search.running]:
        asked = [(place, tokens) for place in open_places for _, tokens in searches[place].running]
        found = iter(
            llm.generate(
                [inputs[place] for place, _ in asked],
                [prompts[place] for place, _ in asked],
                params,
                [tokens for _, tokens in asked],
            )
        )
        for place in open_places:
            searches[place].advance([next(found).logprobs[0] for _ in searches[place].running])
    return [search.answers[0][1] for search in searches]
