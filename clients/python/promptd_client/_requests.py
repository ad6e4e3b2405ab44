"""Every request, written once for both clients, beside the reader of its reply. Nothing here does I/O."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import httpx

from promptd_client._peft import PeftFolder
from promptd_client._replies import event_reader, read_prompt, reader
from promptd_client.models import (
    ChatCompletion,
    ChatCompletionChunk,
    Classification,
    Completion,
    Embeddings,
    Evaluation,
    Model,
    Neighbor,
    NeighborRow,
    Prompt,
    PromptPage,
    Tokenization,
)
from promptd_client.options import ChatOptions, ClassifyOptions, CompletionOptions, Message, PromptOptions, TextInput

T = TypeVar("T")
ContentFormat = Literal["native", "peft"]
AnswerBy = Literal["score", "generate"]
Rows = str | Sequence[Mapping[str, Any]]
"""The id of an uploaded file, or rows with `label` or `completion`."""
DEFAULT_ADDRESS = "http://127.0.0.1:8000"
CONNECT_SECONDS = 5.0
MAX_ROUTE_CHARS = 512
STREAM_HEADERS: Mapping[str, str] = {"Accept": "text/event-stream"}


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request, and how its reply is read."""

    method: str
    path: str
    parse: Callable[[httpx.Response], T]
    params: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
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
    method: str = "POST"
    params: Mapping[str, str] = field(default_factory=dict)


def base_address(address: str | None) -> str:
    """Return the server's address without `/v1`, which OpenAI's clients want and this one adds itself.

    Where none is given it is that of `PROMPTD_URL`, as for the command line.
    """
    address = address or os.environ.get("PROMPTD_URL") or DEFAULT_ADDRESS
    return address.rstrip("/").removesuffix("/v1").rstrip("/")


def routed(fixed: Mapping[str, str], body: Any) -> Mapping[str, str]:
    """Add the header by which a load balancer may send the same prompts to the same server; never needed for truth."""
    if not isinstance(body, Mapping):
        return fixed
    chain = [str(name) for name in body.get("prompt_ids") or ()]
    _, _, behind_colon = str(body.get("model") or "").partition(":")
    named = ">".join(chain) or body.get("prompt_id") or behind_colon
    return {**fixed, "X-Prompt-Id": quote(str(named), safe="/@:.>")[:MAX_ROUTE_CHARS]} if named else fixed


def headers(api_key: str | None) -> dict[str, str]:
    """Return what every request carries; the key is that of `PROMPTD_API_KEY` where none is given."""
    api_key = api_key or os.environ.get("PROMPTD_API_KEY") or None
    common = {"User-Agent": "promptd-client", "Accept": "application/json"}
    return common if api_key is None else common | {"Authorization": f"Bearer {api_key}"}


# ---------------------------------------------------------------------------------------------- inference


def completion(prompt: TextInput, options: CompletionOptions) -> Call[Completion]:
    """Continue a text."""
    return _post("/v1/completions", body_of({"prompt": prompt}, options), reader(Completion))


def completion_stream(prompt: TextInput, options: CompletionOptions) -> StreamCall[Completion]:
    """Continue a text, event by event."""
    return StreamCall("/v1/completions", body_of({"prompt": prompt, **_STREAM}, options), event_reader(Completion))


def chat(messages: Sequence[Message], options: ChatOptions) -> Call[ChatCompletion]:
    """Answer a conversation."""
    return _post("/v1/chat/completions", body_of({"messages": messages}, options), reader(ChatCompletion))


def chat_stream(messages: Sequence[Message], options: ChatOptions) -> StreamCall[ChatCompletionChunk]:
    """Answer a conversation, event by event."""
    body = body_of({"messages": messages, **_STREAM}, options)
    return StreamCall("/v1/chat/completions", body, event_reader(ChatCompletionChunk))


