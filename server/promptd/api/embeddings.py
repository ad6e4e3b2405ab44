"""`POST /v1/embeddings`: one vector a text, under a learned prompt or none, in OpenAI's shape."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from promptd.api.classify import count_output
from promptd.api.generation import together, while_connected
from promptd.api.named_prompts import named_prompts, to_tokens
from promptd.api.schemas import EmbeddingsBody
from promptd.api.services import new_id as new_request_id
from promptd.api.services import services_of
from promptd.engine.request import PoolOutput, PoolRequest
from promptd.errors import InvalidRequestError


async def create_embeddings(body: EmbeddingsBody, request: Request) -> Response:
    """Return the embedding of every input, pooled as the base model's sentence-transformers files say."""
    services = services_of(request)
    if body.ensemble is not None:
        raise InvalidRequestError("embeddings of several prompts are not put together", param="ensemble")
    prompts = await named_prompts(services, request, body)
    config = services.engine.engine.config
    turns = asyncio.Semaphore(max(1, min(config.max_num_seqs, config.max_queue // 2)))

    async def embed(text: Any) -> PoolOutput:
        token_ids = await to_tokens(services, prompts, text, apply_template=True, param="input")
        await prompts.visit.reserve_tokens(len(token_ids))
        seconds = services.limits.request_timeout_seconds
        rest = (prompts.artifacts, prompts.salt, prompts.num_public, seconds, prompts.share, body.priority)
        async with turns:
            with prompts.watching(services, token_ids):
                output = await services.engine.pool(PoolRequest(new_request_id("embed"), token_ids, "embedding", *rest))
        count_output(prompts, output)
        return output

    outputs = await while_connected(request, together(embed(text) for text in _inputs(body)))
    num_tokens = sum(output.num_prompt_tokens for output in outputs)
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(output.values, body.encoding_format)}
        for index, output in enumerate(outputs)
    ]
    details = {"virtual_tokens": sum(output.num_virtual_tokens for output in outputs)}
    return JSONResponse(
        {
            "object": "list",
            "model": prompts.model_name,
            "prompt_versions": prompts.versions,
            "data": data,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "prompt_tokens_details": details},
        }
    )


def _inputs(body: EmbeddingsBody) -> list[Any]:
    given = body.input
    if isinstance(given, (str, dict)) or (given and isinstance(given[0], int)):
        return [given]
    return list(given)


def _encoded(values: Sequence[float], encoding_format: str) -> list[float] | str:
    """As numbers, or as OpenAI's base64 of little-endian float32."""
    if encoding_format == "float":
        return list(values)
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
