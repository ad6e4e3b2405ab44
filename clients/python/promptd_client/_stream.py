"""A stream of replies, for both kinds of code: iterate over it, leave it early by closing it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Generic, TypeVar

import httpx

from promptd_client._replies import read_event
from promptd_client._requests import StreamCall
from promptd_client._sse import EventParser
from promptd_client.errors import ConnectionFailedError, StreamBrokenError

T = TypeVar("T")
_DONE = "[DONE]"


class _Reader(Generic[T]):
    """Bytes to replies, up to the last event."""

    def __init__(self, call: StreamCall[T]) -> None:
        self._call = call
        self._parser = EventParser()
        self.is_done = False

    def feed(self, chunk: bytes) -> Iterator[T]:
        for event in self._parser.feed(chunk):
            if event.data == _DONE:
                self.is_done = True
                return
            yield read_event(event, self._call.parse)

    def check_done(self) -> None:
        if not self.is_done:
            raise StreamBrokenError("the stream ended before its last event")


class Stream(Generic[T]):
    """Replies as they arrive. Closing it, or leaving its `with`, ends the generation on the server too."""

    def __init__(self, response: httpx.Response, call: StreamCall[T]) -> None:
        self._response = response
        self._replies = self._read(_Reader(call))

    def __iter__(self) -> Iterator[T]:
        return self._replies

    def __next__(self) -> T:
        return next(self._replies)

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._response.close()

    def _read(self, reader: _Reader[T]) -> Iterator[T]:
        try:
            for chunk in self._response.iter_bytes():
                yield from reader.feed(chunk)
                if reader.is_done:
                    return
            reader.check_done()
        except httpx.TransportError as error:
            raise StreamBrokenError(f"the stream was cut: {error}") from error
        except httpx.StreamError as error:
            raise ConnectionFailedError("the stream was closed") from error
        finally:
            self.close()


class AsyncStream(Generic[T]):
    """Replies as they arrive. Closing it, or leaving its `async with`, ends the generation on the server too."""

    def __init__(self, response: httpx.Response, call: StreamCall[T]) -> None:
        self._response = response
        self._replies = self._read(_Reader(call))

    def __aiter__(self) -> AsyncIterator[T]:
        return self._replies

    async def __anext__(self) -> T:
        return await anext(self._replies)

    async def __aenter__(self) -> AsyncStream[T]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Hang up."""
        await self._response.aclose()

    async def _read(self, reader: _Reader[T]) -> AsyncIterator[T]:
        try:
            async for chunk in self._response.aiter_bytes():
                for reply in reader.feed(chunk):
                    yield reply
                if reader.is_done:
                    return
            reader.check_done()
        except httpx.TransportError as error:
            raise StreamBrokenError(f"the stream was cut: {error}") from error
        except httpx.StreamError as error:
            raise ConnectionFailedError("the stream was closed") from error
        finally:
            await self.aclose()
