"""`POST /v1/prompts/{name}/evaluate`: what a prompt scores on rows with known answers, beside the bare model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from promptd.api.auth import authorize
from promptd.api.classify import label_candidates, label_probabilities
from promptd.api.generation import finish, submit, together, while_connected
from promptd.api.named_prompts import NamedPrompts, resolve_prompts, to_tokens
from promptd.api.schemas import MAX_EVALUATION_ROWS, EvaluateBody
from promptd.api.services import Services, new_id, principal_of, services_of
from promptd.engine.request import SamplingParams
from promptd.errors import ContextLengthError, InvalidRequestError, OverloadedError
from promptd.evaluation import (
    BARE_MODEL,
    MAJORITY_CLASS,
    EvaluationResult,
    Question,
    Subject,
    check_greedy,
    evaluate,
    task_of,
)
from promptd.tenancy import Scope
from promptd.training import TrainingDataError, example_of, parse_examples

T = TypeVar("T")
_QUEUE_POLL_SECONDS = 0.2


async def evaluate_prompt(name: str, body: EvaluateBody, request: Request) -> Response:
    """Score a prompt, the bare model and the majority class on the same rows, as many small requests.

    All evaluations together have at most half of the engine's rows; while the queue is full they wait.
    """
    work = _measure(services_of(request), request, name, body)
    found = {result.subject: result.to_dict() for result in await while_connected(request, work)}
    return JSONResponse(
        {
            "id": new_id("eval"),
            "object": "prompt.evaluation",
            "created": int(time.time()),
            "prompt": found[name],
            "bare_model": found.get(BARE_MODEL),
            "majority_class": found.get(MAJORITY_CLASS),
        }
    )


async def _measure(services: Services, request: Request, name: str, body: EvaluateBody) -> list[EvaluationResult]:
    """Read the rows and run them; a bad one is named by the field it came in and its line."""
    if (body.rows is None) == (body.file_id is None):
        raise InvalidRequestError("give either rows or file_id", param="rows")
    param = "rows" if body.file_id is None else "file_id"
    try:
        if body.file_id is None:
            examples = [example_of(line, row) for line, row in enumerate(body.rows or [], start=1)]
        else:
            principal = principal_of(request)
            authorize(principal, Scope.TRAIN)  # as for reading the file itself
            content = await services.files.content(principal.tenant, body.file_id)
            examples = await asyncio.to_thread(parse_examples, content.split(b"\n"))
        if len(examples) > MAX_EVALUATION_ROWS:
            raise InvalidRequestError(
                f"{param} has {len(examples)} rows, an evaluation takes {MAX_EVALUATION_ROWS}", param=param
            )
        return await evaluate(
            EngineBackend(services, request),
            task_of(examples),
            examples,
            [name, None],
            answer_by=body.answer_by,
            keep_predictions=body.return_predictions,
        )
    except TrainingDataError as error:
        error.param = param
        raise


class EngineBackend:
    """Asks the server's own engine, through the same admission as everybody."""

    def __init__(self, services: Services, request: Request) -> None:
        self.batch_size = services.max_evaluating
        self._services = services
        self._request = request
        self._prompts: dict[str, NamedPrompts] = {}

    async def look_up(self, prompt: str) -> Subject:
        """Resolve a name; the evaluation stays with its version even if the name moves on."""
        named = await self._resolve([prompt])
        record = named.records[-1]  # in front of it may be what it was learned behind
        self._prompts[record.version] = named
        return Subject.of(prompt, record.version, record.manifest)

    async def classify(
        self, questions: Sequence[Question], words: Mapping[str, str] | None
    ) -> list[list[float] | None]:
        """Score the label words, or ask the heads; one request a question."""
        candidates = None if words is None else await label_candidates(self._services, words)

        async def ask(question: Question) -> list[float]:
            prompts = await self._prompts_of(question)
            probabilities, _ = await label_probabilities(self._services, prompts, candidates, question.input)
            return probabilities

        return await together(self._patiently(ask, question) for question in questions)

    async def generate(
        self, questions: Sequence[Question], max_tokens: int, stop: Sequence[str], num_beams: int
    ) -> list[str | None]:
        """Continue greedily, one request a question."""
        check_greedy(num_beams)
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, stop=tuple(stop))

        async def ask(question: Question) -> str:
            prompts = await self._prompts_of(question)
            token_ids = await to_tokens(self._services, prompts, question.input, apply_template=True, param="rows")
            (choice,) = await submit(self._services, prompts, [token_ids], [params])
            try:
                await finish([choice])
            finally:
                choice.prompts.visit.free_tokens(choice.num_held_tokens)
            return choice.text

        return await together(self._patiently(ask, question) for question in questions)

    async def _prompts_of(self, question: Question) -> NamedPrompts:
        return await self._resolve([]) if question.subject is None else self._prompts[question.subject.version]

    async def _resolve(self, names: Sequence[str]) -> NamedPrompts:
        return await resolve_prompts(self._services, self._request, names, self._services.model.served_name, "name")

    async def _patiently(self, ask: Callable[[Question], Awaitable[T]], question: Question) -> T | None:
        """Ask when it is this question's turn, and again while the queue is full: single requests go first."""
        async with self._services.evaluation_turns:
            while True:
                try:
                    return await ask(question)
                except OverloadedError:
                    await asyncio.sleep(_QUEUE_POLL_SECONDS)
                except ContextLengthError:
                    return None
