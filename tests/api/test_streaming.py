"""Streams of events: what waits leaves together, past the middleware; a slow stream is not taken for a stuck one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from promptd.api.chunks import ChunkFrame, id_list
from promptd.api.generation import Choice, arrivals, finish
from promptd.api.sse import event_stream, to_json
from promptd.api.stalls import ABORT, without_stalls
from promptd.api.wire import WIRE, KeepWire
from promptd.engine.request import FinishReason, Output, RequestOutput
from promptd.engine.stream import Stream
from promptd.errors import NumericalError, OverloadedError
from tests.patience import PATIENCE_SECONDS

SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "asgi": {"spec_version": "2.3"}}


async def never() -> Message:
    """A client that stays and says nothing."""
    await asyncio.Event().wait()
    raise AssertionError("it has waited for ever")


async def of(*batches: list[str], error: Exception | None = None) -> AsyncGenerator[list[str], None]:
    """Batches, and perhaps what ends them."""
    for batch in batches:
        yield batch
    if error is not None:
        raise error


def sent_by(batches: AsyncGenerator[list[str], None]) -> tuple[list[Message], list[str]]:
    """Stream through a layer that counts; return what the server sent, and the kinds of what passed the layer."""
    wire: list[Message] = []
    passed: list[str] = []

    async def layer(scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            passed.append(message["type"])
            await send(message)

        await event_stream(batches)(scope, receive, counted)

    async def server(message: Message) -> None:
        wire.append(message)

    asyncio.run(KeepWire(layer)(dict(SCOPE), never, server))
    return wire, passed


def test_events_pass_no_layer_but_the_server() -> None:
    """Each layer sees how an answer begins; a batch leaves in one piece, in order, and the end behind it."""
    wire, passed = sent_by(of(['{"a":1}', '{"a":2}'], ['{"a":3}']))
    assert passed == ["http.response.start"]
    assert [message["type"] for message in wire] == ["http.response.start", *["http.response.body"] * 4]
    assert [message.get("body") for message in wire[1:]] == [
        b'data: {"a":1}\n\ndata: {"a":2}\n\n', b'data: {"a":3}\n\n', b"data: [DONE]\n\n", b"",
    ]  # fmt: skip
    assert [message["more_body"] for message in wire[1:]] == [True, True, True, False]


def test_a_text_ends_no_line_of_its_event() -> None:
    """Every character that some reader takes for a line's end is escaped: httpx's `iter_lines` gives whole events."""
    text = "".join(map(chr, range(0x100))) + "\u2028\u2029\U0001f600"
    wire, _ = sent_by(of([to_json({"text": text})]))
    lines = list(httpx.Response(200, content=b"".join(message.get("body", b"") for message in wire)).iter_lines())
    assert lines[1:] == ["", "data: [DONE]", ""]
    assert json.loads(lines[0].removeprefix("data: ")) == {"text": text}
    assert "\xe9" in lines[0] and "\U0001f600" in lines[0], "what ends no line stays as it is"


def test_an_error_is_the_last_event() -> None:
    """What came before it is sent, `[DONE]` is not."""
    wire, _ = sent_by(of(['{"a":1}'], error=OverloadedError("full")))
    events = [message["body"].decode() for message in wire[1:] if message["body"]]
    assert events[0] == 'data: {"a":1}\n\n' and len(events) == 2
    assert json.loads(events[1].removeprefix("data: "))["error"]["message"] == "full"


def test_a_client_that_left_before_the_answer() -> None:
    """Nothing was asked of the events yet; who made them hears of the end all the same, once."""
    ended: list[str] = []

    async def gone() -> Message:
        return {"type": "http.disconnect"}

    async def nowhere(message: Message) -> None:
        await never()

    async def main() -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await event_stream(of(["{}"]), on_end=lambda: ended.append("end"))(dict(SCOPE), gone, nowhere)

    asyncio.run(main())
    assert ended == ["end"]


@pytest.mark.parametrize("text", ["plain", 'a "quote" \\ and\nlines\r\n\t', "\u2028 é 😀 \x00\x7f", "</script>"])
def test_chunks_are_json(text: str) -> None:
    """What is put together by hand reads as what a JSON writer makes, whatever the text; an event stays one line."""
    header = {"id": "cmpl-1", "model": text}
    piece = f'{{"index":0,"text":{to_json(text)},"token_ids":{id_list([1, 22, 333])}}}'
    told = {"index": 0, "text": text, "token_ids": [1, 22, 333]}
    for with_usage, more in ((False, {}), (True, {"usage": None})):
        frame = ChunkFrame(header, with_usage=with_usage)
        assert json.loads(frame.around(piece)) == {**header, "choices": [told], **more}
        assert not {"\n", "\r"} & set(frame.around(piece))
        assert json.loads(frame.with_usage({"total_tokens": 3})) == {
            **header, "choices": [], "usage": {"total_tokens": 3},
        }  # fmt: skip


def choices_of(aborted: list[str], *names: str) -> list[Choice]:
    """Choices whose outputs the test delivers by hand."""
    unused: Any = SimpleNamespace()
    prompts: Any = SimpleNamespace(watching=lambda services, token_ids: nullcontext())
    return [Choice(at, prompts, (5,), 9, Stream(name, aborted.append), unused) for at, name in enumerate(names)]


def test_what_waits_is_read_in_one_go() -> None:
    """One wake-up for all that came; then the next output is waited for; an error ends the others, behind the rest."""
    aborted: list[str] = []

    async def main() -> None:
        first, second, third = choices = choices_of(aborted, "a", "b", "c")
        for number in range(3):
            for choice in (first, second):
                choice.stream.deliver(RequestOutput(choice.stream.request_id, text=str(number), token_ids=(number,)))
        batches = arrivals(choices)
        found = await anext(batches)
        assert [(choice.index, output.text) for choice, output in found] == [
            (0, "0"), (0, "1"), (0, "2"), (1, "0"), (1, "1"), (1, "2"),
        ]  # fmt: skip
        assert (first.text, first.output_ids) == ("012", [0, 1, 2])
        following = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0)
        assert not following.done()
        last = RequestOutput("b", finish_reason=FinishReason.LENGTH)
        second.stream.deliver(last)
        assert await following == [(second, last)]
        first.stream.deliver(RequestOutput("a", text="3"))
        first.stream.deliver(RequestOutput("a", error=NumericalError("not finite")))
        assert [output.text for _, output in await anext(batches)] == ["3"]
        with pytest.raises(NumericalError):
            await anext(batches)
        assert third.stream.is_done

    asyncio.run(main())
    assert aborted == ["c"], "what had ended is not ended again"


def test_a_whole_answer_is_taken_in_with_few_wake_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what nobody reads before its end most wakes nobody, and all of it is there. Control: a stream's reader."""
    takes: list[int] = []
    take = Stream.take

    def counted(stream: Stream) -> list[Output]:
        taken = take(stream)
        takes.append(len(taken))
        return taken

    async def read(by: Callable[[Sequence[Choice]], Awaitable[None]]) -> int:
        takes.clear()
        (choice,) = choices_of([], "a")
        reading = asyncio.ensure_future(by([choice]))
        for number in range(200):
            choice.stream.deliver(RequestOutput("a", token_ids=(number,)))
            for _ in range(3):  # the reader may come after each of them
                await asyncio.sleep(0)
        choice.stream.deliver(RequestOutput("a", finish_reason=FinishReason.LENGTH))
        async with asyncio.timeout(PATIENCE_SECONDS):
            await reading
        assert choice.output_ids == list(range(200))
        return sum(map(bool, takes))

    async def stream(choices: Sequence[Choice]) -> None:
        async for _ in arrivals(choices):
            pass

    async def main() -> None:
        assert await read(finish) <= 6
        assert await read(stream) == 201

    monkeypatch.setattr(Stream, "take", counted)
    asyncio.run(main())


