"""Answers from a running server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from promptd.evaluation.backend import Question, Subject, answers_of_fitting, check_greedy

if TYPE_CHECKING:
    from promptd_client import AsyncClient
    from promptd_client.options import PromptOptions

T = TypeVar("T")
INPUTS_PER_CALL = 16
"""What one completion may carry."""


class ClientBackend:
    """Asks a server through its API: a call carries inputs of one prompt, and the calls of a batch run at once."""

    def __init__(self, client: AsyncClient, *, batch_size: int = 64) -> None:
        self.batch_size = batch_size
        self._client = client

    async def look_up(self, prompt: str) -> Subject:
        """Read the record, and stay with its version even if the name moves on."""
        record = await self._client.prompts.get(prompt)
        return Subject.of(prompt, record.version, record.manifest)

    async def classify(
        self, questions: Sequence[Question], words: Mapping[str, str] | None
    ) -> list[list[float] | None]:
        """Have the label words scored, or the heads asked."""

        async def ask(asked: Sequence[Question]) -> list[list[float]]:
            inputs = [question.input for question in asked]
            subject = _model(asked[0].subject)
            if words is None:
                reply = await self._client.classify(inputs, **subject)
            else:
                reply = await self._client.classify(inputs, labels=words, **subject)
            return [each.probs for each in reply.data]

        return await _in_calls(ask, questions)

    async def generate(
        self, questions: Sequence[Question], max_tokens: int, stop: Sequence[str], num_beams: int
    ) -> list[str | None]:
        """Have the inputs continued greedily."""
        check_greedy(num_beams)

        async def ask(asked: Sequence[Question]) -> list[str]:
            inputs, model = [question.input for question in asked], _model(asked[0].subject)
            reply = await self._client.complete(inputs, max_tokens=max_tokens, stop=stop, temperature=0.0, **model)
            return [each.text for each in reply.choices]

        return await _in_calls(ask, questions)


async def _in_calls(
    ask: Callable[[Sequence[Question]], Awaitable[list[T]]], questions: Sequence[Question]
) -> list[T | None]:
    """Make all calls at once, each with questions of one subject; the answers are in the order of the questions."""
    from promptd_client import ContextLengthError

    places: dict[str, list[int]] = {}
    for at, question in enumerate(questions):
        places.setdefault(question.subject.version if question.subject else "", []).append(at)
    parts = [
        own[start : start + INPUTS_PER_CALL] for own in places.values() for start in range(0, len(own), INPUTS_PER_CALL)
    ]
    calls = [answers_of_fitting(ask, [questions[at] for at in part], ContextLengthError) for part in parts]
    answers: dict[int, T | None] = {}
    for part, reply in zip(parts, await asyncio.gather(*calls), strict=True):
        answers.update(zip(part, reply, strict=True))
    return [answers[at] for at in range(len(questions))]


def _model(subject: Subject | None) -> PromptOptions:
    """Name the exact version."""
    return {} if subject is None else {"prompt_id": f"{subject.name.partition('@')[0]}@{subject.version}"}
