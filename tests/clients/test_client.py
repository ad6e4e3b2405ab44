"""Both clients against a scripted transport: what goes out, what comes back, and what is sent twice."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import stamina
from promptd_client import (
    AsyncClient,
    Client,
    ConnectionFailedError,
    InvalidReplyError,
    LocalFileError,
    OverloadedError,
    ServerError,
    StreamBrokenError,
)

from tests.clients.wire import COMPLETION, PROMPT, Answer, Script, cut_events, error, events, reply


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    with stamina.set_testing(True, attempts=4, cap=True):
        yield


def _sync(method: str, script: Script, *args: Any, **options: Any) -> Any:
    with Client("http://server/v1", api_key="key", transport=script) as client:
        return _method(client, method)(*args, **options)


def _async(method: str, script: Script, *args: Any, **options: Any) -> Any:
    async def call() -> Any:
        async with AsyncClient("http://server/v1", api_key="key", transport=script) as client:
            return await _method(client, method)(*args, **options)

    return anyio.run(call)


def _method(client: Client | AsyncClient, method: str) -> Callable[..., Any]:
    target: Any = client
    for name in method.split("."):
        target = getattr(target, name)
    assert callable(target)
    return target


@pytest.fixture(params=[_sync, _async], ids=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Call a method of either client, by its name."""
    caller: Callable[..., Any] = request.param
    return caller


SCORES = {"subject": "alice", "metrics": {"accuracy": 1.0}, "num_rows": 1, "num_inputs": 1}
EVALUATION = {"id": "eval-1", "created": 1, "prompt": SCORES, "bare_model": SCORES, "majority_class": None}

CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any], Any, tuple[str, str], dict[str, Any] | None]] = [
    (
        "complete",
        ("Hello",),
        {"model": "alice", "max_tokens": 4, "extra_body": {"priority": 1}},
        COMPLETION,
        ("POST", "/v1/completions"),
        {"prompt": "Hello", "model": "alice", "max_tokens": 4, "priority": 1},
    ),
    (
        "prompts.neighbors",
        ("alice",),
        {"count": 1},
        {"data": [{"index": 0, "neighbors": [{"token_id": 3, "token": " the", "cosine": 0.5}]}]},
        ("GET", "/v1/prompts/alice/neighbors"),
        None,
    ),
    ("tokenize", ("Hello",), {}, {"tokens": [1], "count": 1}, ("POST", "/tokenize"), None),
    ("detokenize", ([1, 2],), {}, {"prompt": "Hello"}, ("POST", "/detokenize"), {"tokens": [1, 2]}),
    ("models", (), {}, {"data": [{"id": "demo", "parent": None}]}, ("GET", "/v1/models"), None),
    ("prompts.list", (), {}, {"data": [PROMPT]}, ("GET", "/v1/prompts"), None),
    ("prompts.get", ("alice@3",), {}, PROMPT, ("GET", "/v1/prompts/alice@3"), None),
    ("prompts.versions", ("alice",), {}, {"data": [PROMPT]}, ("GET", "/v1/prompts/alice/versions"), None),
    ("prompts.rollback", ("alice", 2), {}, PROMPT, ("POST", "/v1/prompts/alice/rollback"), {"to": 2}),
    (
        "prompts.evaluate",
        ("alice", [{"text": "x", "label": "a"}]),
        {"return_predictions": True},
        EVALUATION,
        ("POST", "/v1/prompts/alice/evaluate"),
        {"rows": [{"text": "x", "label": "a"}], "answer_by": "score", "return_predictions": True},
    ),
    ("prompts.delete", ("alice",), {}, {}, ("DELETE", "/v1/prompts/alice"), None),
    ("version", (), {}, {"version": "0.1.0"}, ("GET", "/version"), None),
]


@pytest.mark.parametrize(("method", "args", "options", "given", "line", "body"), CALLS, ids=[one[0] for one in CALLS])
def test_requests(
    call: Callable[..., Any],
    method: str,
    args: tuple[Any, ...],
    options: dict[str, Any],
    given: Any,
    line: tuple[str, str],
    body: dict[str, Any] | None,
) -> None:
    """Every method sends its method, path, key and body, also where the address ends in /v1."""
    script = Script([reply(given)])
    call(method, script, *args, **options)
    (request,) = script.requests
    assert (request.method, request.url.path) == line
    assert request.headers["authorization"] == "Bearer key"
    if body is not None:
        assert json.loads(request.content) == body


