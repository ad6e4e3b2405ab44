"""Training rows of chat messages: `{"messages": [{"role": "user", "content": "…"}, …]}`, OpenAI's format.

The last message is the assistant's, and the loss is on it alone; all before it are what it answers to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from promptd_store.strict_json import shown

ROLES = ("system", "developer", "user", "assistant", "tool")
_KNOWN = ("role", "content", "name")


def check_messages(row: Mapping[str, Any], *, must_end: bool = True) -> list[dict[str, str]]:
    """Return a row's messages as role and content; with `must_end` the last one must be the assistant's.

    Raises `ValueError` that names the message and its value.
    """
    others = sorted(set(row) - {"messages"})
    if others:
        raise ValueError(f"a row of messages has no other fields, got {shown(others)}")
    given = row["messages"]
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError(f"'messages' must be a list of at least one message, got {shown(given)}")
    messages = [_message(number, one) for number, one in enumerate(given, start=1)]
    last = messages[-1]
    is_answer = last["role"] == "assistant"
    if not last["content"] if is_answer else must_end:
        raise ValueError(f"the last message must be a non-empty one of the assistant, got {shown(last)}")
    if is_answer and len(messages) == 1:
        raise ValueError("the assistant's message answers to nothing: it is the only one")
    return messages


def _message(number: int, given: Any) -> dict[str, str]:
    where = f"message {number}"
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be an object, got {shown(given)}")
    for field, value in given.items():
        if field not in _KNOWN:
            raise ValueError(f"{where} has the unknown field {shown(field)}; known: {', '.join(_KNOWN)}")
        if not isinstance(value, str):
            raise ValueError(f"{where}: {field!r} must be a string, got {shown(value)}")
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        raise ValueError(f"{where}: 'role' must be one of {', '.join(ROLES)}, got {shown(role)}")
    if content is None:
        raise ValueError(f"{where} has no 'content'")
    return {"role": role, "content": content}