def classify(text: TextInput, options: ClassifyOptions) -> Call[Classification]:
    """Pick a label for every input; changes nothing, so it may be repeated."""
    return _post("/v1/classify", body_of({"input": text}, options), reader(Classification), is_idempotent=True)


def embed(text: TextInput, options: PromptOptions) -> Call[Embeddings]:
    """Make a vector of every input; changes nothing, so it may be repeated."""
    return _post("/v1/embeddings", body_of({"input": text}, options), reader(Embeddings), is_idempotent=True)


def models() -> Call[list[Model]]:
    """List base models and prompts."""
    return Call("GET", "/v1/models", reader(list[Model], "data"))


def tokenize(text: str, add_special_tokens: bool) -> Call[Tokenization]:
    """Split a text."""
    body = {"prompt": text, "add_special_tokens": add_special_tokens}
    return _post("/tokenize", body, reader(Tokenization), is_idempotent=True)


def detokenize(tokens: Sequence[int]) -> Call[str]:
    """Join tokens."""
    return _post("/detokenize", {"tokens": list(tokens)}, reader(str, "prompt"), is_idempotent=True)


def version() -> Call[str]:
    """Ask for the server's version."""
    return Call("GET", "/version", reader(str, "version"))


def ready() -> Call[bool]:
    """Ask whether the server takes requests."""
    return Call("GET", "/readyz", lambda response: response.is_success)


# ------------------------------------------------------------------------------------------------ prompts


def list_prompts(after: str | None) -> Call[PromptPage]:
    """List one page of the caller's prompts and the public ones."""
    return Call("GET", "/v1/prompts", reader(PromptPage), params={} if after is None else {"after": after})


def get_prompt(ref: str) -> Call[Prompt]:
    """Read one record, `name[@N|@sha256:…]`."""
    return Call("GET", _prompt_path(ref), read_prompt)


def prompt_versions(name: str) -> Call[list[Prompt]]:
    """List every version of a name, newest first."""
    return Call("GET", _prompt_path(name, "versions"), reader(list[Prompt], "data"))


def prompt_content(ref: str, format: ContentFormat) -> Call[bytes]:
    """Download a prompt's bytes; `native` is what was uploaded, `peft` a zip archive of a PEFT folder."""
    return Call("GET", _prompt_path(ref, "content"), lambda response: response.content, params={"format": format})


def put_prompt(
    name: str,
    content: bytes,
    *,
    kind: str | None = None,
    num_virtual_tokens: int | None = None,
    adapter_config: bytes | None = None,
    behind: Sequence[str] = (),
    user: str | None = None,
    if_match: str | None = None,
    if_none_match: str | None = None,
) -> Call[Prompt]:
    """Publish bytes under a name. The same bytes again change nothing, so only a conditional one is not repeated."""
    params = {"kind": kind, "num_virtual_tokens": num_virtual_tokens, "user": user}
    conditions = _present({"If-Match": _quoted(if_match), "If-None-Match": _quoted(if_none_match)})
    config = None if adapter_config is None else base64.urlsafe_b64encode(adapter_config).decode()
    return Call(
        "PUT",
        _prompt_path(name),
        read_prompt,
        params={**_present(params), **({"behind": list(behind)} if behind else {})},
        headers={
            "Content-Type": "application/octet-stream",
            **_present({"X-Promptd-Adapter-Config": config}),
            **conditions,
        },
        content=content,
        is_idempotent=not conditions,
    )


def put_text(
    name: str,
    text: str,
    fields: Mapping[str, Any],
    *,
    user: str | None,
    if_match: str | None,
    if_none_match: str | None,
) -> Call[Prompt]:
    """Publish a plain text under a name."""
    conditions = _present({"If-Match": _quoted(if_match), "If-None-Match": _quoted(if_none_match)})
    body = {"text": text, **{name: value for name, value in fields.items() if value is not None}}
    params = _present({"user": user})
    idempotent = not conditions
    return Call(
        "PUT", _prompt_path(name), read_prompt, params=params, headers=conditions, body=body, is_idempotent=idempotent
    )


