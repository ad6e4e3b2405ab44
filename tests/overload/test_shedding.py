"""A full server's no costs it little: it is said before the route, and is the same that the route's guard would say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import structlog
from pydantic import SecretStr

from promptd import connections, logs
from promptd.api import guard, shedding
from promptd.api.routes import ROUTES
from promptd.connections import AbortableHttp
from tests.engine.harness import library
from tests.overload.conftest import Site, running
from tests.overload.wire import request_bytes
from tests.patience import PATIENCE_SECONDS, until

LIMIT = 10
FLOOD, OTHER, ADMIN = "key-of-the-flood", "key-of-the-other", "key-of-the-admin"
ASK = {"model": "tiny-llama", "prompt": [5, 6, 7], "max_tokens": 1}


@pytest.fixture(scope="module")
def site(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server for some tenants that has ten requests open at most."""
    keys = {"api_keys": SecretStr(f"flood:{FLOOD},other:{OTHER}"), "admin_key": SecretStr(ADMIN)}
    with running(model, tmp_path_factory.mktemp("shedding"), max_open_requests=LIMIT, **keys) as site:
        yield site


@contextlib.contextmanager
def full(site: Site, tenant: str) -> Iterator[None]:
    """A server of which one tenant has all that one can have."""
    requests = site.services.gate.budgets.requests
    until(lambda: site.is_idle, "what was answered has been given back")
    requests.take(tenant, requests.most_for_one)
    try:
        yield
    finally:
        requests.give_back(tenant, requests.most_for_one)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of requests for inference that the guard of their route looked at."""
    seen: list[str] = []
    admit = guard.admit

    async def admitting(route: guard.Route, request: guard.Request) -> None:
        if route.is_inference:
            seen.append(request.url.path)
        await admit(route, request)

    monkeypatch.setattr(guard, "admit", admitting)
    return seen


def post(site: Site, path: str = "/v1/completions", **headers: str) -> httpx.Response:
    """Ask."""
    return httpx.post(f"{site.url}{path}", json=ASK, headers=headers, timeout=30)


def told(answer: httpx.Response) -> tuple[object, ...]:
    """All of an answer but what is another one each time."""
    names = sorted(answer.headers.keys() - {"date", "x-request-id"})
    return answer.status_code, answer.json(), names, answer.headers["content-type"]


@pytest.mark.parametrize("path", sorted(route.path for route in ROUTES if route.is_inference and "{" not in route.path))
def test_the_guard_would_say_the_same(
    site: Site, guarded: list[str], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Status, body, headers, and what is counted, on every route that asks the model; without it the guard says so."""
    key = {"Authorization": f"Bearer {FLOOD}", "X-Request-Id": "mine"}
    counted = f'promptd_http_requests_total{{method="POST",route="{path}",status="503"}}'

    def count() -> float:
        lines = httpx.get(f"{site.url}/metrics", timeout=30).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(counted))

    before = count()
    with full(site, "flood"):
        early = post(site, path, **key)
        assert guarded == []
        monkeypatch.setattr(shedding, "_ROUTES", {})  # the control: nothing is refused early
        late = post(site, path, **key)
        assert guarded == [path]
    assert early.status_code == 503 and early.json()["error"]["code"] == "overloaded"
    assert 1 <= int(early.headers["retry-after"]) <= 3
    assert told(early) == told(late)
    assert early.headers["x-request-id"] == late.headers["x-request-id"] == "mine"
    assert count() == before + 2


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer nobody's"}, 401),
        ({"Authorization": f"Basic {FLOOD}"}, 401),
        ({"Authorization": f"Bearer {OTHER}"}, 200),
        ({"Authorization": f"Bearer {ADMIN}"}, 200),
    ],
)
def test_others_hear_what_they_always_hear(
    site: Site, guarded: list[str], headers: dict[str, str], status: int
) -> None:
    """A full server tells no more about a key than any other; who has room left gets it."""
    with full(site, "flood"):
        assert post(site, **headers).status_code == status
    assert guarded == ["/v1/completions"]


