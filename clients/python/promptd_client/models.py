"""What the server answers, as pydantic models. Fields that a newer server adds are kept and do no harm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    """Base class: immutable; unknown fields stay readable as attributes."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


class PromptTokensDetails(Reply):
    """Where the prompt's keys came from."""

    cached_tokens: int = 0
    virtual_tokens: int = 0


class Usage(Reply):
    """Tokens of one request; the virtual tokens of prompts are counted apart."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()

    @property
    def virtual_tokens(self) -> int:
        """Virtual tokens of all prompts."""
        return self.prompt_tokens_details.virtual_tokens


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
    stop_reason: str | int | None = None
    logprobs: CompletionLogprobs | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(Reply):
    """The reply to a completion, and each event of its stream."""

    id: str
    model: str
    created: int
    prompt_versions: list[str] = []
    """The exact prompts that answered, in the order of the chain."""
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
    prompt_versions: list[str] = []
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
    prompt_versions: list[str] = []
    choices: list[ChatChunkChoice]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """What the event adds to the first answer."""
        return (self.choices[0].delta.content or "") if self.choices else ""


class ClassificationResult(Reply):
    """One input's label, and the probability of each of `labels`."""

    index: int
    label: str
    labels: list[str]
    probs: list[float]

    @property
    def probabilities(self) -> dict[str, float]:
        """Label -> probability."""
        return dict(zip(self.labels, self.probs, strict=True))


class Classification(Reply):
    """The reply to a classification, one result an input."""

    id: str
    model: str
    created: int | None = None
    prompt_versions: list[str] = []
    data: list[ClassificationResult]
    usage: Usage | None = None

    @property
    def labels(self) -> list[str]:
        """The label of every input."""
        return [result.label for result in self.data]


class Embedding(Reply):
    """One text's vector."""

    index: int
    embedding: list[float]


class Embeddings(Reply):
    """The reply to a request for embeddings, one an input."""

    model: str
    prompt_versions: list[str] = []
    data: list[Embedding]
    usage: Usage | None = None

    @property
    def vectors(self) -> list[list[float]]:
        """The vector of every input."""
        return [one.embedding for one in self.data]


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

    id: str
    owned_by: str
    version: str
    """`sha256:…`: equal versions are served identically."""
    number: int
    is_current: bool = True
    kind: Literal["soft", "prefix", "text"]
    num_virtual_tokens: int
    num_bytes: int
    base_fingerprint: str | None = None
    verified: bool = False
    """Whether the file itself named the base model."""
    visibility: Literal["private", "public"] = "private"
    behind: list[str] = []
    """Exact names of what it was learned behind: asking for it serves these in front."""
    created: int
    provenance: dict[str, Any] = {}
    manifest: dict[str, Any] = {}
    etag: str | None = None
    """For `if_match`; None in lists."""

    @property
    def name(self) -> str:
        """What requests call it."""
        return self.id


class PromptPage(Reply):
    """Part of a list of prompts."""

    data: list[Prompt]
    has_more: bool = False


class EvaluationResult(Reply):
    """What one subject scored: a prompt, the bare model, or the majority class."""

    subject: str
    metrics: dict[str, float]
    """Fractions, but BLEU and chrF in 0..100."""
    num_rows: int
    num_inputs: int
    num_too_long: int = 0
    """Inputs that exceeded the model's length; they count as wrong."""
    template: str | None = None
    label_words: dict[str, str] | None = None
    prompt_versions: list[str] = []
    predictions: list[dict[str, Any]] | None = None


class Evaluation(Reply):
    """A prompt on rows with known answers, beside what needs no prompt."""

    id: str
    created: int
    prompt: EvaluationResult
    bare_model: EvaluationResult | None = None
    """None where the prompt has a classification head of its own."""
    majority_class: EvaluationResult | None = None
    """None where the answers are texts."""


class Neighbor(Reply):
    """An entry of the vocabulary and its cosine similarity to a vector of a soft prompt."""

    token_id: int
    token: str
    cosine: float


class NeighborRow(Reply):
    """The nearest entries of one virtual token, best first."""

    index: int
    neighbors: list[Neighbor]


class Tokenization(Reply):
    """The tokens of a text."""

    tokens: list[int]
    count: int
    max_model_len: int | None = None
