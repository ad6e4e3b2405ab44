"""`/v1/models`, `/tokenize`, `/detokenize`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from promptd_store import PromptChainBrokenError, PromptRecord

from promptd.api.named_prompts import prompt_names, resolve_name, tokenize
from promptd.api.schemas import DetokenizeBody, TokenizeBody
from promptd.api.services import Services, principal_of, services_of
from promptd.errors import InvalidRequestError
from promptd.tenancy import Scope

_AT_ONCE = 200


async def list_models(request: Request) -> Response:
    """List the base model and every prompt that the caller may name as `model`; never paged."""
    services, principal = services_of(request), principal_of(request)
    records = await services.catalog.list(principal.tenant, include_public=True)
    data = [_base(services)]
    for number, record in enumerate(records):
        data.append(await _prompt(services, record, principal.tenant))
        if number % _AT_ONCE == _AT_ONCE - 1:
            await asyncio.sleep(0)  # others have their turn: there may be thousands
    return JSONResponse({"object": "list", "data": data})


async def get_model(model: str, request: Request) -> Response:
    """Show one model or prompt."""
    services, principal = services_of(request), principal_of(request)
    if model == services.model.served_name:
        return JSONResponse(_base(services))
    (name,) = prompt_names(services, model, None, None)
    record = await resolve_name(services, principal, name, Scope.PROMPTS_READ, "model")
    return JSONResponse(await _prompt(services, record, principal.tenant))


def _base(services: Services) -> dict[str, Any]:
    name = services.model.served_name
    return {
        "id": name,
        "object": "model",
        "created": int(services.started_at),
        "owned_by": "promptd",
        "root": name,
        "parent": None,
        "max_model_len": services.engine.engine.max_model_len,
    }


async def _prompt(services: Services, record: PromptRecord, viewer: str) -> dict[str, Any]:
    try:
        chain = [*await services.catalog.in_front(viewer, record), record]
        left = services.engine.engine.max_model_len - sum(_num_tokens(services, one) for one in chain)
    except PromptChainBrokenError:
        left = None
    return {
        "id": record.name_for(viewer),
        "object": "model",
        "created": record.created_at,
        "owned_by": record.tenant,
        "root": record.version,
        "parent": services.model.served_name,
        "max_model_len": left,  # behind all that it is served behind; null where that is not there any more
    }


def _num_tokens(services: Services, record: PromptRecord) -> int:
    text = record.manifest.get("text")
    return len(services.model.text_ids.of(text)) if text else record.num_virtual_tokens


async def tokenize_text(body: TokenizeBody, request: Request) -> Response:
    """Split a text into the base model's tokens."""
    services = services_of(request)
    ids = await tokenize(services, body.prompt, add_special_tokens=body.add_special_tokens)
    answer: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": services.engine.engine.max_model_len,
        "tokens": list(ids),
    }
    if body.return_token_strs:
        answer["token_strs"] = await asyncio.to_thread(_token_strs, services, ids)
    return JSONResponse(answer)


async def detokenize(body: DetokenizeBody, request: Request) -> Response:
    """Join tokens to a text."""
    services = services_of(request)
    for token_id in body.tokens:
        if not 0 <= token_id < services.model.spec.vocab_size:
            raise InvalidRequestError(f"tokens: {token_id} is not in the vocabulary", param="tokens")
    text = await asyncio.to_thread(services.model.decode, body.tokens, skip_special_tokens=False)
    return JSONResponse({"prompt": text})


def _token_strs(services: Services, ids: Sequence[int]) -> list[str]:
    strs = {one: services.model.decode([one], skip_special_tokens=False) for one in set(ids)}
    return [strs[one] for one in ids]