def test_issued_keys(site: Site, guarded: list[str]) -> None:
    """One that was seen is known without a look; a scope too few is told as such; a revoked one is nobody's at once."""
    with httpx.Client(base_url=site.url, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=30) as admin:
        made = admin.post("/admin/keys", json={"tenant": "issued"}).raise_for_status().json()
        other = admin.post("/admin/keys", json={"tenant": "issued", "scopes": ["train"]}).raise_for_status().json()
        key, narrow = ({"Authorization": f"Bearer {one['key']}"} for one in (made, other))
        assert [post(site, **one).status_code for one in (key, narrow)] == [200, 403]

        def refused_without_a_look() -> bool:
            guarded.clear()
            return post(site, **key).status_code == 503 and not guarded

        with full(site, "issued"):
            until(refused_without_a_look, "the guard looked at the key each time")  # it is known for less than a second
            assert (post(site, **narrow).status_code, guarded) == (403, ["/v1/completions"])
            admin.delete(f"/admin/keys/{made['id']}").raise_for_status()
            assert post(site, **key).status_code == 401


def test_an_open_server_still_looks_where_a_request_is_from(model: Path, tmp_path: Path, guarded: list[str]) -> None:
    """Without keys a page of another site is turned away, full or not."""
    with running(model, tmp_path, max_open_requests=LIMIT) as site, full(site, "default"):
        assert (post(site).status_code, guarded) == (503, [])
        foreign = post(site, Origin="https://elsewhere.example")
        assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "host_not_allowed")


def test_a_flood_makes_no_flood_of_lines(site: Site) -> None:
    """What was refused is one line a second with their number, and no request's; what was not has its line."""
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        with full(site, "other"):  # whom no other test refuses anything: what those left unwritten is in other lines
            for _ in range(5):
                assert post(site, Authorization=f"Bearer {OTHER}").status_code == 503
            assert post(site, Authorization=f"Bearer {FLOOD}").status_code == 200
        until(lambda: sum(line["count"] for line in lines if line.get("count") and line["tenant"] == "other") == 5)
        until(lambda: 200 in [line["status"] for line in lines if line["event"] == "request"], "the other's too")
    assert 503 not in [line["status"] for line in lines if line["event"] == "request"]
    refused = next(line for line in lines if line["event"] == "refused" and line["tenant"] == "other")
    assert {**refused, "count": 0} == {
        "event": "refused", "log_level": "info", "tenant": "other", "path": "/v1/completions", "status": 503,
        "code": "overloaded", "count": 0,
    }  # fmt: skip


