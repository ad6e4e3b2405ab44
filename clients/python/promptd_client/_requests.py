"""Every request and the reading of its reply, written once for both clients. Nothing here does I/O."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter, ValidationError

from promptd_client._peft import PeftFolder
from promptd_client._sse import Event
from promptd_client.errors import APIError, InvalidReplyError, error_from_body
from promptd_client.models import (
    ChatCompletion,
    ChatCompletionChunk,
    Classification,
    Completion,
    Model,
    Prompt,
    Tokenization,
)
from promptd_client.options import ChatOptions, ClassifyOptions, CompletionOptions, Message, TextInput

T = TypeVar("T")
ContentFormat = Literal["native", "peft"]
CONNECT_SECONDS = 5.0
STREAM_HEADERS: Mapping[str, str] = {"Accept": "text/event-stream"}


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request, and how its reply is read."""

    method: str
    path: str
    parse: Callable[[httpx.Response], T]
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    content: bytes | None = None
    is_idempotent: bool = True
    """Doing it twice is as good as once: it may be repeated where it is unknown whether it arrived."""


@dataclass(frozen=True, slots=True)
class StreamCall(Generic[T]):
    """One request that is answered by events, each read by `parse`."""

    path: str
    body: Any
    parse: Callable[[str], T]


def base_address(address: str) -> str:
    """Return the server's address without `/v1`, which OpenAI's clients want and this one adds itself."""
    return address.rstrip("/").removesuffix("/v1").rstrip("/")


def headers(api_key: str | None) -> dict[str, str]:
    """Return what every request carries."""
    common = {"User-Agent": "promptd-client", "Accept": "application/json"}
    return common if api_key is None else common | {"Authorization": f"Bearer {api_key}"}


# ---------------------------------------------------------------------------------------------- inference


def completion(prompt: TextInput, options: CompletionOptions) -> Call[Completion]:
    """Continue a text."""
    return _post("/v1/completions", _body({"prompt": prompt}, options), _reader(Completion))


def completion_stream(prompt: TextInput, options: CompletionOptions) -> StreamCall[Completion]:
    """Continue a text, event by event."""
    return StreamCall("/v1/completions", _body({"prompt": prompt, **_STREAM}, options), _event_reader(Completion))


def chat(messages: Sequence[Message], options: ChatOptions) -> Call[ChatCompletion]:
    """Answer a conversation."""
    return _post("/v1/chat/completions", _body({"messages": messages}, options), _reader(ChatCompletion))


def chat_stream(messages: Sequence[Message], options: ChatOptions) -> StreamCall[ChatCompletionChunk]:
    """Answer a conversation, event by event."""
    body = _body({"messages": messages, **_STREAM}, options)
    return StreamCall("/v1/chat/completions", body, _event_reader(ChatCompletionChunk))


def classify(text: TextInput, options: ClassifyOptions) -> Call[Classification]:
    """Pick a label for every input; changes nothing, so it may be repeated."""
    return _post("/v1/classify", _body({"input": text}, options), _reader(Classification), is_idempotent=True)


def models() -> Call[list[Model]]:
    """List base models and prompts."""
    return Call("GET", "/v1/models", _reader(list[Model], "data"))


def tokenize(text: str, add_special_tokens: bool) -> Call[Tokenization]:
    """Split a text."""
    body = {"prompt": text, "add_special_tokens": add_special_tokens}
    return _post("/tokenize", body, _reader(Tokenization), is_idempotent=True)


def detokenize(tokens: Sequence[int]) -> Call[str]:
    """Join tokens."""
    return _post("/detokenize", {"tokens": list(tokens)}, _reader(str, "prompt"), is_idempotent=True)


def version() -> Call[str]:
    """Ask for the server's version."""
    return Call("GET", "/version", _reader(str, "version"))


def ready() -> Call[bool]:
    """Ask whether the server takes requests."""
    return Call("GET", "/readyz", lambda response: response.is_success)


# ------------------------------------------------------------------------------------------------ prompts


def list_prompts() -> Call[list[Prompt]]:
    """List what the caller's names point to."""
    return Call("GET", "/v1/prompts", _reader(list[Prompt], "data"))


def get_prompt(ref: str) -> Call[Prompt]:
    """Read one record, `[owner/]name[@N|@sha256:…]`."""
    return Call("GET", _prompt_path(ref), _reader(Prompt))


def prompt_versions(name: str) -> Call[list[Prompt]]:
    """List every version of a name, newest first."""
    return Call("GET", _prompt_path(name, "versions"), _reader(list[Prompt], "data"))


