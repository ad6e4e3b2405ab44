"""Conversations as token ids, the same for requests and for training rows.

The tokenizer's own chat template where it has one. Without one, base models have no form of conversation, and prompts
that are trained on messages learn this plain one, ended by the end-of-text token:

    system:
    Answer in one word.

    user:
    Which planet is red?

    assistant:
    Mars
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from promptd.errors import InvalidRequestError
from promptd.modeling.frozen import FrozenModel

PLAIN_TEMPLATE = "{messages}"
"""The artifact's template of a prompt that reads conversations in the plain form."""

ChatMessage = Mapping[str, str]
"""`role` and `content`."""


def has_chat_template(model: FrozenModel) -> bool:
    """Whether the tokenizer knows the model's own form of conversation."""
    return bool(model.tokenizer.chat_template)


def render_chat(model: FrozenModel, messages: Sequence[ChatMessage]) -> str:
    """Return the text after which the assistant's answer begins.

    Raises `InvalidRequestError` where the template refuses the messages.
    """
    if not has_chat_template(model):
        return "".join(f"{one['role']}:\n{one['content']}\n\n" for one in messages) + "assistant:\n"
    return _templated(model, messages, is_open=True)


def encode_chat(model: FrozenModel, messages: Sequence[ChatMessage]) -> list[int]:
    """Tokenize what `render_chat` returns; a chat template writes special tokens itself."""
    return model.encode(render_chat(model, messages), add_special_tokens=not has_chat_template(model))


def encode_answer(model: FrozenModel, messages: Sequence[ChatMessage], answer: str) -> list[int]:
    """Tokenize the assistant's answer to the messages, up to and with the first token that ends a generation."""
    tail = answer
    if has_chat_template(model):
        front = render_chat(model, messages)
        whole = _templated(model, [*messages, {"role": "assistant", "content": answer}], is_open=False)
        if whole.startswith(front):  # some templates write past answers unlike what they ask for
            tail = whole[len(front) :]
    ids = model.encode(tail, add_special_tokens=False)
    for at, token_id in enumerate(ids):
        if token_id in model.eos_token_ids:
            return ids[: at + 1]
    eos = model.tokenizer.eos_token_id
    return ids if eos is None else [*ids, eos]


def _templated(model: FrozenModel, messages: Sequence[ChatMessage], *, is_open: bool) -> str:
    plain = [dict(message) for message in messages]
    try:
        text = model.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=is_open)
    except Exception as error:  # whatever a template of somebody's raises
        raise InvalidRequestError(f"the chat template refuses these messages: {error}", param="messages") from error
    return str(text)
