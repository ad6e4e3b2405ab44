"""Plain texts as prompts over HTTP: published as JSON, asked and counted like any other prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from promptd_store import PromptArtifact, PromptKind, encode

from tests.api.conftest import MODEL, LiveServer

TEXT = "the quick brown fox jumps over the lazy dog, and"
ASK: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx.Client]:
    """A client of a server that has the text as `manual`."""
    with server.http() as client:
        assert client.put("/v1/prompts/manual", json={"text": TEXT}).is_success
        yield client
        client.delete("/v1/prompts/manual")


def test_asked_by_its_name(http: httpx.Client, server: LiveServer, prompts: tuple[PromptArtifact, ...]) -> None:
    """The answer is that to the concatenated token ids; usage counts the text's tokens as virtual ones."""
    count = len(server.model.encode(TEXT))
    for name, chain in (("manual", []), (None, ["p1", "manual"])):
        naming: dict[str, Any] = {"model": name} if name else {"prompt_ids": chain}
        got = http.post("/v1/completions", json=ASK | naming | {"prompt": " it is"}).json()
        ids = [*server.model.encode(TEXT), *server.model.encode(" it is")]
        bare = http.post("/v1/completions", json=ASK | {"model": "p1" if chain else MODEL, "prompt": ids}).json()
        assert got["choices"][0]["token_ids"] == bare["choices"][0]["token_ids"]
        learned = prompts[1].num_virtual_tokens if chain else 0
        assert got["usage"]["prompt_tokens_details"]["virtual_tokens"] == learned + count
    record = http.get("/v1/prompts/manual").json()
    assert (record["kind"], record["manifest"]["text"], record["base_fingerprint"]) == ("text", TEXT, None)
    assert record["version"] == encode(PromptKind.TEXT, None, text=TEXT).version == got["prompt_versions"][-1]
    room = http.get(f"/v1/models/{MODEL}").json()["max_model_len"]
    assert http.get("/v1/models/manual").json()["max_model_len"] == room - count


def test_a_learned_version_replaces_it(http: httpx.Client, prompts: tuple[PromptArtifact, ...]) -> None:
    """The name goes on, the version says what it is now, and there is a way back."""
    before = http.post("/v1/completions", json=ASK | {"model": "manual", "prompt": "is"}).json()
    learned = http.put("/v1/prompts/manual", content=prompts[1].content)
    assert learned.status_code == 200 and learned.json()["kind"] == "soft"
    after = http.post("/v1/completions", json=ASK | {"model": "manual", "prompt": "is"}).json()
    assert after["prompt_versions"] == [prompts[1].version] != before["prompt_versions"]
    back = http.post("/v1/prompts/manual/rollback", json={"to": learned.json()["number"] - 1})
    assert back.json()["kind"] == "text"
    again = http.post("/v1/completions", json=ASK | {"model": "manual", "prompt": "is"}).json()
    assert again["choices"][0]["token_ids"] == before["choices"][0]["token_ids"]


def test_with_a_task(http: httpx.Client, server: LiveServer) -> None:
    """Template, label words, stops and defaults are those of any prompt; chat knows how much room is left."""
    body = {
        "text": TEXT,
        "template": "{text}?",
        "label_words": {"no": " no", "yes": " yes"},
        "stop": ["\n"],
        "default_sampling": {"max_tokens": 3},
    }
    assert http.put("/v1/prompts/manual", json=body).json()["manifest"]["stop"] == ["\n"]
    sorted_out = http.post("/v1/classify", json={"model": "manual", "input": "is it"}).json()
    assert sorted_out["data"][0]["labels"] == ["no", "yes"]
    short = http.post("/v1/completions", json={"model": "manual", "prompt": "is it", "ignore_eos": True}).json()
    assert short["usage"]["completion_tokens"] <= 3
    tokenizer = server.app.state.services.model.tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    try:
        assert http.put("/v1/prompts/manual", json={"text": TEXT * 8}).is_success
        chat = {"model": "manual", "messages": [{"role": "user", "content": "is it"}], "temperature": 0}
        answer = http.post("/v1/chat/completions", json=chat | {"ignore_eos": True})
    finally:
        tokenizer.chat_template = None
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    virtual = usage["prompt_tokens_details"]["virtual_tokens"]
    assert virtual == len(server.model.encode(TEXT * 8)) > 100
    assert usage["total_tokens"] + virtual == server.app.state.services.engine.engine.max_model_len


def test_lists_show_its_beginning(http: httpx.Client) -> None:
    """A list of prompts is not a list of documents."""
    long = TEXT * 5
    assert http.put("/v1/prompts/manual", json={"text": long}).is_success
    for listed in (http.get("/v1/prompts").json()["data"], http.get("/v1/prompts/manual/versions").json()["data"]):
        record = next(one for one in listed if one["id"] == "manual")
        assert record["manifest"]["text"] == long[:200] + "…"
    assert http.get("/v1/prompts/manual").json()["manifest"]["text"] == long


BAD: list[tuple[Any, int, str, str | None, str]] = [
    ({}, 400, "invalid_value", "text", "Field required"),
    ({"text": ""}, 400, "invalid_value", "text", "at least 1"),
    ({"text": 3}, 400, "invalid_value", "text", "got 3"),
    ([], 400, "invalid_value", None, "dictionary"),
    ({"text": "a", "kind": "text"}, 400, "unknown_field", "kind", "kind"),
    ({"text": "a", "template": "{text"}, 422, "template_invalid", "template", "single '{'"),
    ({"text": "a", "default_sampling": {"top_p": 3}}, 422, "manifest_invalid", "default_sampling", "top_p"),
    ({"text": "word " * 300}, 422, "text_too_long", "text", "this base model reads 256 in all"),
]


@pytest.mark.parametrize(("body", "status", "code", "param", "told"), BAD)
def test_bad_texts(server: LiveServer, body: Any, status: int, code: str, param: str | None, told: str) -> None:
    """Every fault names its field; nothing is stored, and a dry run says the same."""
    with server.http() as client:
        for query in ({}, {"dry_run": "true"}):
            reply = client.put("/v1/prompts/bad-text", json=body, params=query)
            error = reply.json()["error"]
            assert (reply.status_code, error["code"], error["param"]) == (status, code, param), error
            assert told in error["message"]
        assert client.get("/v1/prompts/bad-text").status_code == 404


def test_bad_json(server: LiveServer) -> None:
    """What is no JSON is told so, and JSON under another type is no safetensors file."""
    with server.http() as client:
        half = client.put("/v1/prompts/bad", content=b'{"text": ', headers={"Content-Type": "application/json"})
        twice = client.put(
            "/v1/prompts/bad", content=b'{"text": "a", "text": "b"}', headers={"Content-Type": "application/json"}
        )
        other = client.put("/v1/prompts/bad", content=b'{"text": "a"}')
    assert [one.json()["error"]["code"] for one in (half, twice)] == ["invalid_json"] * 2
    assert other.status_code == 422
