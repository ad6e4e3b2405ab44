"""One request inside the engine: its tokens, its place in the K/V pool, its state. No torch."""

from __future__ import annotations

import enum
import time
from collections.abc import Hashable
from collections.abc import Sequence as Tokens
from typing import Any

from promptd.engine.detokenizer import Detokenizer
from promptd.engine.request import GenerateRequest, RequestTimings, ScoreRequest

Span = tuple[int, int]


class SequenceStatus(enum.Enum):
    """Where a sequence stands."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """A generation or a scoring in progress. `token_ids[:num_computed]` have their K/V in `blocks`."""

    def __init__(
        self,
        request: GenerateRequest | ScoreRequest,
        segments: Any,
        *,
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
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.status = SequenceStatus.WAITING
        self.chain: Tokens[Any] = ()
        self.first_position = 0
        self.num_computed = 0
        self.num_cached_tokens = 0
        self.blocks: list[int] = []
        self.prefix_node = 0
        self.num_registered_blocks = 0
        self.prompt_logprobs: list[Any] = []
        self.arrived = time.monotonic()
        self.scheduled: float | None = None
        self.first_token: float | None = None
        limit = request.deadline_seconds
        self.deadline = None if limit is None else self.arrived + limit

    @property
    def is_score(self) -> bool:
        """Whether this is a `ScoreRequest`."""
        return isinstance(self.request, ScoreRequest)

    @property
    def num_candidate_tokens(self) -> int:
        """Tokens of the candidates that run in the scoring step (each but its last)."""
        if isinstance(self.request, ScoreRequest):
            return sum(len(candidate) - 1 for candidate in self.request.candidates)
        return 0

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
        """Whether all but the newest token have their K/V."""
        return self.num_uncomputed == 1 and self.num_computed >= self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """Tokens made so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_expected_tokens(self) -> int:
        """Text tokens when this sequence has run to its limit."""
        if isinstance(self.request, GenerateRequest):
            return self.num_prompt_tokens + self.request.params.max_tokens
        return self.num_prompt_tokens

    def slots(self, start: int, stop: int, block_size: int) -> list[int]:
        """Slots of text tokens `start..stop`."""
        blocks = self.blocks
        return [blocks[i // block_size] * block_size + i % block_size for i in range(start, stop)]

    def context(self, num_tokens: int, block_size: int) -> list[Span]:
        """Spans of the chain and of the first `num_tokens` text tokens, adjacent ones joined."""
        spans = [span for entry in self.chain for span in entry.spans]
        start, length, last = -1, 0, -2
        left = num_tokens
        for block in self.blocks:
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

    def timings(self, finished: float | None = None) -> RequestTimings:
        """When this sequence arrived, ran first, made its first token, ended."""
        return RequestTimings(self.arrived, self.scheduled, self.first_token, finished)
