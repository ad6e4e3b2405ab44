"""Errors, keys, prompts and probes over HTTP."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi.routing import APIRoute
from promptd_store import PromptArtifact, encode
from pydantic import SecretStr
from safetensors.torch import save

from promptd.api.routes import ROUTES
from promptd.app import create_app
from promptd.errors import InvalidRequestError
from promptd.settings import Settings
from tests.api.conftest import MODEL, LiveServer
from tests.patience import until

GOOD = {"model": MODEL, "prompt": "x", "max_tokens": 1}

BAD_BODIES: dict[str, tuple[bytes, int, str, str | None]] = {
    "negative max_tokens": (json.dumps({**GOOD, "max_tokens": -1}).encode(), 400, "invalid_value", "max_tokens"),
    "n of 10,000": (json.dumps({**GOOD, "n": 10_000}).encode(), 400, "invalid_value", "n"),
    "empty prompt": (json.dumps({**GOOD, "prompt": ""}).encode(), 400, "invalid_value", "prompt"),
    "empty list": (json.dumps({**GOOD, "prompt": []}).encode(), 400, "invalid_value", "prompt"),
    "no prompt": (json.dumps({"model": MODEL}).encode(), 400, "invalid_value", "prompt"),
    "unknown field": (json.dumps({**GOOD, "temprature": 1}).encode(), 400, "unknown_field", "temprature"),
    "wrong type": (json.dumps({**GOOD, "temperature": "hot"}).encode(), 400, "invalid_value", "temperature"),
    "token out of range": (json.dumps({**GOOD, "prompt": [10**9]}).encode(), 400, "invalid_value", "prompt"),
    "negative token": (json.dumps({**GOOD, "prompt": [-1]}).encode(), 400, "invalid_value", "prompt"),
    "five stops": (json.dumps({**GOOD, "stop": list("abcde")}).encode(), 400, "invalid_value", "stop"),
    "logprobs": (json.dumps({**GOOD, "logprobs": 21}).encode(), 400, "invalid_value", "logprobs"),
    "bias key": (json.dumps({**GOOD, "logit_bias": {"x": 1}}).encode(), 400, "invalid_value", "logit_bias"),
    "best_of": (json.dumps({**GOOD, "best_of": 3}).encode(), 400, "invalid_value", "best_of"),
    "too long": (json.dumps({**GOOD, "max_tokens": 300}).encode(), 400, "context_length_exceeded", "prompt"),
    "unknown prompt": (json.dumps({**GOOD, "model": "absent"}).encode(), 404, "model_not_found", "model"),
    "two names": (json.dumps({**GOOD, "model": "p0", "prompt_id": "p1"}).encode(), 400, "invalid_value", "prompt_id"),
    "path trick": (json.dumps({**GOOD, "model": "../../etc/passwd"}).encode(), 400, "invalid_prompt_name", "model"),
    "broken JSON": (b'{"model": ', 400, "invalid_json", None),
    "not UTF-8": (b'{"model": "\xff\xfe"}', 400, "invalid_json", None),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), 400, "invalid_json", None),
    "NaN": (b'{"prompt": "x", "metadata": {"a": NaN}}', 400, "invalid_json", None),
    "Infinity": (b'{"prompt": "x", "temperature": -Infinity}', 400, "invalid_json", None),
    "overflow": (b'{"prompt": "x", "temperature": 1e400}', 400, "invalid_json", None),
    "5,000 digits": (b'{"prompt": "x", "n": 1' + b"0" * 5000 + b"}", 400, "invalid_json", None),
    "400 digits": (b'{"prompt": "x", "top_k": 1' + b"0" * 400 + b"}", 400, "invalid_value", "top_k"),
    "one key twice": (b'{"prompt": "x", "n": 1, "n": 2}', 400, "invalid_json", None),
    "one key twice, deep": (b'{"prompt": "x", "metadata": [{"a": 1, "a": 1}]}', 400, "invalid_json", None),
    "half a character": (b'{"prompt": "\\ud800"}', 400, "invalid_json", None),
    "half a character in a key": (b'{"prompt": {"\\udfff": "x"}}', 400, "invalid_json", None),
    "half a character in a stop": (b'{"prompt": "x", "stop": ["\\uD800\\u0041"]}', 400, "invalid_json", None),
    "true for a number": (json.dumps({**GOOD, "max_tokens": True}).encode(), 400, "invalid_value", "max_tokens"),
    "text for a number": (json.dumps({**GOOD, "n": "2"}).encode(), 400, "invalid_value", "n"),
    "number for a bool": (json.dumps({**GOOD, "stream": 1}).encode(), 400, "invalid_value", "stream"),
    "seed of 64 bits": (json.dumps({**GOOD, "seed": 1 << 63}).encode(), 400, "invalid_value", "seed"),
    "empty stop": (json.dumps({**GOOD, "stop": ""}).encode(), 400, "invalid_value", "stop"),
    "long stop": (json.dumps({**GOOD, "stop": "a" * 100_000}).encode(), 400, "invalid_value", "stop"),
    "negative stop token": (
        json.dumps({**GOOD, "stop_token_ids": [-1]}).encode(),
        400,
        "invalid_value",
        "stop_token_ids",
    ),
    "200,000 floats": (json.dumps({**GOOD, "prompt": [1.5] * 200_000}).encode(), 400, "invalid_value", "prompt"),
    "odd bias key": (json.dumps({**GOOD, "logit_bias": {"5_0": 1}}).encode(), 400, "invalid_value", "logit_bias"),
    "bad prompt id": (
        json.dumps({"prompt": "x", "prompt_id": "a b"}).encode(),
        400,
        "invalid_prompt_name",
        "prompt_id",
    ),
    "absent in a chain": (
        json.dumps({"prompt": "x", "prompt_ids": ["no"]}).encode(),
        404,
        "model_not_found",
        "prompt_ids",
    ),
    "absent in an ensemble": (
        json.dumps({"prompt": "x", "ensemble": ["no"]}).encode(),
        404,
        "model_not_found",
        "ensemble",
    ),
    "unknown long field": (json.dumps({**GOOD, "a" * 100_000: 1}).encode(), 400, "unknown_field", None),
    "long name of a field": (json.dumps({**GOOD, "prompt": {"b" * 100_000: "x"}}).encode(), 400, "invalid_value", None),
    "more than may wait": (json.dumps({**GOOD, "prompt": ["x"] * 9, "n": 3}).encode(), 400, "invalid_value", "n"),
    "not an object": (b"[1]", 400, "invalid_value", None),
    "deep nesting": (b"[" * 100_000, 400, "invalid_json", None),
    "10 MB of JSON": (b'{"model": "' + b"a" * 10_000_000 + b'"}', 413, "payload_too_large", None),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies_get_a_typed_error(server: LiveServer, name: str) -> None:
    """Each gets its own status and code in exactly OpenAI's envelope, naming the field; the server goes on."""
    body, status, code, param = BAD_BODIES[name]
    with server.http() as http:
        answer = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, answer.text
        error = answer.json()
        assert list(error) == ["error"]
        assert list(error["error"]) == ["message", "type", "param", "code"]
        assert error["error"]["code"] == code
        assert param is None or error["error"]["param"] == param
        assert len(answer.content) < 2500
        assert answer.headers["x-request-id"]
        assert http.post("/v1/completions", json=GOOD).status_code == 200


