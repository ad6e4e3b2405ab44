"""What is asked may be large or odd: work is bounded, and errors speak the route's own words."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from promptd_store import encode

from tests.api.conftest import LiveServer


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"labels": ["a", ""]}, "invalid_value", "labels"),
        ({"labels": ["a", "b " * 5000]}, "invalid_value", "labels"),
        ({"labels": ["a", "a"]}, "invalid_value", "labels"),
        ({"labels": ["a", "b"], "input": "the " * 5000}, "context_length_exceeded", "input"),
        ({"labels": {"\ud800": "a", "b": "c"}}, "invalid_json", None),
    ],
)
def test_errors_name_the_field(server: LiveServer, body: dict[str, Any], code: str, param: str | None) -> None:
    """The words are those of this route, not the engine's."""
    content = json.dumps({"input": "x", **body}).encode()
    with server.http() as http:
        answer = http.post("/v1/classify", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, param)


def test_more_inputs_than_may_wait(server: LiveServer) -> None:
    """256 inputs get through a queue of 24, and each gets its own answer."""
    inputs = [f"the {number}" for number in range(256)]
    with server.http() as http:
        alone = [http.post("/v1/classify", json={"input": one, "labels": ["a", "b"]}) for one in inputs[:2]]
        whole = http.post("/v1/classify", json={"input": inputs, "labels": ["a", "b"]})
    assert whole.status_code == 200, whole.text
    data = whole.json()["data"]
    assert [one["index"] for one in data] == list(range(256))
    for answer, one in zip(alone, data, strict=False):
        assert one["probs"] == pytest.approx(answer.json()["data"][0]["probs"], abs=1e-4)


def test_a_template_cannot_blow_up(server: LiveServer) -> None:
    """A small template that repeats a field makes a bounded text, or an error that names the field."""
    prompt = encode("soft", torch.ones(2, server.model.spec.hidden_size), template="{text}" * 5000)
    with server.http() as http:
        assert http.put("/v1/prompts/loud", content=prompt.content).status_code == 201
        answer = http.post("/v1/completions", json={"model": "loud", "prompt": "x" * 1000})
        assert answer.status_code == 400
        assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == ("rendered_text_too_large", "text")
        assert http.delete("/v1/prompts/loud").status_code == 200


def test_a_default_gives_way_to_the_request(server: LiveServer) -> None:
    """A prompt's own min_tokens never makes a shorter max_tokens an error."""
    prompt = encode("soft", torch.ones(2, server.model.spec.hidden_size), default_sampling={"min_tokens": 50})
    with server.http() as http:
        assert http.put("/v1/prompts/wordy", content=prompt.content).status_code == 201
        answer = http.post("/v1/completions", json={"model": "wordy", "prompt": "x", "max_tokens": 3})
        assert answer.json()["usage"]["completion_tokens"] == 3, answer.text
        assert http.delete("/v1/prompts/wordy").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example:8000"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "192.168.1.7:8000"},
        {"Host": ""},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://[bad"},
    ],
)
def test_a_page_of_another_site_is_refused(server: LiveServer, headers: dict[str, str]) -> None:
    """Without keys, nobody else's name and nobody else's page gets past the loopback address; probes stay open."""
    with server.http(**headers) as http:
        for answer in (
            http.get("/v1/prompts"),
            http.post("/v1/prompts/p0/rollback"),
            http.post("/v1/files", files={"file": ("x.jsonl", b"{}")}, data={"purpose": "fine-tune"}),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed"), answer.text
        assert http.get("/livez").status_code == 200


@pytest.mark.parametrize("name", ["localhost:1234", "[::1]:8000", "127.0.0.2", "promptd.localhost"])
def test_this_machine_has_many_names(server: LiveServer, name: str) -> None:
    """All names of the loopback address are as good as another."""
    with server.http(Host=name, Origin=f"http://{name}") as http:
        assert http.get("/v1/prompts").status_code == 200


def test_probes_by_head(server: LiveServer) -> None:
    """Balancers probe by HEAD."""
    with server.http() as http:
        for path in ("/livez", "/readyz", "/startupz", "/health", "/metrics", "/version"):
            answer = http.head(path)
            assert (answer.status_code, answer.content) == (200, b""), path