def test_one_line_for_all_of_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused before the line is written is in it; what comes later is in the next one."""
    monkeypatch.setattr(logs, "_COUNT_SECONDS", 0.01)

    async def main() -> None:
        count = logs.RefusedCount()
        async with asyncio.timeout(PATIENCE_SECONDS):
            for number in (300, 2):
                for _ in range(number):
                    count.add("flood", "/v1/completions", 503, "overloaded")
                while count._counts:  # noqa: ASYNC110 - written by a timer
                    await asyncio.sleep(0.01)

    with structlog.testing.capture_logs() as lines:
        asyncio.run(main())
    assert [line["count"] for line in lines] == [300, 2]


def received(connection: socket.socket) -> tuple[bytes, bytes]:
    """Return the head and the body of the next answer."""
    came = b""
    while b"\r\n\r\n" not in came:
        came += connection.recv(1)
    length = int(came.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
    body = b""
    while len(body) < length:
        body += connection.recv(length - len(body))
    return came, body


def test_a_connection_goes_on_behind_a_refusal(site: Site, guarded: list[str]) -> None:
    """Refused before its body is here, which is dropped, however it is cut; then the same connection is served."""
    whole = request_bytes(ASK, key=FLOOD, keeps=True)
    head, _, body = whole.partition(b"\r\n\r\n")
    head += b"\r\n\r\n"
    with socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE_SECONDS) as connection:
        with full(site, "flood"):
            for pieces in ([whole], [head, body], [head, body[:5], body[5:]], [head + body[:7], body[7:]]):
                connection.sendall(pieces[0])
                told, said = received(connection)
                assert told.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") and b"connection" not in told.lower()
                assert json.loads(said)["error"]["code"] == "overloaded"
                for piece in pieces[1:]:
                    connection.sendall(piece)
                    time.sleep(0.02)  # by itself
            assert guarded == []
            connection.sendall(head + body[:-1])
            assert received(connection)[0].startswith(b"HTTP/1.1 503 ")
        connection.sendall(body[-1:] + whole)
        assert received(connection)[0].startswith(b"HTTP/1.1 200 ")
    assert guarded == ["/v1/completions"]


@pytest.mark.parametrize(
    "unlike",
    [
        pytest.param(lambda whole: whole + whole, id="two at once"),
        pytest.param(
            lambda whole: whole.replace(b"Host: localhost\r\n", b"Host: localhost\r\nHost: b\r\n"), id="twice"
        ),
        pytest.param(lambda whole: whole.replace(b"Content-Type", b"X-Name: \xe9\r\nContent-Type"), id="not ASCII"),
        pytest.param(
            lambda whole: whole.replace(b"Content-Type", b"Expect: 100-continue\r\nContent-Type"), id="expects"
        ),
        pytest.param(lambda whole: whole.replace(b"/v1/completions", b"/v1/completion%73"), id="escaped"),
    ],
)
def test_what_is_in_doubt_is_read_by_the_server(
    site: Site, guarded: list[str], unlike: Callable[[bytes], bytes]
) -> None:
    """It says the same, or that the request is none."""
    address = ("127.0.0.1", site.port)
    with full(site, "flood"), socket.create_connection(address, timeout=PATIENCE_SECONDS) as connection:
        connection.sendall(unlike(request_bytes(ASK, key=FLOOD, keeps=True)))
        head, _ = received(connection)
        if b" 100 " in head:
            head, _ = received(connection)
    assert head.startswith((b"HTTP/1.1 503 ", b"HTTP/1.1 400 "))
    assert guarded or b" 400 " in head


def test_who_closes_hears_the_end(site: Site, guarded: list[str]) -> None:
    """`Connection: close`: the refusal says so, too, and the connection ends, once the body is here."""
    whole = request_bytes(ASK, key=FLOOD)
    for num_late in (0, 3):
        with full(site, "flood"), socket.create_connection(("127.0.0.1", site.port), timeout=30) as connection:
            connection.sendall(whole[: len(whole) - num_late])
            head, _ = received(connection)
            assert head.startswith(b"HTTP/1.1 503 ") and b"\r\nconnection: close\r\n" in head.lower()
            if num_late:
                connection.sendall(whole[-num_late:] + whole)  # what comes behind the end is not read
            assert connection.recv(1) == b""
    assert guarded == []


def test_who_reads_no_refusals_is_cut_off(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client leaves unread holds its connection for a while behind its end, not for ever."""
    made: list[AbortableHttp] = []
    begin = AbortableHttp.connection_made

    def beginning(protocol: AbortableHttp, transport: asyncio.BaseTransport) -> None:
        protocol.timeout_keep_alive = 1
        begin(protocol, transport)
        made.append(protocol)

    monkeypatch.setattr(AbortableHttp, "connection_made", beginning)
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.2)
    whole = request_bytes(ASK, key=FLOOD, keeps=True)
    with full(site, "flood"), socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", site.port))
        until(lambda: made)
        end = time.monotonic() + PATIENCE_SECONDS
        while made[0].transport.get_write_buffer_size() == 0 and time.monotonic() < end:
            deaf.sendall(whole)
            time.sleep(0.002)
        assert made[0].transport.get_write_buffer_size() > 0
        until(lambda: made[0].transport.is_closing(), "it was idle for too long")
        until(lambda: made[0] not in made[0].connections, "and then it is gone")


def test_a_search_through_the_vocabulary_is_of_the_budget(site: Site, model: Path) -> None:
    """Reading costs next to nothing, this does not: where there is no room, 503, though it asks for no inference."""
    with httpx.Client(base_url=site.url, headers={"Authorization": f"Bearer {FLOOD}"}, timeout=30) as http:
        assert http.put("/v1/prompts/p", content=library(model)[0].content).status_code == 201
        assert http.get("/v1/prompts/p/neighbors").status_code == 200
        with full(site, "flood"):
            refused = http.get("/v1/prompts/p/neighbors")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert http.get("/v1/prompts/p").status_code == 200
    until(lambda: site.is_idle, "everything was given back")