def prompt_content(ref: str, format: ContentFormat) -> Call[bytes]:
    """Download a prompt's bytes; `native` is what was uploaded, `peft` a zip archive of a PEFT folder."""
    return Call("GET", _prompt_path(ref, "content"), lambda response: response.content, params={"format": format})


def put_prompt(
    name: str,
    content: bytes,
    *,
    params: Mapping[str, str | int | None],
    if_match: str | None = None,
    if_none_match: str | None = None,
) -> Call[Prompt]:
    """Publish bytes under a name. The same bytes again change nothing, so only a conditional one is not repeated."""
    conditions = {"If-Match": _quoted(if_match), "If-None-Match": _quoted(if_none_match)}
    present = {header: value for header, value in conditions.items() if value is not None}
    return Call(
        "PUT",
        _prompt_path(name),
        _reader(Prompt),
        params={key: str(value) for key, value in params.items() if value is not None},
        headers={"Content-Type": "application/octet-stream", **present},
        content=content,
        is_idempotent=not present,
    )


def put_peft(name: str, folder: PeftFolder, *, if_match: str | None, if_none_match: str | None) -> Call[Prompt]:
    """Publish a PEFT folder: the weights are the body, untouched, and the configuration travels beside them."""
    params = {"adapter_config": json.dumps(json.loads(folder.config), separators=(",", ":"))}
    return put_prompt(name, folder.weights, params=params, if_match=if_match, if_none_match=if_none_match)


def rollback_prompt(name: str, to: int | str) -> Call[Prompt]:
    """Point a name to an earlier version."""
    return _post(_prompt_path(name, "rollback"), {"to": to}, _reader(Prompt), is_idempotent=True)


def delete_prompt(name: str) -> Call[None]:
    """Delete a name with all its versions. A second time it would not be found, so it is not repeated unasked."""
    return Call("DELETE", _prompt_path(name), lambda response: None, is_idempotent=False)


# ------------------------------------------------------------------------------------------------ replies


def error_of(response: httpx.Response) -> APIError:
    """Read an error reply whose body was received."""
    try:
        body = response.json()
    except ValueError:
        text = response.text.strip()
        body = {"error": {"message": f"status {response.status_code}: {text[:200]}"}} if text else None
    return error_from_body(
        body,
        response.status_code,
        request_id=response.headers.get("x-request-id"),
        retry_after_seconds=retry_after(response.headers.get("retry-after")),
    )


def read_event(event: Event, call: StreamCall[T]) -> T:
    """Read one event of a stream, or raise the error that it carries."""
    plain = _json(event.data)
    if event.type == "error" or (isinstance(plain, dict) and "error" in plain):
        raise error_from_body(plain, None)
    return call.parse(event.data)


def retry_after(value: str | None) -> float | None:
    """Read a Retry-After header, seconds or a date, as seconds from now."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


_STREAM: Mapping[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def _post(
    path: str, body: Mapping[str, Any], parse: Callable[[httpx.Response], T], *, is_idempotent: bool = False
) -> Call[T]:
    return Call("POST", path, parse, body=body, is_idempotent=is_idempotent)


def _body(fixed: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if name != "extra_body" and value is not None}
    return {**fixed, **given, **options.get("extra_body", {})}


def _prompt_path(ref: str, *more: str) -> str:
    return "/".join(["/v1/prompts", *(quote(part, safe="@:") for part in (*ref.split("/"), *more))])


def _quoted(etag: str | None) -> str | None:
    return etag if etag is None or etag == "*" or etag.startswith(('"', "W/")) else f'"{etag}"'


def _reader(kind: type[T], key: str | None = None) -> Callable[[httpx.Response], T]:
    adapter = TypeAdapter(kind)

    def parse(response: httpx.Response) -> T:
        plain = _json(response.text)
        if key is not None:
            if not isinstance(plain, dict) or key not in plain:
                raise InvalidReplyError(f"the reply of {response.request.url} lacks {key!r}: {response.text[:200]}")
            plain = plain[key]
        return _validated(adapter, plain)

    return parse


def _event_reader(kind: type[T]) -> Callable[[str], T]:
    adapter = TypeAdapter(kind)
    return lambda data: _validated(adapter, _json(data))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidReplyError(f"the reply is not JSON: {text[:200]}") from error


def _validated(adapter: TypeAdapter[T], plain: Any) -> T:
    try:
        return adapter.validate_python(plain)
    except ValidationError as error:
        raise InvalidReplyError(f"the reply is not what this API promises: {error}") from error