def test_an_interval_keeps_tokens_together() -> None:
    """The first comes at once; those behind it with the end, or once the interval is over; a late one at once again."""

    async def texts(batches: AsyncGenerator[list[tuple[Choice, RequestOutput]], None]) -> list[str]:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return [output.text for _, output in await anext(batches)]

    async def main() -> None:
        (choice,) = choices_of([], "a")
        batches = arrivals([choice], 3600.0)
        choice.stream.deliver(RequestOutput("a", text="0"))
        assert await texts(batches) == ["0"]
        following = asyncio.ensure_future(texts(batches))
        for text in "12":
            choice.stream.deliver(RequestOutput("a", text=text))
            for _ in range(5):
                await asyncio.sleep(0)
        assert not following.done()
        choice.stream.deliver(RequestOutput("a", text="3", finish_reason=FinishReason.LENGTH))
        assert await following == ["1", "2", "3"]

        (choice,) = choices_of([], "b")
        batches = arrivals([choice], 0.001)
        for text in "01":
            choice.stream.deliver(RequestOutput("b", text=text))
            assert await texts(batches) == [text]
        following = asyncio.ensure_future(texts(batches))
        await asyncio.sleep(0.01)
        choice.stream.deliver(RequestOutput("b", text="2"))
        assert await following == ["2"]
        await batches.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("way", ["send", "wire"])
def test_a_long_stream_is_not_a_stuck_one(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that leave one by one may take for ever together; one that does not leave ends it, and not before."""
    now, cut = 0.0, list[float]()

    async def main() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
        leaves = asyncio.Semaphore(0)

        async def server(message: Message) -> None:
            await leaves.acquire()

        scope: dict[str, Any] = {"state": {ABORT: lambda: cut.append(now)}, WIRE: server}

        async def talk(receive: Receive, send: Send) -> None:
            while True:
                await (send if way == "send" else scope[WIRE])({"type": "http.response.body"})

        async def at(moment: float) -> None:
            nonlocal now
            now = moment
            for _ in range(20):
                await asyncio.sleep(0)

        task = asyncio.create_task(without_stalls(scope, never, server, talk, 30.0))
        for moment in (0.0, 20.0, 49.0, 78.0, 79.0, 108.5):
            await at(moment)
            leaves.release()
            await at(moment)
        await at(138.4)
        assert not task.done() and cut == []
        await at(138.6)
        assert task.done() and cut == [138.6]

    asyncio.run(main())


def test_a_time_out_of_the_answer_itself_is_no_stall() -> None:
    """It goes on to whoever handles errors, and nothing is cut."""
    cut: list[str] = []

    async def fail(receive: Receive, send: Send) -> None:
        raise TimeoutError

    async def main() -> None:
        scope: dict[str, Any] = {"state": {ABORT: lambda: cut.append("cut")}}
        with pytest.raises(TimeoutError):
            await without_stalls(scope, never, never, fail, 30.0)  # type: ignore[arg-type] # nothing is sent

    asyncio.run(main())
    assert cut == []
