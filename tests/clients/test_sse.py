"""The parser of server-sent events."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from promptd_client._sse import MAX_EVENT_BYTES, Event, EventParser
from promptd_client.errors import InvalidReplyError

STREAM = 'data: {"a": 1}\n\n: ping\n\nevent: error\r\ndata: eins\r\ndata: zwölf\r\n\r\nid: 7\rdata:none\r\rdata: 終\n\n'
EVENTS = [Event('{"a": 1}'), Event("eins\nzwölf", "error"), Event("none"), Event("終")]


@given(st.lists(st.integers(1, len(STREAM.encode()) - 1)))
def test_chunks_may_break_anywhere(cuts: list[int]) -> None:
    """The events do not depend on where the bytes are cut: in a line, a CRLF or a character."""
    parser, raw = EventParser(), STREAM.encode()
    edges = [0, *sorted(set(cuts)), len(raw)]
    events = [event for start, end in itertools.pairwise(edges) for event in parser.feed(raw[start:end])]
    assert events == EVENTS


def test_single_bytes() -> None:
    """The worst cut of all."""
    parser = EventParser()
    assert [event for byte in STREAM.encode() for event in parser.feed(bytes([byte]))] == EVENTS


def test_an_unfinished_event_is_not_an_event() -> None:
    """Without its empty line, an event may lack data: it is dropped."""
    assert list(EventParser().feed(b"data: 1\n\ndata: 2\n")) == [Event("1")]


def test_a_stream_without_end_of_event_is_refused() -> None:
    """A server that never ends its event cannot fill the memory."""
    parser = EventParser()
    chunk = b"data: " + b"x" * (1 << 20)
    with pytest.raises(InvalidReplyError):
        for _ in range(MAX_EVENT_BYTES // len(chunk) + 2):
            list(parser.feed(chunk))
