"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from promptd.engine.request import TokenLogprob
from promptd.modeling import FrozenModel


def completion_logprobs(
    model: FrozenModel, entries: Sequence[TokenLogprob | None], token_ids: Sequence[int], first_offset: int
) -> dict[str, Any]:
    """`/v1/completions`: parallel lists; the first text token has nothing in front of it, so its value is null."""
    tokens = [_token(model, token_id) for token_id in token_ids]
    offsets, at = [], first_offset
    for token in tokens:
        offsets.append(at)
        at += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [entry.logprob if entry is not None else None for entry in entries],
        "top_logprobs": [
            {_token(model, token_id): value for token_id, value in reversed(_with_own(entry))}
            if entry is not None
            else None
            for entry in entries
        ],
        "text_offset": offsets,
    }


def chat_logprobs(model: FrozenModel, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`/v1/chat/completions`: one object a token."""
    return {
        "content": [
            {
                **_described(model, entry.token_id, entry.logprob),
                "top_logprobs": [_described(model, token_id, value) for token_id, value in entry.top],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def _with_own(entry: TokenLogprob) -> list[tuple[int, float]]:
    """The alternatives and the token itself, best first: a reader compares its value with the best one's."""
    pairs = dict(entry.top)
    pairs.setdefault(entry.token_id, entry.logprob)
    return sorted(pairs.items(), key=lambda pair: -pair[1])


def _described(model: FrozenModel, token_id: int, value: float) -> dict[str, Any]:
    token = _token(model, token_id)
    return {"token": token, "logprob": value, "bytes": list(token.encode())}


def _token(model: FrozenModel, token_id: int) -> str:
    return model.decode([token_id], skip_special_tokens=False)
