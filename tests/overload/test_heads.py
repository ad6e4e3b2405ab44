"""The reader of plain heads never sees another request in some bytes than the one by which the server would serve."""

from __future__ import annotations

import random

import h11
import pytest

from promptd.api.heads import Head, read_head

PLAIN = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 12\r\n\r\n"
PIECES = [
    b"POST", b"GET", b" ", b"  ", b"/", b"/v1/completions", b"/%20?x=1", b"*", b"HTTP/1.1", b"HTTP/1.0", b"\r\n",
    b"\n", b"\r", b"Host", b": ", b":", b" :", b"a", b"b:80", b"\t", b"Content-Length", b"content-length", b"12",
    b"+12", b"1 2", b"0x1", b"-1", b"", b"Transfer-Encoding", b"chunked", b"identity", b"Connection", b"close",
    b"keep-alive", b"Keep-Alive, close", b"Expect", b"100-continue", b"Upgrade", b"websocket", b"X-Request-Id",
    b"\x00", b"\x7f", b"\xe9", b"\x0b", b'"', b"(", b"Authorization", b"Bearer x", b"\r\n\r\n", b"\r\n ",
]  # fmt: skip


def of_h11(data: bytes) -> tuple[h11.Request, h11.Connection] | None:
    """What the server's own parser makes of it; None where it refuses or waits."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError:
        return None
    return (event, connection) if isinstance(event, h11.Request) else None


def agrees(data: bytes, head: Head) -> bool:
    """Whether both read the same request, and the same bytes behind it."""
    found = of_h11(data + b"x" * head.body_bytes + b"the next")
    if found is None:
        return False
    request, connection = found
    names = [(name.decode(), value.decode()) for name, value in request.headers]
    body = b""
    while isinstance(event := connection.next_event(), h11.Data):
        body += event.data
    wants_more = connection.their_state is not h11.MUST_CLOSE
    return (
        (request.method.decode(), request.target.decode(), request.http_version) == (head.method, head.target, b"1.1")
        and names == list(head.headers.items())
        and len(body) == head.body_bytes
        and connection.trailing_data[0] == b"the next"
        and not connection.they_are_waiting_for_100_continue
        and wants_more == (not head.closes)
    )


@pytest.mark.parametrize("seed", range(4))
def test_both_read_the_same(seed: int) -> None:
    """Thousands of heads, most of them a little wrong: what is read is read by h11, and as the same."""
    dice, num_read = random.Random(seed), 0
    for _ in range(5000):
        lines = PLAIN.split(b"\r\n")[:-2]
        if dice.random() < 0.5:
            lines.insert(dice.randrange(1, 4), dice.choice(PIECES) + b": " + dice.choice(PIECES))
        data = bytearray(b"\r\n".join(lines) + b"\r\n\r\n")
        for _ in range(dice.randrange(3)):
            at = dice.randrange(len(data))
            data[at : at + dice.randrange(3)] = dice.choice(PIECES)
        head = read_head(bytes(data))
        if head is not None:
            num_read += 1
            assert agrees(bytes(data[: head.num_bytes]), head), bytes(data)
    assert num_read > 500


def test_a_plain_head() -> None:
    """Names in lower case, values without the blanks around them; what follows the head is only counted."""
    data = b"POST /a?b HTTP/1.1\r\nHost:h\r\nX-Y: \t v w \r\nCONTENT-LENGTH: 3\r\nConnection: close\r\n\r\n"
    headers = {"host": "h", "x-y": "v w", "content-length": "3", "connection": "close"}
    assert read_head(data + b"abcd") == Head("POST", "/a?b", headers, len(data), 3, closes=True)


@pytest.mark.parametrize(
    "data",
    [
        PLAIN[:-1],
        PLAIN.replace(b"Host: a\r\n", b""),
        PLAIN.replace(b"1.1", b"1.0"),
        PLAIN.replace(b"12", b"12, 12"),
        PLAIN.replace(b"Host: a", b"Host: a\r\nhost: b"),
        PLAIN.replace(b"Host: a", b"Host: a\r\nTransfer-Encoding: chunked"),
        PLAIN.replace(b"Host: a", b"Host: a\r\n continued"),
        PLAIN.replace(b"Host: a", b"Host: a\r\nX: " + b"y" * (1 << 14)),
        PLAIN.replace(b"\r\n", b"\n"),
        b"\r\n" + PLAIN,
    ],
)
def test_doubts(data: bytes) -> None:
    """What could be read in two ways, or is not all here, is not read."""
    assert read_head(PLAIN) is not None
    assert read_head(data) is None