def put_peft(name: str, folder: PeftFolder, *, if_match: str | None, if_none_match: str | None) -> Call[Prompt]:
    """Publish a PEFT folder: both files travel byte for byte, the weights as the body."""
    return put_prompt(
        name, folder.weights, adapter_config=folder.config, if_match=if_match, if_none_match=if_none_match
    )


def rollback_prompt(name: str, to: int | str) -> Call[Prompt]:
    """Point a name to an earlier version."""
    return _post(_prompt_path(name, "rollback"), {"to": to}, read_prompt, is_idempotent=True)


def evaluate_prompt(ref: str, rows: Rows, *, answer_by: AnswerBy, return_predictions: bool) -> Call[Evaluation]:
    """Score rows, or the rows of an uploaded file; changes nothing, but is too much work to be repeated unasked."""
    given = {"file_id": rows} if isinstance(rows, str) else {"rows": list(rows)}
    body = {**given, "answer_by": answer_by, "return_predictions": return_predictions}
    return _post(_prompt_path(ref, "evaluate"), body, reader(Evaluation))


def list_shares(name: str) -> Call[list[str]]:
    """List whom a prompt is shared with."""
    return Call("GET", _prompt_path(name, "shares"), lambda reply: [one["tenant"] for one in reply.json()["data"]])


def share_prompt(name: str, tenant: str, *, is_shared: bool) -> Call[None]:
    """Share a prompt with a tenant, or no longer; twice is as good as once."""
    return Call("PUT" if is_shared else "DELETE", _prompt_path(name, "shares", tenant), lambda reply: None)


def prompt_neighbors(ref: str, count: int) -> Call[list[list[Neighbor]]]:
    """Ask for the vocabulary entries nearest to each vector of a soft prompt."""
    read = reader(list[NeighborRow], "data")
    return Call(
        "GET",
        _prompt_path(ref, "neighbors"),
        lambda response: [row.neighbors for row in read(response)],
        params={"count": str(count)},
    )


def erase_user(user: str) -> Call[dict[str, int]]:
    """Erase what belongs to an end user; again finishes what was left."""
    return Call("DELETE", f"/v1/users/{quote(user, safe='')}", reader(dict[str, int], "erased"))


def erase_prompt(name: str) -> Call[dict[str, int]]:
    """Delete a name with all its versions, their bytes now."""
    params = {"erase": "true"}
    return Call("DELETE", _prompt_path(name), reader(dict[str, int], "erased"), params=params, is_idempotent=False)


def delete_prompt(name: str) -> Call[None]:
    """Delete a name with all its versions. A second time it would not be found, so it is not repeated unasked."""
    return Call("DELETE", _prompt_path(name), lambda response: None, is_idempotent=False)


# ------------------------------------------------------------------------------------------------- pieces


_STREAM: Mapping[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def _post(
    path: str, body: Mapping[str, Any], parse: Callable[[httpx.Response], T], *, is_idempotent: bool = False
) -> Call[T]:
    return Call("POST", path, parse, body=body, is_idempotent=is_idempotent)


def body_of(fixed: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Join what a request always has with what the caller gives; what is None is left out."""
    given = {name: value for name, value in options.items() if name != "extra_body" and value is not None}
    return {**fixed, **given, **options.get("extra_body", {})}


def _prompt_path(ref: str, *more: str) -> str:
    if any(part in ("", ".", "..") for part in ref.split("/")):
        raise ValueError(f"{ref!r} is not the name of a prompt")
    return "/".join(["/v1/prompts", *(quote(part, safe="@:") for part in (*ref.split("/"), *more))])


def _present(values: Mapping[str, str | int | None]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items() if value is not None}


def _quoted(etag: str | None) -> str | None:
    return etag if etag is None or etag == "*" or etag.startswith(('"', "W/")) else f'"{etag}"'
