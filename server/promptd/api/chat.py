"""`POST /v1/chat/completions`: the tokenizer's chat template in front of the same engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from promptd.api.chunks import chunk_stream, id_list
from promptd.api.generation import (
    Choice,
    collect,
    max_tokens_of,
    sampling_params,
    submit,
    usage,
)
from promptd.api.logprobs import chat_logprobs
from promptd.api.named_prompts import NamedPrompts, named_prompts, tokenize
from promptd.api.schemas import ChatBody, Message
from promptd.api.services import Services, new_id, services_of
from promptd.api.sse import to_json
from promptd.engine.request import RequestOutput
from promptd.errors import InvalidRequestError, NoChatTemplateError
from promptd.modeling.chat_template import PLAIN_TEMPLATE, has_chat_template, render_chat


async def create_chat_completion(body: ChatBody, request: Request) -> Response:
    """Answer a conversation under a learned prompt, a chain of prompts, or none."""
    services = services_of(request)
    if body.ensemble is not None:
        raise InvalidRequestError("ensemble is for completions and classification", param="ensemble")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs=true", param="top_logprobs")
    prompts = await named_prompts(services, request, body)
    token_ids = await _tokens(services, prompts, body.messages)
    if body.max_completion_tokens is not None:
        body.max_tokens = body.max_completion_tokens
    num_before = services.model.num_prompt_tokens(prompts.artifacts)
    room = services.engine.engine.max_model_len - num_before - len(token_ids)
    max_tokens = max_tokens_of(body, prompts, max(1, room))
    params = [
        sampling_params(
            body,
            prompts,
            max_tokens=max_tokens,
            seed_offset=number,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        for number in range(body.n)
    ]
    choices = await submit(services, prompts, [token_ids], params, priority=body.priority)
    header = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": prompts.model_name,
        "prompt_versions": prompts.versions,
    }
    if body.stream:
        role = '"delta":{"role":"assistant","content":""},"finish_reason":null'
        first = [f'{{"index":{choice.index},{role}}}' for choice in choices]
        return chunk_stream(services, body, choices, header, partial(_piece, services, body), first)
    await collect(request, choices)
    answers = [_answer(services, body, choice) for choice in choices]
    return JSONResponse({**header, "choices": answers, "usage": usage(choices, body.n)})


async def _tokens(services: Services, prompts: NamedPrompts, messages: Sequence[Message]) -> tuple[int, ...]:
    """Render and tokenize; without a chat template only for a prompt that was trained on the plain form."""
    learned = prompts.last is not None and prompts.last.manifest.template == PLAIN_TEMPLATE
    if not learned and not has_chat_template(services.model):
        raise NoChatTemplateError(
            f"the tokenizer of {services.model.served_name!r} has no chat template; use /v1/completions",
            param="messages",
        )
    plain = [
        {
            "role": message.role,
            "content": message.content
            if isinstance(message.content, str)
            else "".join(part.text for part in message.content),
        }
        for message in messages
    ]
    text = render_chat(services.model, plain)
    return await tokenize(services, text, add_special_tokens=not has_chat_template(services.model))


def _answer(services: Services, body: ChatBody, choice: Choice) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.last.stop_reason if choice.last is not None else None,
        "logprobs": chat_logprobs(services.model, choice.logprobs) if body.logprobs else None,
    }
    if body.return_token_ids:
        answer["token_ids"] = choice.output_ids
    return answer


def _piece(services: Services, body: ChatBody, choice: Choice, output: RequestOutput) -> str:
    logprobs = to_json(chat_logprobs(services.model, output.logprobs) if body.logprobs else None)
    ids = f',"token_ids":{id_list(output.token_ids)}' if body.return_token_ids else ""
    delta = f'{{"content":{to_json(output.text)}}}' if output.text or not output.is_last else "{}"
    ended = to_json(output.finish_reason)
    return f'{{"index":{choice.index},"delta":{delta},"finish_reason":{ended},"logprobs":{logprobs}{ids}}}'
