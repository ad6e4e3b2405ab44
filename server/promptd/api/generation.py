"""From a body to running generations: parameters, submission, collection, usage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from promptd.api.error_handlers import ClientDisconnectedError
from promptd.api.named_prompts import NamedPrompts
from promptd.api.schemas import Sampling
from promptd.api.services import Services, new_id
from promptd.engine.request import (
    FinishReason,
    GenerateRequest,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)
from promptd.engine.stream import MAX_UNREAD, Stream
from promptd.errors import InvalidRequestError, PromptdError
from promptd.tenancy import Counts

_T = TypeVar("_T")
_MANY = MAX_UNREAD // 4


def sampling_params(
    body: Sampling,
    prompts: NamedPrompts,
    *,
    max_tokens: int,
    seed_offset: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Fill what the request leaves open from the prompt's defaults, then from ours."""
    manifest = prompts.last.manifest if prompts.last is not None else None
    values: dict[str, Any] = dict(manifest.default_sampling) if manifest is not None else {}
    for name in (
        "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "seed",
    ):  # fmt: skip
        given = getattr(body, name)
        if given is not None:
            values[name] = given
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    if stop is None:
        stop = list(manifest.stop) if manifest is not None else []
    values["max_tokens"] = max_tokens
    if body.min_tokens is None:  # a prompt's default gives way to the request's limit
        values["min_tokens"] = min(values.get("min_tokens", 0), max_tokens)
    values["top_k"] = max(0, values.get("top_k", 0))
    if values.get("seed") is not None:
        values["seed"] += seed_offset
    return SamplingParams(
        **values,
        stop=tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def max_tokens_of(body: Sampling, prompts: NamedPrompts, default: int) -> int:
    """The request's limit, else the prompt's, else ours."""
    if body.max_tokens is not None:
        return body.max_tokens
    manifest = prompts.last.manifest if prompts.last is not None else None
    return int(manifest.default_sampling.get("max_tokens", default)) if manifest is not None else default


@dataclass
class Choice:
    """One generation of a response."""

    index: int
    prompts: NamedPrompts
    token_ids: tuple[int, ...]
    max_tokens: int
    stream: Stream
    services: Services
    text: str = ""
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    last: RequestOutput | None = None
    sampled: float | None = None
    """When its newest token was chosen."""

    def take(self) -> list[RequestOutput]:
        """Take in what came since the last time; an error is the last of it."""
        outputs: list[RequestOutput] = self.stream.take()  # type: ignore[assignment] # of a generation
        for output in outputs:
            if output.error is None:
                self._add(output)
        return outputs

    def _add(self, output: RequestOutput) -> None:
        self.text += output.text
        self.output_ids += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        self.last = output
        if output.sampled is not None:
            if self.sampled is not None:
                self.services.observe_gap(output.sampled - self.sampled)
            self.sampled = output.sampled
        if output.is_last and output.timings is not None:
            self.services.observe(output.timings)
            reason = output.finish_reason
            self.prompts.trail.take(output, len(self.output_ids), None if reason is None else reason.value)

    @property
    def num_held_tokens(self) -> int:
        """What it holds of the server's tokens."""
        return _num_held(self.services, self.token_ids, self.max_tokens)

    @property
    def finish_reason(self) -> str:
        """OpenAI's word for it."""
        reason = self.last.finish_reason if self.last is not None else None
        return (reason or FinishReason.ABORT).value


async def submit(
    services: Services,
    prompts: NamedPrompts,
    inputs: Sequence[tuple[int, ...]],
    params: Sequence[SamplingParams],
    *,
    priority: int = 0,
) -> list[Choice]:
    """Start `len(params)` generations for every input; all or none. Raises what the engine refuses."""
    max_queue = services.engine.engine.config.max_queue
    if len(inputs) * len(params) > max_queue:  # not 503: it would never fit
        raise InvalidRequestError(
            f"{len(inputs)} prompts x n={len(params)} are more generations than the {max_queue} that may wait here",
            param="n",
        )
    num_written = len(inputs) * sum(own.max_tokens for own in params)
    num_held = sum(_num_held(services, one, own.max_tokens) for one in inputs for own in params)
    prompts.visit.hold_tokens(num_held)
    choices: list[Choice] = []
    try:
        await prompts.visit.reserve_tokens(sum(map(len, inputs)) + num_written)
        for token_ids in inputs:
            for own in params:
                request = GenerateRequest(
                    new_id("gen"), token_ids, own, prompts.artifacts, prompts.salt, prompts.num_public,
                    services.limits.request_timeout_seconds, prompts.share, priority,
                )  # fmt: skip
                stream = services.engine.submit(request)
                choices.append(Choice(len(choices), prompts, token_ids, own.max_tokens, stream, services))
    except PromptdError:
        prompts.visit.free_tokens(num_held)
        abort(choices)
        raise
    prompts.visit.watch(lambda: (prompts.counted_as, counts_of(choices, len(params))))
    return choices


def _num_held(services: Services, token_ids: Sequence[int], max_tokens: int) -> int:
    """Return what one generation takes of the server's tokens; what is longer than the model is refused by itself."""
    return min(len(token_ids) + max_tokens, services.engine.engine.max_model_len)


def counts_of(choices: Sequence[Choice], num_per_input: int) -> Counts:
    """Return what the answer's `usage` says, for the ledger."""
    told = usage(choices, num_per_input)
    return Counts(
        prompt_tokens=told["prompt_tokens"],
        completion_tokens=told["completion_tokens"],
        **told["prompt_tokens_details"],
    )


def abort(choices: Sequence[Choice]) -> None:
    """End what still runs."""
    for choice in choices:
        choice.stream.abort()


async def collect(request: Request, choices: Sequence[Choice]) -> None:
    """Run all choices to their end; abort them when one fails or the client goes away."""
    try:
        await while_connected(request, finish(choices))
    finally:
        abort(choices)


async def together(works: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Await all; where one fails or the caller is cancelled, the others are cancelled too."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def while_connected(request: Request, work: Awaitable[_T]) -> _T:
    """Await `work`, but give up when the client disconnects: the server never cancels a unary handler by itself."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnectedError("the client went away")
    finally:
        task.cancel()
        gone.cancel()


async def _until_gone(request: Request) -> None:
    """Wait for the client to disconnect; its body has been read already."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def arrivals(
    choices: Sequence[Choice], interval_seconds: float | None = 0.0
) -> AsyncGenerator[list[tuple[Choice, RequestOutput]], None]:
    """Yield what has come for any of the choices since the last time: one wake-up, however much that is.

    What comes within the interval behind it waits, with None until there is much of it; the end never does.
    Raises what ends one of them, after what came before it; aborts the rest then, and when the reader stops.
    """
    arrived = asyncio.Event()
    for choice in choices:
        choice.stream.arrived = arrived
    running = list(choices)
    try:
        while running:
            arrived.clear()
            came: list[tuple[Choice, RequestOutput]] = []
            failed: tuple[Choice, PromptdError] | None = None
            for choice in running:
                for output in choice.take():
                    if output.error is not None:
                        failed = choice, output.error
                    else:
                        came.append((choice, output))
            if interval_seconds != 0:
                for choice in running:
                    choice.stream.num_to_wake = _MANY if came else 1
            if came:
                yield came
            if failed is not None:
                choice, error = failed
                with choice.prompts.watching(choice.services, choice.token_ids):
                    raise error
            running = [choice for choice in running if not choice.stream.is_done]
            if running and not came:
                await arrived.wait()
            elif running and interval_seconds != 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(interval_seconds):
                        await arrived.wait()
    finally:
        abort(choices)


async def finish(choices: Sequence[Choice]) -> None:
    """Take in all that comes; nobody reads it before the end."""
    async for _ in arrivals(choices, None):
        pass


def timed_usage(choices: Sequence[Choice], num_per_input: int) -> dict[str, Any]:
    """Count tokens, and tell where the time went: a stream's headers were sent before that was known."""
    return {**usage(choices, num_per_input), "timings_ms": choices[0].prompts.trail.milliseconds()}


def usage(choices: Sequence[Choice], num_per_input: int) -> dict[str, Any]:
    """Count tokens: every input once, every output; virtual and cached tokens apart."""
    inputs = [choice.last for choice in choices[::num_per_input] if choice.last is not None]
    prompt_tokens = sum(output.num_prompt_tokens for output in inputs)
    completion_tokens = sum(len(choice.output_ids) for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(output.num_cached_tokens for output in inputs),
            "virtual_tokens": sum(output.num_virtual_tokens for output in inputs),
        },
    }
