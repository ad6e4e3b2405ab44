"""From a body that asks for training to a job that can run: rows, prompts and settings are looked at here."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

from fastapi import Request
from promptd_store import TARGET_TENSOR, PromptKind, PromptRecord, exact_name
from promptd_store.chains import check_front
from promptd_store.publication import check_publication

from promptd.api.job_schemas import MAX_ROWS, JobBody, JobFields
from promptd.api.named_prompts import prompt_names, resolve_chain, resolve_name
from promptd.api.services import Services
from promptd.errors import InvalidRequestError, NotFoundError, TrainingOffError
from promptd.jobs import JobQueue, JobRecord, JobRequest, JobSpec
from promptd.tenancy import Principal, Scope
from promptd.training.data import Example, TrainingDataError
from promptd.training.encoding import check_conversations
from promptd.training.job_spec import check_spec, distill_config, read_rows, with_label_words
from promptd.training.methods import METHODS
from promptd.training.plan import most_steps

MAX_KEY_CHARS = 255


def queue_of(services: Services) -> JobQueue:
    """Return the queue; raises `TrainingOffError` where this server has none."""
    if services.jobs is None:
        raise TrainingOffError("this server does not train: it was started with --training off")
    return services.jobs


def idempotency_key(request: Request) -> str | None:
    """Return the header `Idempotency-Key`: the same one never makes a second job."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= MAX_KEY_CHARS:
        raise InvalidRequestError(
            f"Idempotency-Key must have 1 to {MAX_KEY_CHARS} characters, got {len(key)}", param="idempotency-key"
        )
    return key


async def known_or_wanted(
    services: Services, principal: Principal, body: JobFields, *, name: str | None, key: str | None
) -> JobRecord | JobRequest:
    """Return the job that this key has created before, else what to create now.

    A new job is checked against its rows, its prompts and the trainer, and rows that came with it are stored. Every
    fault is a typed error that names the field; faults of rows name the line.
    """
    wish = body.model_dump_json().encode()
    known = None if key is None else await queue_of(services).created_before(principal.tenant, key, wish)
    if known is not None:
        return known
    spec, user = await _spec(services, principal, body, name), body.user
    if user is None and body.training_file is not None:
        user = (await services.files.get(principal.tenant, body.training_file)).user
    return JobRequest(spec, key, wish, principal.key_id, user)


async def _spec(services: Services, principal: Principal, body: JobFields, name: str | None) -> JobSpec:
    if name is not None:
        check_publication(principal.tenant, name, {services.model.served_name}, "private", None)
    if body.training_file is not None and body.rows is not None:
        raise InvalidRequestError("give either training_file or rows", param="training_file")
    if body.training_file is None and body.rows is None and body.distill is None:
        raise InvalidRequestError("give either training_file or rows, or distill", param="training_file")
    base = await _base_prompt(services, principal, body)
    behind = await _behind(services, principal, body, base)
    taught = await _taught(services, principal, body)
    distill = body.distill if taught is None else {**(body.distill or {}), "prompt": exact_name(taught)}
    settings = {name: getattr(body, name) for name in ("seed", "publish_worse", "metadata")}
    spec = JobSpec(
        method=body.method if body.method is not None else {"type": next(iter(METHODS))},
        name=name,
        settings={name: value for name, value in settings.items() if value is not None},
        training_file=body.training_file,
        validation_file=body.validation_file,
        base_prompt=None if base is None else exact_name(base),
        behind=tuple(map(exact_name, behind)),
        distill=distill,
        template=body.template,
        label_words=body.label_words,
        priority=body.priority or 0,
    )
    reads = taught or (behind[-1] if behind else None)
    if reads is not None and spec.template is None and spec.label_words is None:  # unless the job has a task of its own
        spec = replace(spec, template=reads.manifest["template"], label_words=reads.manifest["label_words"])
    check_spec(spec)
    distilled = distill_config(spec)
    if distilled is not None and body.rows is None and body.training_file is None:
        spec = replace(spec, num_steps=most_steps(spec, distilled.num_rows))
        return await _with_validation(services, principal, spec)
    if body.rows is None:
        rows = await _content(services, principal, "training_file", spec.training_file)
    else:
        rows = b"".join(json.dumps(row).encode() + b"\n" for row in body.rows)
        digest = await queue_of(services).put_rows(principal.tenant, rows)
        spec = replace(spec, rows_digest=digest, rows_bytes=len(rows))
    examples = await _examples(services, rows, spec, "rows" if spec.training_file is None else "training_file")
    spec = replace(spec, num_steps=most_steps(spec, len(examples)))
    spec = with_label_words(spec, examples, asks_for_word=not services.model.has_sources)
    return await _with_validation(services, principal, spec)


async def _with_validation(services: Services, principal: Principal, spec: JobSpec) -> JobSpec:
    """Return the job once the rows of its validation file are looked at."""
    if spec.validation_file is not None:
        held_out = await _content(services, principal, "validation_file", spec.validation_file)
        await _examples(services, held_out, spec, "validation_file")
    return spec


async def _base_prompt(services: Services, principal: Principal, body: JobFields) -> PromptRecord | None:
    """Return the version that the job starts from: `base_prompt`, or a prompt given as `model`."""
    named = prompt_names(services, body.model, None, None) if isinstance(body, JobBody) else []
    if named and body.base_prompt is not None:
        raise InvalidRequestError(
            f"the prompt to start from is named twice: model {named[0]!r}, base_prompt {body.base_prompt!r}",
            param="base_prompt",
        )
    name = named[0] if named else body.base_prompt
    if name is None:
        return None
    record = await resolve_name(services, principal, name, Scope.INFER, "model" if named else "base_prompt")
    if record.kind is PromptKind.TEXT:
        raise InvalidRequestError(
            f"base_prompt {name!r} is a text, which has no parameters to start from", param="base_prompt"
        )
    if any(tensor["name"] == TARGET_TENSOR for tensor in record.manifest["tensors"]):
        raise InvalidRequestError(
            f"base_prompt {name!r} has a part for the decoder, which training cannot start from: it would be lost",
            param="base_prompt",
        )
    return record


async def _taught(services: Services, principal: Principal, body: JobFields) -> PromptRecord | None:
    """Return the stored prompt that the teacher has in its context, where it is one."""
    name = (body.distill or {}).get("prompt")
    if not isinstance(name, str) or not name:
        return None
    return await resolve_name(services, principal, name, Scope.INFER, "distill.prompt")


async def _behind(
    services: Services, principal: Principal, body: JobFields, base: PromptRecord | None
) -> list[PromptRecord]:
    """Return the chain that the new prompt is trained behind: the one it names, else the one it starts from."""
    if body.behind is None:
        return [] if base is None else await services.catalog.in_front(principal.tenant, base)
    chain = await resolve_chain(services, principal, body.behind, "behind")
    check_front(chain, "private")
    return chain


async def _content(services: Services, principal: Principal, param: str, file_id: str | None) -> bytes:
    try:
        return await services.files.content(principal.tenant, file_id or "")
    except NotFoundError as error:
        raise InvalidRequestError(f"{param}: {error}", param=param, code=error.code) from None


async def _examples(services: Services, content: bytes, spec: JobSpec, param: str) -> list[Example]:
    try:
        examples = await asyncio.to_thread(read_rows, content, spec)
        if len(examples) > MAX_ROWS:
            raise TrainingDataError(
                examples[MAX_ROWS].line, f"at most {MAX_ROWS} rows make a job, here are {len(examples)}"
            )
        await asyncio.to_thread(check_conversations, services.model, examples)
        return examples
    except TrainingDataError as error:
        error.param = param
        raise
