"""What the server answers, as pydantic models. Fields that a newer server adds are kept and do no harm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    """Base class: immutable; unknown fields stay readable as attributes."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


class Usage(Reply):
    """Tokens of one request; virtual tokens of prompts are counted apart."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    virtual_tokens: int = 0


class CompletionLogprobs(Reply):
    """Log-probabilities (nats) of the tokens of one choice."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] = []


class CompletionChoice(Reply):
    """One text, or in a stream what was added to it."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(Reply):
    """The reply to a completion, and each event of its stream."""

    id: str
    model: str
    """The exact version that answered."""
    created: int
    choices: list[CompletionChoice]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """The first choice's text; empty for the last event of a stream, which only counts tokens."""
        return self.choices[0].text if self.choices else ""


class ChatMessage(Reply):
    """One message; in a stream its parts, each possibly without role or content."""

    role: str | None = None
    content: str | None = None


class ChatChoice(Reply):
    """One answer."""

    index: int
    message: ChatMessage
    finish_reason: str | None = None
    logprobs: Mapping[str, Any] | None = None


class ChatCompletion(Reply):
    """The reply to a chat."""

    id: str
    model: str
    created: int
    choices: list[ChatChoice]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """The first answer's content."""
        return (self.choices[0].message.content or "") if self.choices else ""


class ChatChunkChoice(Reply):
    """What one event adds to an answer."""

    index: int
    delta: ChatMessage
    finish_reason: str | None = None
    logprobs: Mapping[str, Any] | None = None


class ChatCompletionChunk(Reply):
    """One event of a chat's stream."""

    id: str
    model: str
    created: int
    choices: list[ChatChunkChoice]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """What the event adds to the first answer."""
        return (self.choices[0].delta.content or "") if self.choices else ""


class ClassificationResult(Reply):
    """One input's label and the probability of every label."""

    index: int
    label: str
    probs: dict[str, float]


class Classification(Reply):
    """The reply to a classification, one result an input."""

    id: str
    model: str
    data: list[ClassificationResult]
    usage: Usage | None = None

    @property
    def labels(self) -> list[str]:
        """The label of every input."""
        return [result.label for result in self.data]


class Model(Reply):
    """A base model (`parent` is None) or a prompt."""

    id: str
    created: int | None = None
    owned_by: str | None = None
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class Prompt(Reply):
    """One published version of a prompt."""

    name: str
    version: str
    """`sha256:…`: equal versions are served identically."""
    number: int
    kind: Literal["soft", "prefix", "text"]
    num_virtual_tokens: int
    num_bytes: int = 0
    etag: str | None = None
    created_at: int | None = None
    base_fingerprint: str | None = None
    visibility: str = "private"
    verified: bool = False
    is_current: bool = True
    provenance: dict[str, Any] = {}
    manifest: dict[str, Any] = {}


class Tokenization(Reply):
    """The tokens of a text."""

    tokens: list[int]
    count: int
    max_model_len: int | None = None
