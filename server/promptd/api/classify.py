"""`POST /v1/classify`: a classification head, or label words scored in one packed pass; in vLLM's shape."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from promptd.api.generation import together, while_connected
from promptd.api.named_prompts import NamedPrompts, prompt_names, resolve_prompts, to_tokens, tokenize
from promptd.api.schemas import ClassifyBody
from promptd.api.services import Services, new_id, services_of
from promptd.engine.ensemble import mean_probabilities, softmax
from promptd.engine.request import PoolOutput, PoolRequest, ScoreOutput, ScoreRequest
from promptd.errors import InvalidRequestError
from promptd.tenancy import Counts

Candidates = tuple[tuple[int, ...], ...]
"""The label words' tokens."""
_FIELDS: dict[str | None, str] = {"candidates": "labels", "prompt": "input"}
"""The engine's words for what this route calls otherwise."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What a prompt tells apart, and how."""

    names: tuple[str, ...]
    candidates: Candidates | None
    """Each label's word; None where a head scores the labels."""


async def create_classification(body: ClassifyBody, request: Request) -> Response:
    """Return each input's probabilities over the labels; with `ensemble` the mean over several prompts."""
    services = services_of(request)
    inputs: list[Any] = list(body.input) if isinstance(body.input, list) else [body.input]
    names = prompt_names(services, body.model, body.prompt_id, body.prompt_ids)
    if body.ensemble is not None and (body.prompt_id is not None or body.prompt_ids is not None):
        raise InvalidRequestError("ensemble names all its prompts itself", param="ensemble")
    chains = [[name] for name in body.ensemble] if body.ensemble is not None else [names]
    model_name = body.model or (names[0] if len(names) == 1 else services.model.served_name)
    members = [await resolve_prompts(services, request, chain, model_name, body.naming_field) for chain in chains]
    told = [await _labels(services, body, prompts) for prompts in members]
    if any(one.names != told[0].names for one in told):
        raise InvalidRequestError("the prompts of an ensemble must have the same labels", param="ensemble")
    # One request fills the next batch, never the queue: others find room in it.
    config = services.engine.engine.config
    turns = asyncio.Semaphore(max(1, min(config.max_num_seqs, config.max_queue // 2)))

    async def ask(prompts: NamedPrompts, own: Labels, text: Any) -> tuple[list[float], ScoreOutput | PoolOutput]:
        async with turns:
            return await label_probabilities(services, prompts, own.candidates, text, priority=body.priority)

    work = together(ask(prompts, own, text) for prompts, own in zip(members, told, strict=True) for text in inputs)
    results = await while_connected(request, work)
    labels = list(told[0].names)
    data, num_prompt, num_virtual, num_cached = [], 0, 0, 0
    for _, output in results:
        num_prompt += output.num_prompt_tokens
        num_virtual += output.num_virtual_tokens
        num_cached += output.num_cached_tokens
    for index in range(len(inputs)):
        probs = mean_probabilities([probs for probs, _ in results[index :: len(inputs)]])
        best = max(range(len(labels)), key=probs.__getitem__)
        data.append(
            {"index": index, "label": labels[best], "probs": probs, "num_classes": len(labels), "labels": labels}
        )
    return JSONResponse(
        {
            "id": new_id("classify"),
            "object": "list",
            "created": int(time.time()),
            "model": model_name,
            "prompt_versions": [version for prompts in members for version in prompts.versions],
            "data": data,
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": 0,
                "total_tokens": num_prompt,
                "prompt_tokens_details": {"cached_tokens": num_cached, "virtual_tokens": num_virtual},
            },
        }
    )


async def _labels(services: Services, body: ClassifyBody, prompts: NamedPrompts) -> Labels:
    """The prompt's own head, else label words, else the base model's head."""
    own = prompts.last.class_labels if prompts.last is not None else None
    if own is not None and not isinstance(body.labels, dict):
        if body.labels is not None and len(body.labels) != len(own):
            raise InvalidRequestError(
                f"labels names {len(body.labels)} classes, this prompt's head has {len(own)}", param="labels"
            )
        return Labels(tuple(body.labels or own), None)
    base = services.model.class_labels
    has_words = body.labels is not None or (prompts.last is not None and bool(prompts.last.manifest.label_words))
    if base is not None and not has_words:
        return Labels(base, None)
    words = _label_words(body, prompts)
    return Labels(tuple(words), await label_candidates(services, words))


def _label_words(body: ClassifyBody, prompts: NamedPrompts) -> dict[str, str]:
    """Label -> the text that is scored: from the request, else from the prompt."""
    if isinstance(body.labels, dict):
        return body.labels
    if body.labels is not None:
        if len(set(body.labels)) != len(body.labels):
            raise InvalidRequestError(f"labels repeat: {body.labels!r}", param="labels")
        return {label: label for label in body.labels}
    manifest = prompts.last.manifest if prompts.last is not None else None
    if manifest is None or not manifest.label_words:
        raise InvalidRequestError(
            "this prompt has no label words; give 'labels' (a list, or an object of label: text)", param="labels"
        )
    return dict(manifest.label_words)


async def label_candidates(services: Services, words: Mapping[str, str]) -> Candidates:
    """Tokenize the label words, once for all inputs."""
    candidates = []
    for label, word in words.items():
        candidates.append(await tokenize(services, word, add_special_tokens=False))
        if not candidates[-1]:
            raise InvalidRequestError(f"labels: the text of {label!r} has no tokens", param="labels")
    return tuple(candidates)


async def label_probabilities(
    services: Services, prompts: NamedPrompts, candidates: Candidates | None, text: Any, *, priority: int = 0
) -> tuple[list[float], ScoreOutput | PoolOutput]:
    """Score the labels of one input in one pass: by their words, or by a head where there are none."""
    token_ids = await to_tokens(services, prompts, text, apply_template=True, param="input")
    await prompts.visit.reserve_tokens(len(token_ids))
    seconds = services.limits.request_timeout_seconds
    rest = (prompts.artifacts, prompts.salt, prompts.num_public, seconds, prompts.share, priority)
    try:
        with prompts.watching(services, token_ids):
            if candidates is None:
                classes = await services.engine.pool(PoolRequest(new_id("pool"), token_ids, "classes", *rest))
                count_output(prompts, classes)
                return softmax(classes.values), classes
            output = await services.engine.score(ScoreRequest(new_id("score"), token_ids, candidates, *rest))
    except InvalidRequestError as error:
        error.param = _FIELDS.get(error.param) or error.param
        raise
    count_output(prompts, output)
    return softmax(output.logprobs), output


def count_output(prompts: NamedPrompts, output: ScoreOutput | PoolOutput) -> None:
    """Note what one input took: for the trail now, for the ledger when the request ends."""
    prompts.trail.take(output)
    counts = Counts(
        prompt_tokens=output.num_prompt_tokens,
        virtual_tokens=output.num_virtual_tokens,
        cached_tokens=output.num_cached_tokens,
    )
    prompts.visit.watch(lambda: (prompts.counted_as, counts))
