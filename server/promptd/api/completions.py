"""`POST /v1/completions`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from promptd.api.chunks import chunk_stream, id_list
from promptd.api.generation import (
    Choice,
    abort,
    collect,
    max_tokens_of,
    sampling_params,
    submit,
    usage,
)
from promptd.api.logprobs import completion_logprobs
from promptd.api.named_prompts import NamedPrompts, named_prompts, resolve_prompts, to_tokens
from promptd.api.schemas import CompletionBody
from promptd.api.services import Services, new_id, services_of
from promptd.api.sse import to_json
from promptd.engine.ensemble import majority
from promptd.engine.request import RequestOutput, TokenLogprob
from promptd.errors import InvalidRequestError
from promptd.modeling import FrozenModel

_DEFAULT_MAX_TOKENS = 16
Input = str | Mapping[str, str] | Sequence[int]


async def create_completion(body: CompletionBody, request: Request) -> Response:
    """Continue one or several texts under a learned prompt, a chain of prompts, or none."""
    services = services_of(request)
    inputs = _inputs(body)
    if body.ensemble is not None:
        return await _ensemble(body, request, services, inputs)
    prompts = await named_prompts(services, request, body)
    choices = await _start(services, body, prompts, inputs)
    header = {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": prompts.model_name,
        "prompt_versions": prompts.versions,
    }
    if body.stream:
        writers = [_PieceWriter(services.model, body, choice) for choice in choices]
        return chunk_stream(services, body, choices, header, lambda choice, output: writers[choice.index].piece(output))
    await collect(request, choices)
    answers = [_answer(services, body, choice) for choice in choices]
    return JSONResponse({**header, "choices": answers, "usage": usage(choices, body.n)})


async def _start(
    services: Services, body: CompletionBody, prompts: NamedPrompts, inputs: Sequence[Input]
) -> list[Choice]:
    max_tokens = max_tokens_of(body, prompts, _DEFAULT_MAX_TOKENS)
    params = [
        sampling_params(
            body,
            prompts,
            max_tokens=max_tokens,
            seed_offset=number,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        for number in range(body.n)
    ]
    tokens = [
        await to_tokens(services, prompts, text, apply_template=body.apply_template, param="prompt") for text in inputs
    ]
    return await submit(services, prompts, tokens, params, priority=body.priority)


def _inputs(body: CompletionBody) -> list[Input]:
    """Every input of the body: one text, object or list of token ids, or a list of these."""
    prompt = body.prompt
    if isinstance(prompt, (str, dict)):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)  # type: ignore[arg-type]


def _answer(services: Services, body: CompletionBody, choice: Choice) -> dict[str, Any]:
    model = services.model
    echoed = model.decode(choice.token_ids) if body.echo else ""
    answer: dict[str, Any] = {
        "index": choice.index,
        "text": echoed + choice.text,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.last.stop_reason if choice.last is not None else None,
        "logprobs": None,
    }
    if body.logprobs is not None:
        front = (choice.prompt_logprobs or ()) if body.echo else ()
        ids = [*(choice.token_ids if body.echo else ()), *(entry.token_id for entry in choice.logprobs)]
        answer["logprobs"] = completion_logprobs(model, [*front, *choice.logprobs], ids, 0)
    if body.return_token_ids:
        answer["prompt_token_ids"] = list(choice.token_ids)
        answer["token_ids"] = choice.output_ids
    return answer


class _PieceWriter:
    """Writes what each step adds to one choice; where its texts begin depends on those before."""

    def __init__(self, model: FrozenModel, body: CompletionBody, choice: Choice) -> None:
        self._model = model
        self._body = body
        self._choice = choice
        self._has_begun = False
        self._num_chars = 0

    def piece(self, output: RequestOutput) -> str:
        """Return `choices[…]` of one chunk; the first has the echo, and the input's token ids."""
        body, text, ids = self._body, output.text, ""
        if body.echo and not self._has_begun:
            text = self._model.decode(self._choice.token_ids) + text
        if body.return_token_ids:
            front = "" if self._has_begun else f',"prompt_token_ids":{id_list(self._choice.token_ids)}'
            ids = f'{front},"token_ids":{id_list(output.token_ids)}'
        piece = (
            f'{{"index":{self._choice.index},"text":{to_json(text)}'
            f',"finish_reason":{to_json(output.finish_reason)},"stop_reason":{to_json(output.stop_reason)}'
            f',"logprobs":{to_json(None if body.logprobs is None else self._logprobs(output))}{ids}}}'
        )
        self._has_begun = True
        self._num_chars += len(text)
        return piece

    def _logprobs(self, output: RequestOutput) -> dict[str, Any]:
        entries: list[TokenLogprob | None] = list(output.logprobs)
        ids = [entry.token_id for entry in output.logprobs]
        if self._body.echo and not self._has_begun:
            entries = [*(self._choice.prompt_logprobs or ()), *entries]
            ids = [*self._choice.token_ids, *ids]
        return completion_logprobs(self._model, entries, ids, self._num_chars)


async def _ensemble(body: CompletionBody, request: Request, services: Services, inputs: Sequence[Input]) -> Response:
    """Run the input under each prompt in one batch and take the majority's text, ties to the first."""
    if body.stream or body.n != 1 or len(inputs) != 1:
        raise InvalidRequestError("ensemble takes one input, n=1 and no stream", param="ensemble")
    if body.prompt_id is not None or body.prompt_ids is not None:
        raise InvalidRequestError("ensemble names all its prompts itself", param="ensemble")
    choices: list[Choice] = []
    try:
        members = [
            await resolve_prompts(services, request, [name], body.model or name, body.naming_field)
            for name in body.ensemble or ()
        ]
        for prompts in members:  # all are known: they start together
            choices += await _start(services, body, prompts, inputs)
        await collect(request, choices)
    finally:
        abort(choices)
    votes = [choice.text.strip() for choice in choices]
    winner = choices[majority(votes)]
    winner.index = 0
    return JSONResponse(
        {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": services.model.served_name,
            "prompt_versions": [version for choice in choices for version in choice.prompts.versions],
            "choices": [{**_answer(services, body, winner), "votes": dict(Counter(votes))}],
            "usage": usage(choices, 1),
        }
    )
