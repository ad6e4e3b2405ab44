"""One request inside the engine: its tokens, its place in the K/V pool, its state. No torch."""

from __future__ import annotations

import enum
import time
from collections.abc import Hashable
from collections.abc import Sequence as Tokens
from typing import Any

from promptd.engine.detokenizer import Detokenizer
from promptd.engine.request import GenerateRequest, Request, RequestTimings, ScoreRequest

Span = tuple[int, int]


class SequenceStatus(enum.Enum):
    """Where a sequence stands."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """One request in progress. `token_ids`, its target, is read left to right; `token_ids[:num_computed]` have their
    K/V in `blocks`, or will have once the steps that were begun have run. Of its last `num_pending` tokens only the
    places are known, until the steps that make them have landed. Its first `num_target_virtual` stand for soft prompts,
    `target_virtual`. Its source, where it has one, is read whole first; what the target sees of it is in
    `source_blocks`."""

    def __init__(
        self,
        request: Request,
        segments: Any,
        target_ids: Tokens[int],
        *,
        target_virtual: Tokens[Any] = (),
        num_target_virtual: int = 0,
        source: Any = None,
        readout: Any = None,
        num_virtual_tokens: int,
        prefix_key: Hashable,
        detokenizer: Detokenizer | None,
        seed: int,
    ) -> None:
        self.request = request
        self.segments = segments
        self.num_virtual_tokens = num_virtual_tokens
        self.prefix_key = prefix_key
        self.detokenizer = detokenizer
        self.seed = seed
        self.token_ids = list(target_ids)
        self.num_target_tokens = len(self.token_ids)
        self.target_virtual = target_virtual
        self.num_target_virtual = num_target_virtual
        self.source = source
        self.readout = readout
        self.source_blocks: list[int] = []
        self.is_source_read = source is None
        self.status = SequenceStatus.WAITING
        self.chain: Tokens[Any] = ()
        self.num_computed = 0
        self.num_pending = 0
        self.num_cached_tokens = 0
        self.blocks: list[int] = []
        self.prefix_node = 0
        self.num_registered_blocks = 0
        self.prompt_logprobs: list[Any] = []
        self.arrived = time.monotonic()
        self.scheduled: float | None = None
        self.reading: float | None = None
        self.first_token: float | None = None
        limit = request.deadline_seconds
        self.deadline = None if limit is None else self.arrived + limit

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the text that was asked about."""
        return len(self.request.prompt_token_ids)

    @property
    def num_source_tokens(self) -> int:
        """Tokens that are still to be read whole."""
        return 0 if self.is_source_read else len(self.source.token_ids)

    @property
    def num_kept_tokens(self) -> int:
        """Tokens of the source whose keys the target will read."""
        return len(self.source.token_ids) if self.source is not None and self.source.is_kept else 0

    @property
    def first_position(self) -> int:
        """Position of the target's first token."""
        return self.chain[-1].next_position if self.chain else 0

    @property
    def source_position(self) -> int:
        """Position of the source's first token: behind the prompts that it sees."""
        return sum(entry.segment.num_positions for entry in self.chain if "source" in entry.banks)

    @property
    def num_candidate_tokens(self) -> int:
        """Tokens of the candidates that run in the scoring step (each but its last)."""
        if isinstance(self.request, ScoreRequest) and self.readout is None:
            return sum(len(candidate) - 1 for candidate in self.request.candidates)
        return 0

    @property
    def is_generation(self) -> bool:
        """Whether it makes tokens."""
        return isinstance(self.request, GenerateRequest)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether logits of every text token are needed, so that none may come from the cache."""
        return isinstance(self.request, GenerateRequest) and self.request.params.prompt_logprobs is not None

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose K/V is still to be made."""
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether all but the newest token have their K/V, and so has everything that it reads beside them.

        A row that was preempted may find its own blocks again before its prompts and its source are back.
        """
        is_last = self.num_uncomputed == 1 and self.num_computed >= self.num_target_tokens
        return is_last and self.is_source_read and (not self.chain or self.chain[-1].is_whole)

    @property
    def num_known(self) -> int:
        """Tokens that are more than a place."""
        return len(self.token_ids) - self.num_pending

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is left to be run: it ends when what was begun has landed."""
        if self.num_pending:
            return len(self.token_ids) >= self.num_expected_tokens
        return self.is_source_read and not self.num_uncomputed

    def begin_token(self) -> None:
        """Take a place for a token that a step is making."""
        self.token_ids.append(0)
        self.num_pending += 1

    def settle_token(self, token_id: int) -> None:
        """Put the oldest token that was made in its place."""
        self.token_ids[self.num_known] = token_id
        self.num_pending -= 1

    @property
    def output_token_ids(self) -> list[int]:
        """Tokens made so far."""
        return self.token_ids[self.num_target_tokens :]

    @property
    def num_expected_tokens(self) -> int:
        """Tokens of the target when this sequence has run to its limit."""
        if isinstance(self.request, GenerateRequest):
            return self.num_target_tokens + self.request.params.max_tokens
        return self.num_target_tokens

    def num_blocks(self, block_size: int) -> int:
        """Blocks that its tokens so far and the next one take."""
        return -(-(len(self.token_ids) + 1) // block_size) + -(-self.num_kept_tokens // block_size)

    def slots(self, start: int, stop: int, block_size: int) -> list[int]:
        """Slots of the target's tokens `start..stop`."""
        return _slots(self.blocks, start, stop, block_size)

    def source_slots(self, block_size: int) -> list[int]:
        """Slots of what the target will read of the source."""
        return _slots(self.source_blocks, 0, self.num_kept_tokens, block_size)

    def context(self, num_tokens: int, block_size: int) -> list[Span]:
        """Spans of the chain and of the target's first `num_tokens` tokens, adjacent ones joined."""
        return [*self.bank("target"), *_spans(self.blocks, num_tokens, block_size)]

    def cross(self, block_size: int) -> list[Span]:
        """Spans of what the target reads of the source: learned keys, then the source's."""
        return [*self.bank("cross"), *_spans(self.source_blocks, self.num_kept_tokens, block_size)]

    def bank(self, name: str) -> list[Span]:
        """Spans of the chain in one bank."""
        return [span for entry in self.chain for span in entry.banks.get(name, ())]

    def timings(self, finished: float | None = None) -> RequestTimings:
        """When this sequence arrived, ran first, made its first token, ended."""
        return RequestTimings(self.arrived, self.scheduled, self.reading, self.first_token, finished)


def _slots(blocks: Tokens[int], start: int, stop: int, block_size: int) -> list[int]:
    return [blocks[i // block_size] * block_size + i % block_size for i in range(start, stop)]


def _spans(blocks: Tokens[int], num_tokens: int, block_size: int) -> list[Span]:
    """Spans of the first `num_tokens` slots of some blocks, adjacent ones joined."""
    spans: list[Span] = []
    start, length, last = -1, 0, -2
    left = num_tokens
    for block in blocks:
        if left <= 0:
            break
        if block != last + 1:
            if length:
                spans.append((start, length))
            start, length = block * block_size, 0
        take = min(left, block_size)
        length += take
        left -= take
        last = block
    if length:
        spans.append((start, length))
    return spans
