"""What may be asked, field by field. Unknown fields are refused; those that could not change an answer are accepted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from promptd_store import MAX_CHAIN_PROMPTS
from promptd_store.users import MAX_USER_CHARS
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from promptd.engine.request import MAX_LOGPROBS, MAX_STOP_STRINGS
from promptd.engine.share import MAX_PRIORITY

MAX_N = 16
MAX_PROMPTS = 256
MAX_LABELS = 1024
MAX_TEXT_CHARS = 1 << 20
MAX_STOP_CHARS = 4096
MAX_EVALUATION_ROWS = 2000

Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
# One bad entry is enough: a list of a million would be a million complaints.
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=1 << 20, fail_fast=True)]
TokenKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
FieldName = Annotated[str, Field(min_length=1, max_length=64)]
Fields = Annotated[dict[FieldName, Text], Field(max_length=64)]
Number = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | Annotated[float, Field(ge=-1e9, le=1e9)]
Label = Annotated[str, Field(max_length=4096)]


def _differing(words: dict[str, str]) -> dict[str, str]:
    """Refuse labels that stand for one text: none of them could be told from the other."""
    labels: dict[str, str] = {}
    for label, text in words.items():
        if (first := labels.setdefault(text, label)) != label:
            raise ValueError(f"{first!r} and {label!r} have the same text {text[:80]!r}")
    return words


LabelWords = Annotated[dict[Label, Text], Field(min_length=2, max_length=MAX_LABELS), AfterValidator(_differing)]
"""Label -> the text that stands for it."""

Row = Annotated[dict[FieldName, Any], Field(max_length=64)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
PromptName = Annotated[str, Field(min_length=1, max_length=256)]
User = Annotated[str, Field(min_length=1, max_length=MAX_USER_CHARS)]
"""An end user of a tenant, whom something belongs to."""
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class Strict(BaseModel):
    """A body: extra fields are errors, and `true` or `"3"` is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class StreamOptions(Strict):
    """OpenAI's `stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


class PromptChoice(Strict):
    """How a request names its learned prompts."""

    model: Annotated[str, Field(max_length=512)] | None = None
    """The base model, a prompt, or `base:prompt`."""
    prompt_id: PromptName | None = None
    """A prompt, in the place of `model`."""
    prompt_ids: Annotated[list[PromptName], Field(min_length=1, max_length=MAX_CHAIN_PROMPTS)] | None = None
    """A chain of prompts, from left to right."""
    ensemble: Annotated[list[PromptName], Field(min_length=1, max_length=16)] | None = None
    """The input runs under each of these: the most frequent text wins, or the mean of the labels' probabilities."""
    apply_template: bool = True
    """Whether a text is put into the prompt's template; token ids never are."""
    priority: Annotated[int, Field(ge=0, le=MAX_PRIORITY)] = 0
    """Larger first, among the requests of one tenant."""
    user: Annotated[str, Field(max_length=512)] | None = None
    metadata: Metadata | None = None
    """Taken as it is, like `user`; neither changes an answer."""

    @property
    def naming_field(self) -> str:
        """The field that names the prompts."""
        given = (name for name in ("ensemble", "prompt_ids", "prompt_id") if getattr(self, name) is not None)
        return next(given, "model")


class Sampling(PromptChoice):
    """Sampling fields that completions and chat share; None means: the prompt's default, then ours."""

    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    """Answers to every input."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    """Without it the prompt's default, then 16 for completions and what fits for chats."""
    min_tokens: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    """No end and no stop before so many."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the likeliest token. Without it the prompt's default, then 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    """-1 or 0: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300)] | None = None
    """Token id -> what is added to its logit."""
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    """The same request with the same seed draws the same tokens."""
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS)] | None = None
    """Texts that end an answer, without being part of it."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool = False
    """Go on behind the end-of-text token."""
    return_token_ids: bool = False
    """Answer with `prompt_token_ids` and `token_ids`, too."""


class CompletionBody(Sampling):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | Fields
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[Text | Fields], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    """A text, an object of the template's fields, token ids, or a list of these."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """So many of the likeliest tokens at each place."""
    echo: bool = False
    """Begin with the input; with `logprobs`, its log-probabilities too, and with `max_tokens` 0 nothing else."""
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: Literal[""] | None = None


class ContentPart(Strict):
    """A text part of a chat message."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One chat message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[ContentPart], Field(max_length=1024)]
    name: Annotated[str, Field(max_length=256)] | None = None


class ResponseFormat(Strict):
    """Only plain text is made here."""

    type: Literal["text"]


class ChatBody(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None


class ClassifyBody(PromptChoice):
    """`POST /v1/classify`: vLLM's `input`; labels come from a head, from the prompt's label words, or from `labels`."""

    input: Text | Fields | Annotated[list[Text | Fields], Field(min_length=1, max_length=256)]
    labels: LabelWords | Annotated[list[Text], Field(min_length=2, max_length=MAX_LABELS)] | None = None
    """Label -> the text that stands for it, or the texts; omitted: those of the prompt, or the head's."""


class EmbeddingsBody(PromptChoice):
    """`POST /v1/embeddings`: OpenAI's shape; token ids are used as given."""

    input: (
        Text
        | Fields
        | TokenIds
        | Annotated[list[Text | Fields], Field(min_length=1, max_length=256)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=256)]
    )
    encoding_format: Literal["float", "base64"] = "float"


class EvaluateBody(Strict):
    """`POST /v1/prompts/{name}/evaluate`: rows as training takes them, all with `label` or all with `completion`."""

    rows: Annotated[list[Row], Field(min_length=1, max_length=MAX_EVALUATION_ROWS, fail_fast=True)] | None = None
    file_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """A file of `/v1/files`, in place of rows."""
    answer_by: Literal["score", "generate"] = "score"
    """Labels are scored by their words, or generated and read."""
    return_predictions: bool = False


class TokenizeBody(Strict):
    """`POST /tokenize`: vLLM's shape."""

    model: Annotated[str, Field(max_length=512)] | None = None
    prompt: Text
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Strict):
    """`POST /detokenize`."""

    model: Annotated[str, Field(max_length=512)] | None = None
    tokens: TokenIds


class TextPromptBody(Strict):
    """`PUT /v1/prompts/{name}` as JSON: a plain text in the place of a learned prompt; it may be replaced by one."""

    text: Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)]
    """Stands in front of every input."""
    template: Text | None = None
    """How a request's text or fields become input; `{text}` is the text."""
    add_special_tokens: bool | None = None
    default_sampling: Annotated[dict[FieldName, Number], Field(max_length=16)] = {}
    stop: Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS)] = []
    label_words: LabelWords | None = None


class RollbackBody(Strict):
    """`POST /v1/prompts/{name}/rollback`: a number or `sha256:…`."""

    to: Annotated[int, Field(ge=1, lt=10**9)] | Annotated[str, Field(max_length=80)]
