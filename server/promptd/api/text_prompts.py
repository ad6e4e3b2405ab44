"""Plain texts as prompts: a JSON body becomes the same kind of file as a learned prompt."""

from __future__ import annotations

from fastapi.exceptions import RequestValidationError
from promptd_store import ArtifactError, PromptKind, encode
from pydantic import ValidationError

from promptd.api.json_body import parse
from promptd.api.schemas import TextPromptBody
from promptd.modeling import FrozenModel


def text_prompt(content: bytes, model: FrozenModel, max_model_len: int) -> bytes:
    """Return the native file of a `TextPromptBody`.

    Raises `InvalidRequestError` and `RequestValidationError` for a body that is none, and `ArtifactError` for a text
    that leaves this model no room for another token, or is too long to be stored.
    """
    given = parse(content)
    try:
        body = TextPromptBody.model_validate(given)
    except ValidationError as error:
        problems = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        raise RequestValidationError(problems, body=given) from None
    num_tokens = len(model.encode(body.text, add_special_tokens=False))
    if num_tokens >= max_model_len:
        raise ArtifactError(
            "text_too_long", f"text has {num_tokens} tokens, this base model reads {max_model_len} in all", "text"
        )
    try:
        artifact = encode(
            PromptKind.TEXT,
            None,
            template=body.template,
            add_special_tokens=body.add_special_tokens,
            default_sampling=body.default_sampling,
            stop=tuple(body.stop),
            label_words=body.label_words,
            text=body.text,
        )
    except ArtifactError as error:
        if error.code != "header_too_large":
            raise
        raise ArtifactError("text_too_long", f"text cannot be stored: {error.message}", "text") from None
    return bytes(artifact.content)