@pytest.mark.parametrize(
    ("route", "body", "told"),
    [
        ("completions", {"prompt": "x", "stop": list("abcde")}, "stop: List should have at most 4 items"),
        ("completions", {"prompt": []}, "prompt: List should have at least 1 item"),
        ("completions", {"prompt": [-1]}, "prompt.0: Input should be greater than or equal to 0, got -1"),
        ("completions", {"prompt": [["x"]]}, "prompt.0.0: Input should be a valid integer, got 'x'"),
        ("classify", {"input": "x", "labels": ["x"]}, "labels: List should have at least 2 items"),
        ("classify", {"input": "x", "labels": {"Play": 3, "b": " x"}}, "labels.Play: "),
        ("classify", {"input": "x"}, "labels"),
        (
            "classify",
            {"input": "x", "labels": {"a": " x", "b": " x"}},
            "labels: 'a' and 'b' have the same",
        ),
    ],
)
def test_unions_tell_what_was_meant(server: LiveServer, route: str, body: dict[str, Any], told: str) -> None:
    """The complaint of the alternative whose type it is, and the way to it without pydantic's own words."""
    with server.http() as http:
        error = http.post(f"/v1/{route}", json={"model": MODEL, **body}).json()["error"]
    assert error["message"].startswith(told) or told == error["param"], error
    assert "constrained" not in error["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", "/v1/prompts/typo?dry-run=true"), ("GET", "/v1/prompts?serch=x&limit=3"), ("GET", "/v1/models?limit=1")],
)
def test_query_parameters_that_are_not_there(server: LiveServer, method: str, path: str) -> None:
    """They are refused by name, before anything is done."""
    wrong = path.partition("?")[2].partition("=")[0]
    with server.http() as http:
        answer = http.request(method, path, json={"text": "new"} if method == "PUT" else None)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "unknown_field", wrong), error
        assert http.get("/v1/prompts/typo").status_code == 404
        assert http.get("/v1/prompts?limit=3").status_code == http.get("/readyz?at=1").status_code == 200