@pytest.mark.parametrize(
    ("options", "header"),
    [
        ({"prompt_id": "acme/alice@3"}, "acme/alice@3"),
        ({"prompt_ids": ["task", "alice"]}, "task>alice"),
        ({"model": "base:alice"}, "alice"),
        ({"prompt_id": "a\r\nHost: evil"}, "a%0D%0AHost:%20evil"),
        ({"prompt_id": "x" * 10_000}, "x" * 512),
        ({"model": "base"}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("method", ["complete", "stream", "classify"])
def test_a_load_balancer_sees_the_prompt(
    call: Callable[..., Any], method: str, options: dict[str, Any], header: str | None
) -> None:
    """Requests under a prompt carry its name in a header, whatever is in it; the bare model's do not."""
    answers = {
        "complete": reply(COMPLETION),
        "stream": events(COMPLETION),
        "classify": reply({"id": "c", "model": "m", "data": []}),
    }
    script = Script([answers[method]])
    call(method, script, "Hello", **options)
    assert script.requests[0].headers.get("x-prompt-id") == header


def test_a_name_cannot_leave_its_path(call: Callable[..., Any]) -> None:
    """Dots and questions in a name stay a name on the wire."""
    script = Script([OK_PROMPT])
    call("prompts.get", script, "a?b#c%2f..")
    assert script.requests[0].url.raw_path == b"/v1/prompts/a%3Fb%23c%252f.."


@pytest.mark.parametrize("name", ["", "..", "../models", "a//b"])
def test_dots_are_not_a_name(call: Callable[..., Any], name: str) -> None:
    """A path that a proxy would fold into another route is refused here."""
    script = Script([OK_PROMPT])
    with pytest.raises(ValueError, match="not the name of a prompt"):
        call("prompts.delete", script, name)
    assert not script.requests


def test_lists_are_read_to_their_end(call: Callable[..., Any]) -> None:
    """Pages are put together: each asks for what follows the last name of the one before."""
    pages = [{"data": [PROMPT | {"id": name}], "has_more": name != "c"} for name in "abc"]
    script = Script([reply(page) for page in pages])
    assert [prompt.name for prompt in call("prompts.list", script)] == ["a", "b", "c"]
    assert [request.url.params.get("after") for request in script.requests] == [None, "a", "b"]


def test_a_prompt_knows_its_etag(call: Callable[..., Any]) -> None:
    """The ETag of a reply is what `if_match` takes."""
    assert call("prompts.get", Script([reply(PROMPT, ETag='"7-ab"')]), "alice").etag == "7-ab"


def test_a_reply_of_another_shape_is_an_error(call: Callable[..., Any]) -> None:
    """A reply that is not this API's is said so, not passed on half read."""
    for answer in (reply("<html>"), reply({"choices": 3})):
        with pytest.raises(InvalidReplyError):
            call("complete", Script([answer]), "Hello")
    with pytest.raises(InvalidReplyError, match="data"):
        call("prompts.list", Script([reply({})]))


def test_streams_yield_every_event(call: Callable[..., Any]) -> None:
    """A stream yields each event and ends at [DONE]."""
    parts = [COMPLETION | {"choices": [{"index": 0, "text": text}]} for text in ("a", "b")]
    script = Script([events(*parts, COMPLETION | {"choices": []})])
    assert _texts(call, script) == ["a", "b", ""]
    assert json.loads(script.requests[0].content)["stream"] is True


def test_a_stream_without_its_end_is_broken(call: Callable[..., Any]) -> None:
    """A stream that stops before [DONE] raises after what came, and is not asked for again."""
    for answer in (events(COMPLETION, ends=False), cut_events(COMPLETION)):
        script = Script([answer])
        with pytest.raises(StreamBrokenError):
            _texts(call, script)
        assert len(script.requests) == 1


def test_an_error_inside_a_stream_is_raised(call: Callable[..., Any]) -> None:
    """An error event becomes the typed error."""
    script = Script([events(COMPLETION, {"error": {"message": "m", "code": "overloaded", "type": "server_error"}})])
    with pytest.raises(OverloadedError):
        _texts(call, script)
    assert len(script.requests) == 1


def _texts(call: Callable[..., Any], script: Script) -> list[str]:
    if call is _sync:
        with Client("http://server", transport=script) as client, client.stream("Hello") as stream:
            return [event.text for event in stream]

    async def run() -> list[str]:
        async with AsyncClient("http://server", transport=script) as client, await client.stream("Hello") as stream:
            return [event.text async for event in stream]

    return anyio.run(run)


REFUSED = error(503, "overloaded", **{"Retry-After": "1"})
OK = reply(COMPLETION)
OK_PROMPT = reply(PROMPT)


@pytest.mark.parametrize(
    ("method", "args", "first", "last", "num_requests"),
    [
        ("complete", ("Hello",), REFUSED, OK, 2),
        ("complete", ("Hello",), httpx.ConnectError("refused"), OK, 2),
        ("prompts.get", ("alice",), error(502, "bad"), OK_PROMPT, 2),
        ("prompts.get", ("alice",), httpx.ReadError("reset"), OK_PROMPT, 2),
        ("prompts.upload", ("alice", b"x"), httpx.ReadTimeout("slow"), OK_PROMPT, 2),
        ("prompts.rollback", ("alice", 1), httpx.ReadError("reset"), OK_PROMPT, 2),
    ],
)
def test_what_is_sent_again(
    call: Callable[..., Any], method: str, args: tuple[Any, ...], first: Answer, last: Answer, num_requests: int
) -> None:
    """Refusals with Retry-After, connections that never were, and lost replies of idempotent calls are repeated."""
    script = Script([first, last])
    call(method, script, *args)
    assert len(script.requests) == num_requests


@pytest.mark.parametrize(
    ("method", "args", "answer", "raised"),
    [
        ("complete", ("Hello",), httpx.ReadError("reset"), ConnectionFailedError),
        ("complete", ("Hello",), error(503, "engine_dead"), ServerError),
        ("complete", ("Hello",), error(500, "internal_error", **{"Retry-After": "1"}), ServerError),
        ("complete", ("Hello",), error(503, "overloaded", **{"Retry-After": "3600"}), OverloadedError),
        ("prompts.delete", ("alice",), httpx.ReadError("reset"), ConnectionFailedError),
        ("prompts.get", ("alice",), error(500, "internal_error"), ServerError),
    ],
)
def test_what_is_sent_once(
    call: Callable[..., Any], method: str, args: tuple[Any, ...], answer: Answer, raised: type[Exception]
) -> None:
    """What may have been done already, or would be refused for long, is never repeated."""
    script = Script([answer])
    with pytest.raises(raised):
        call(method, script, *args)
    assert len(script.requests) == 1


def test_a_conditional_upload_is_sent_once(call: Callable[..., Any]) -> None:
    """After a lost reply, If-Match no longer tells who moved the name: the caller decides."""
    script = Script([httpx.ReadError("reset"), OK_PROMPT])
    with pytest.raises(ConnectionFailedError):
        call("prompts.upload", script, "alice", b"x", if_match="3-00")
    assert script.requests[0].headers["if-match"] == '"3-00"'


def test_a_stream_is_repeated_only_before_it_starts(call: Callable[..., Any]) -> None:
    """A refusal of a stream is repeated like any other; the stream itself was never open."""
    script = Script([REFUSED, events(COMPLETION)])
    assert _texts(call, script) == [" world"]
    assert len(script.requests) == 2


def test_retries_end(call: Callable[..., Any]) -> None:
    """A server that stays full gets its error passed on."""
    script = Script([REFUSED])
    with pytest.raises(OverloadedError) as caught:
        call("complete", script, "Hello")
    assert len(script.requests) == 4
    assert caught.value.retry_after_seconds == 1.0


def test_ready_never_raises(call: Callable[..., Any]) -> None:
    """Readiness is a question with two answers."""
    assert call("is_ready", Script([reply({})])) is True
    assert call("is_ready", Script([error(503, "shutting_down")])) is False
    assert call("is_ready", Script([httpx.ConnectError("refused")])) is False


def _folder(root: Path, name: str, weights: bytes | None = b"weights") -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}, indent=2))
    if weights is not None:
        (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def test_a_peft_folder_is_one_call(call: Callable[..., Any], tmp_path: Path) -> None:
    """The weights are the body, byte for byte; the configuration goes with them."""
    script = Script([OK_PROMPT])
    prompt = call("prompts.upload_peft", script, "alice", _folder(tmp_path, "alice"))
    (request,) = script.requests
    assert (request.method, request.url.path, request.content) == ("PUT", "/v1/prompts/alice", b"weights")
    config = base64.urlsafe_b64decode(request.headers["x-promptd-adapter-config"])
    assert config == (tmp_path / "alice" / "adapter_config.json").read_bytes()
    assert (prompt.name, prompt.number) == ("alice", 3)


def test_a_pickle_is_never_sent(call: Callable[..., Any], tmp_path: Path) -> None:
    """A folder with only a pickle is refused before anything is sent, and the way out is named."""
    folder = _folder(tmp_path, "old", weights=None)
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    script = Script([OK_PROMPT])
    with pytest.raises(LocalFileError, match="promptd convert"):
        call("prompts.upload_peft", script, "old", folder)
    assert not script.requests


def test_many_uploads(call: Callable[..., Any], tmp_path: Path) -> None:
    """One bad folder among many fails alone; results keep the order they were asked in."""
    folders = {f"p{i}": _folder(tmp_path, f"p{i}", weights=None if i == 3 else b"w") for i in range(12)}
    script, seen = Script([OK_PROMPT]), []
    results = call("prompts.upload_many", script, folders, jobs=4, progress=False, on_result=seen.append)
    assert [result.name for result in results] == list(folders)
    assert [result.name for result in results if result.error] == ["p3"]
    assert len(seen) == 12 and len(script.requests) == 11
