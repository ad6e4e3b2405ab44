"""The fields of requests, shared by both clients. All are optional; the server checks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

TextInput = str | Mapping[str, str] | Sequence[int] | Sequence[str | Mapping[str, str]] | Sequence[Sequence[int]]
"""A text, the named fields of the prompt's template, token ids (used as given), or a list of either."""
Message = Mapping[str, Any]
"""`{"role": "user", "content": "…"}`"""


class PromptOptions(TypedDict, total=False):
    """Which learned prompts a request runs under."""

    model: str
    """The base model, a prompt, or `base:prompt`; omitted: the base model."""
    prompt_id: str
    prompt_ids: Sequence[str]
    """A chain, read left to right."""
    apply_template: bool
    extra_body: Mapping[str, Any]
    """Fields that this client does not know yet."""


class SamplingOptions(PromptOptions, total=False):
    """How tokens are picked."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[str, float]
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    n: int
    ensemble: Sequence[str]
    return_token_ids: bool


class CompletionOptions(SamplingOptions, total=False):
    """What only completions take."""

    logprobs: int
    echo: bool


class ChatOptions(SamplingOptions, total=False):
    """What only chats take."""

    max_completion_tokens: int
    logprobs: bool
    top_logprobs: int


class ClassifyOptions(PromptOptions, total=False):
    """What only classifications take."""

    labels: Sequence[str] | Mapping[str, str]
    """Labels, or label -> the text that is scored; omitted: the prompt's own."""
    ensemble: Sequence[str]