def test_a_chunked_body_stops_at_the_limit(server: LiveServer) -> None:
    """Without Content-Length the same limit holds."""

    def chunks() -> Iterator[bytes]:
        for _ in range(300):
            yield b"a" * 10_000

    with server.http() as http:
        answer = http.post("/v1/completions", content=chunks(), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")


def test_unknown_routes_and_methods(server: LiveServer) -> None:
    """404 and 405 use the envelope too; 405 says what is allowed."""
    with server.http() as http:
        for answer, code in ((http.get("/nope"), "route_not_found"), (http.put("/v1/models"), "method_not_allowed")):
            assert answer.json()["error"]["code"] == code
        assert http.put("/v1/models").headers["allow"] == "GET"


def bad_uploads(good: bytes, hidden: int) -> dict[str, bytes]:
    """Hostile and broken files."""
    nan = save({"prompt_embeddings": torch.full((3, hidden), float("nan"))})
    return {
        "empty": b"",
        "truncated": good[:-10],
        "trailing": good + b"x",
        "header bomb": struct.pack("<Q", 1 << 62) + b"{}",
        "large header": struct.pack("<Q", 70_000) + b" " * 70_000,
        "wrong shape": save({"prompt_embeddings": torch.zeros(3, hidden + 1)}),
        "wrong name": save({"weights": torch.zeros(3, hidden)}),
        "NaN": nan,
        "1e20": save({"prompt_embeddings": torch.full((3, hidden), 1e20)}),
        "int": save({"prompt_embeddings": torch.zeros(3, hidden, dtype=torch.int64)}),
        "pickle": b"\x80\x04\x95" + b"cos\nsystem\n(S'true'\ntR." * 9,
        "zip": b"PK\x03\x04" + b"\0" * 64,
    }


def test_bad_uploads_change_nothing(server: LiveServer, prompts: tuple[PromptArtifact, ...]) -> None:
    """Each bad file gets its own typed 4xx, nothing is stored, and the old version keeps serving."""
    spec = server.model.spec
    other = encode("soft", torch.ones(2, spec.hidden_size), base_fingerprint="sha256:" + "0" * 64).content
    files = {**bad_uploads(prompts[1].content, spec.hidden_size), "wrong base": other}
    codes = {}
    with server.http() as http:
        before = http.put("/v1/prompts/kept", content=prompts[1].content).json()
        for name, content in files.items():
            answer = http.put("/v1/prompts/kept", content=content)
            assert 400 <= answer.status_code < 500, (name, answer.text)
            codes[name] = answer.json()["error"]["code"]
        assert http.get("/v1/prompts/kept").json() == before
        assert len(http.get("/v1/prompts/kept/versions").json()["data"]) == 1
        assert http.post("/v1/completions", json={**GOOD, "model": "kept"}).status_code == 200
    assert len(set(codes.values())) >= 8, codes


@pytest.mark.parametrize("name", ["..", "a/b", "%2e%2e%2fx", "x" * 97, "-x", "sp ace", MODEL, "a\x00b"])
def test_bad_names_are_refused(server: LiveServer, prompts: tuple[PromptArtifact, ...], name: str) -> None:
    """Path tricks and reserved names never reach the store."""
    from urllib.parse import quote

    with server.http() as http:
        answer = http.put("/v1/prompts/" + quote(name, safe=""), content=prompts[0].content)
    assert answer.status_code in (400, 404, 405, 409), answer.text
    assert set(answer.json()) == {"error"}


def test_probes_metrics_and_tokens(server: LiveServer) -> None:
    """Probes answer, metrics parse and count, tokenize and detokenize invert each other."""
    from prometheus_client.parser import text_string_to_metric_families

    with server.http() as http:
        for path in ("/livez", "/readyz", "/startupz", "/health", "/version", "/admin/engine"):
            assert http.get(path).status_code == 200, path

        def value(name: str) -> float:
            families = text_string_to_metric_families(http.get("/metrics").text)
            return sum(sample.value for family in families for sample in family.samples if sample.name == name)

        before = value("promptd_generation_tokens_total")
        first = value("promptd_time_to_first_token_seconds_count")
        http.post("/v1/completions", json={**GOOD, "max_tokens": 5, "ignore_eos": True})
        assert value("promptd_generation_tokens_total") == before + 5
        assert value("promptd_time_to_first_token_seconds_count") == first + 1
        tiers = "promptd_artifact_cache_hits_total", "promptd_artifact_cache_misses_total"
        before = sum(map(value, tiers))
        http.post("/v1/completions", json={**GOOD, "model": "p0", "max_tokens": 1})
        assert sum(map(value, tiers)) == before + 1
        until(lambda: value("promptd_event_loop_lag_seconds_count"))
        tokens = http.post("/tokenize", json={"prompt": "the quick fox"}).json()
        assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "the quick fox"}


