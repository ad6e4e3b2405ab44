"""Streamed generations: a chunk for every step of every choice, written by hand: it is what a stream does most."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from fastapi.responses import StreamingResponse

from promptd.api.generation import Choice, abort, arrivals, timed_usage
from promptd.api.schemas import Sampling
from promptd.api.services import Services
from promptd.api.sse import event_stream, to_json
from promptd.engine.request import RequestOutput

Writer = Callable[[Choice, RequestOutput], str]
"""Writes what a step adds to a choice as JSON, for `choices[…]`."""


def chunk_stream(
    services: Services,
    body: Sampling,
    choices: Sequence[Choice],
    header: Mapping[str, Any],
    write: Writer,
    first: Iterable[str] = (),
) -> StreamingResponse:
    """Answer with `first`, each a choice as JSON; what comes for any of the choices; and the usage where it is wanted.

    The choices are aborted when the answer ends, however it does.
    """
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    frame = ChunkFrame(header, with_usage=with_usage)

    async def batches() -> AsyncGenerator[list[str], None]:
        if opening := list(map(frame.around, first)):
            yield opening
        async for batch in arrivals(choices, services.limits.stream_interval_seconds):
            yield [frame.around(write(choice, output)) for choice, output in batch]
        if with_usage:
            yield [frame.with_usage(timed_usage(choices, body.n))]

    return event_stream(batches(), on_end=partial(abort, choices))


class ChunkFrame:
    """What all chunks of a stream have in common, serialised once."""

    def __init__(self, header: Mapping[str, Any], *, with_usage: bool) -> None:
        self._front = to_json(header)[:-1] + ',"choices":['
        self._end = '],"usage":null}' if with_usage else "]}"

    def around(self, choice: str) -> str:
        """Return the chunk of one choice, which is JSON already."""
        return f"{self._front}{choice}{self._end}"

    def with_usage(self, usage: Mapping[str, Any]) -> str:
        """Return the last chunk, which has no choice."""
        return f'{self._front}],"usage":{to_json(usage)}}}'


def id_list(token_ids: Iterable[int]) -> str:
    """Serialise token ids."""
    return f"[{','.join(map(str, token_ids))}]"
