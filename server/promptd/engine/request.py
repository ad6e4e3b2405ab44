"""What the engine is asked and what it answers: plain dataclasses, no torch.

Three kinds of request exist: continue a text (`GenerateRequest`), tell how likely some words are in it
(`ScoreRequest`), read numbers off it (`PoolRequest`: classes or an embedding). Everything else is built from these.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from promptd.engine.share import EVERYBODY, Share
from promptd.errors import InvalidRequestError, PromptdError

if TYPE_CHECKING:
    from promptd_store import PromptArtifact

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 4


class FinishReason(enum.StrEnum):
    """Why a generation ended without an error."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one row picks its tokens. `temperature == 0` is greedy; `top_k == 0` is off; checked on creation."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Log-probabilities of the sampled token and of this many alternatives; None for none, 0..20."""
    prompt_logprobs: int | None = None
    """The same for the text prompt's own tokens (`echo` with `logprobs`)."""

    @property
    def looks_back(self) -> bool:
        """Whether what was written before changes the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    def __post_init__(self) -> None:
        bounds: tuple[tuple[str, float, float], ...] = (
            ("max_tokens", 0, 1 << 20),
            ("min_tokens", 0, max(self.max_tokens, 0)),
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("top_k", 0, 1 << 31),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("repetition_penalty", 0.01, 100.0),
        )
        for name, low, high in bounds:
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidRequestError(f"{name} must be between {low} and {high}, got {value}", param=name)
        if self.top_p == 0.0:
            raise InvalidRequestError("top_p must be greater than 0, got 0.0", param="top_p")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise InvalidRequestError(f"{name} must be between 0 and {MAX_LOGPROBS}, got {count}", param=name)
        if len(self.stop) > MAX_STOP_STRINGS or any(not text for text in self.stop):
            raise InvalidRequestError(
                f"stop takes at most {MAX_STOP_STRINGS} non-empty strings, got {list(self.stop)!r}", param="stop"
            )
        for token_id, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise InvalidRequestError(
                    f"logit_bias values must be between -100 and 100, got {token_id}: {bias}", param="logit_bias"
                )


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Continue a text under an ordered chain of learned prompts.

    `prompts` is read left to right and may be empty; `salt` separates callers that must not share K/V. The first
    `num_public_prompts` of the chain are shared by all callers; whatever follows them, the text too, never is.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    prompts: tuple[PromptArtifact, ...] = ()
    salt: str = ""
    num_public_prompts: int = 0
    deadline_seconds: float | None = None
    share: Share = EVERYBODY
    priority: int = 0
    """0 to 9, larger first; counts among the requests of one share."""
    begun_token_ids: tuple[int, ...] = ()
    """Tokens with which the answer has begun already: it goes on behind them."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Log-probability of each candidate continuation of one text (or word at its mask), in one packed pass."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    prompts: tuple[PromptArtifact, ...] = ()
    salt: str = ""
    num_public_prompts: int = 0
    deadline_seconds: float | None = None
    share: Share = EVERYBODY
    priority: int = 0
    """0 to 9, larger first; counts among the requests of one share."""


@dataclass(frozen=True, slots=True)
class PoolRequest:
    """The scores of a classification head on one text, or the text's embedding."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    kind: Literal["classes", "embedding"]
    prompts: tuple[PromptArtifact, ...] = ()
    salt: str = ""
    num_public_prompts: int = 0
    deadline_seconds: float | None = None
    share: Share = EVERYBODY
    priority: int = 0
    """0 to 9, larger first; counts among the requests of one share."""


Request = GenerateRequest | ScoreRequest | PoolRequest


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log-probability (nats) and the most likely alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestTimings:
    """Seconds on the monotonic clock of the engine's process; None where the point was not reached."""

    arrived: float
    scheduled: float | None = None
    """Took its place in the batch."""
    reading: float | None = None
    """Its prompts are there, or come in the same step: its own text is read from here on."""
    first_token: float | None = None
    finished: float | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step added to a generation. The last one of a request has a finish reason or an error, never both."""

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """Sent once, with the first output; one entry a text token, None where nothing precedes the token."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the row, where one did."""
    error: PromptdError | None = None
    num_prompt_tokens: int = 0
    num_virtual_tokens: int = 0
    num_cached_tokens: int = 0
    timings: RequestTimings | None = None
    """With the last one."""
    sampled: float | None = None
    """When its token was chosen, on the clock of the timings; None without one."""

    @property
    def is_last(self) -> bool:
        """True for exactly one output of every request."""
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class ScoreOutput:
    """Sum of log-probabilities (nats) of each candidate's tokens, in the order asked."""

    request_id: str
    logprobs: tuple[float, ...] = ()
    token_logprobs: tuple[tuple[float, ...], ...] = ()
    error: PromptdError | None = None
    num_prompt_tokens: int = 0
    num_virtual_tokens: int = 0
    num_cached_tokens: int = 0
    timings: RequestTimings | None = None

    @property
    def is_last(self) -> bool:
        """Always: a score is one output."""
        return True


@dataclass(frozen=True, slots=True)
class PoolOutput:
    """The numbers that were asked for: a score (logit) for every class, or the embedding."""

    request_id: str
    values: tuple[float, ...] = ()
    error: PromptdError | None = None
    num_prompt_tokens: int = 0
    num_virtual_tokens: int = 0
    num_cached_tokens: int = 0
    timings: RequestTimings | None = None

    @property
    def is_last(self) -> bool:
        """Always: the numbers are one output."""
        return True


Output = RequestOutput | ScoreOutput | PoolOutput