def test_every_exchange_is_counted_once(server: LiveServer) -> None:
    """What a client has seen is what `/metrics` says, and nothing that a client sends becomes a label."""
    from collections import Counter

    from prometheus_client.parser import text_string_to_metric_families

    def counted(http: httpx.Client) -> Counter[tuple[str, str, str]]:
        found: Counter[tuple[str, str, str]] = Counter()
        for family in text_string_to_metric_families(http.get("/metrics").text):
            for sample in family.samples:
                if sample.name == "promptd_http_requests_total" and sample.labels["route"] != "/metrics":
                    labels = sample.labels["method"], sample.labels["route"], sample.labels["status"]
                    found[labels] += int(sample.value)
        return found

    with server.http() as http:
        before = counted(http)
        for number in range(5):
            assert http.post("/v1/completions", json={**GOOD, "max_tokens": 1}).status_code == 200
            assert http.get(f"/v1/prompts/nobody-{number}").status_code == 404
            assert http.get(f"/nowhere/{number}").status_code == 404
            assert http.request(f"ODD{number}", "/v1/models").status_code == 405
        with http.stream("POST", "/v1/completions", json={**GOOD, "max_tokens": 3, "stream": True}) as stream:
            assert stream.read().endswith(b"[DONE]\n\n")
        until(lambda: sum((counted(http) - before).values()) >= 21)  # a stream ends just after its last byte
        assert counted(http) - before == {
            ("POST", "/v1/completions", "200"): 6,
            ("GET", "/v1/prompts/{name:path}", "404"): 5,
            ("GET", "unknown", "404"): 5,
            ("other", "/v1/models", "405"): 5,
        }


def test_request_ids_are_labels(server: LiveServer) -> None:
    """A plain id of the client is echoed; a long or odd one is replaced."""
    with server.http() as http:
        assert http.get("/version", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
        assert http.get("/version", headers={"X-Request-Id": "a" * 500}).headers["x-request-id"].startswith("req-")


# -- keys ------------------------------------------------------------------------------------------------------


def test_every_route_of_the_app_is_in_the_table(server: LiveServer) -> None:
    """A route that is registered elsewhere fails here, unless it is the framework's description of the API."""
    built_in = {"/openapi.json"}
    routes = [route for route in server.app.routes if isinstance(route, APIRoute)]
    found = {("GET" if method == "HEAD" else method, route.path) for route in routes for method in route.methods}
    table = {(route.method, route.path) for route in ROUTES}
    pages = {(route.method, route.path) for route in ROUTES if route.is_page}
    assert found == table
    paths = {getattr(route, "path", "") for route in server.app.routes} - {""}
    assert paths - built_in <= {path for _, path in table}
    operations = {(method.upper(), path) for path, item in server.app.openapi()["paths"].items() for method in item}
    assert operations == {(method, path.replace(":path", "")) for method, path in table - pages}


def test_tenants_do_not_see_each_other(two_tenants: LiveServer) -> None:
    """A foreign prompt and an absent one give the same answer, byte for byte; lists show one's own."""
    artifact = encode("soft", torch.ones(2, two_tenants.model.spec.hidden_size))
    with (
        two_tenants.http(Authorization="Bearer key-tenant-a") as a,
        two_tenants.http(Authorization="Bearer key-tenant-b") as b,
    ):
        assert a.put("/v1/prompts/mine", content=artifact.content).status_code == 201
        assert [p["id"] for p in a.get("/v1/prompts").json()["data"] if p["visibility"] == "private"] == ["mine"]
        assert [p["id"] for p in b.get("/v1/prompts").json()["data"] if p["visibility"] == "private"] == []
        for method, url, body in (
            ("GET", "/v1/prompts/{}", None),
            ("GET", "/v1/prompts/{}/versions", None),
            ("GET", "/v1/prompts/{}/content", None),
            ("DELETE", "/v1/prompts/{}", None),
            ("POST", "/v1/prompts/{}/rollback", {"to": 1}),
            ("GET", "/v1/models/{}", None),
        ):
            foreign = b.request(method, url.format("mine"), json=body)
            absent = b.request(method, url.format("none"), json=body)
            assert foreign.status_code == absent.status_code == 404
            assert foreign.text.replace("mine", "none") == absent.text
        foreign = b.post("/v1/completions", json={**GOOD, "model": "a/mine"})
        assert foreign.status_code == 404
        assert a.post("/v1/completions", json={**GOOD, "model": "mine"}).status_code == 200  # control


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.1", "example.org"])  # noqa: S104 - that is the point
def test_an_open_server_stays_on_loopback(tiny_models: dict[str, Path], host: str) -> None:
    """Without keys any address but loopback refuses to start; with keys it may."""
    with pytest.raises(InvalidRequestError) as refused:
        create_app(Settings(model=str(tiny_models["llama"]), host=host))
    assert refused.value.param == "host"
    create_app(Settings(model=str(tiny_models["llama"]), host=host, api_keys=SecretStr("t:key-12345")))
