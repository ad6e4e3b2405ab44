"""Traces, timings and logs of requests: all of where the time went, nothing of what was said."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import structlog
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from promptd_store import PromptArtifact
from pydantic import SecretStr

from promptd.errors import InvalidRequestError
from promptd.settings import Settings
from promptd.tracing import Tracing, open_tracing
from tests.api.conftest import LiveServer, serve
from tests.collector import Collector
from tests.engine.harness import library
from tests.patience import until

KEY, SECRET = "the-key-of-acme", "swordfish"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"Authorization": f"Bearer {KEY}", "traceparent": f"00-{TRACE}-{PARENT}-01"}
TIMING = re.compile(r"^(\w+);dur=([0-9.]+)$")


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """Where spans end up."""
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def traced(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, exporter: InMemorySpanExporter
) -> Iterator[LiveServer]:
    """A server with one soft prompt that traces into memory."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    folder = tiny_models["llama"]
    settings = Settings(
        model=str(folder),
        store=str(tmp_path_factory.mktemp("traced")),
        api_keys=SecretStr(f"acme:{KEY}"),
        training="off",
        drain_seconds=1,
    )
    with serve(settings, folder, tracing=Tracing(provider)) as live:
        with live.http(**HEADERS) as http:
            artifact: PromptArtifact = library(folder)[0]
            assert http.put("/v1/prompts/tone", content=artifact.content).status_code == 201
        until(exporter.get_finished_spans)
        yield live


@pytest.fixture
def http(traced: LiveServer, exporter: InMemorySpanExporter) -> Iterator[httpx.Client]:
    """A caller who is traced already."""
    exporter.clear()
    with traced.http(**HEADERS) as client:
        yield client


def spans_of(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """Name -> span."""
    return {span.name: span for span in exporter.get_finished_spans()}


def parent_of(span: ReadableSpan) -> int | None:
    """The id of the span above."""
    return None if span.parent is None else span.parent.span_id


def test_a_request_as_spans(http: httpx.Client, exporter: InMemorySpanExporter) -> None:
    """Store and engine stand below the HTTP span, which stands below the caller's; phases fill the engine's span."""
    body = {"model": "tone", "prompt": f"the {SECRET} fox", "max_tokens": 6, "ignore_eos": True}
    reply = http.post("/v1/completions", json=body)
    until(lambda: "decode" in spans_of(exporter))
    found = spans_of(exporter)
    phases = ("queue", "prompt_load", "prefill", "decode")
    assert set(found) == {"POST /v1/completions", "store", "text_completion tone", *phases}
    whole, engine = found["POST /v1/completions"], found["text_completion tone"]
    assert parent_of(whole) == int(PARENT, 16)
    assert {f"{span.context.trace_id:032x}" for span in found.values()} == {TRACE}
    assert parent_of(engine) == parent_of(found["store"]) == whole.context.span_id
    assert {parent_of(found[phase]) for phase in phases} == {engine.context.span_id}
    at = engine.start_time
    for phase in phases:  # one after the other, without a gap
        assert found[phase].start_time == pytest.approx(at, abs=1000)
        at = found[phase].end_time
    assert at == pytest.approx(engine.end_time, abs=1000)
    usage = reply.json()["usage"]
    attributes = dict(engine.attributes or {})
    assert attributes["gen_ai.operation.name"] == "text_completion"
    assert attributes["gen_ai.request.model"] == attributes["gen_ai.prompt.name"] == "tone"
    assert attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 6
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert attributes["promptd.prompt.versions"] == tuple(reply.json()["prompt_versions"])
    assert attributes["promptd.tenant"] == "acme"
    assert reply.headers["traceresponse"] == f"00-{TRACE}-{whole.context.span_id:016x}-01"
    assert http.get(f"/v1/models?note={SECRET}").json()["error"]["param"] == "note"
    until(lambda: "GET /v1/models" in spans_of(exporter))
    everything = json.dumps([json.loads(span.to_json()) for span in exporter.get_finished_spans()])
    assert SECRET not in everything and KEY not in everything, "content or a key in a span"
    assert "fox" not in everything and "note" not in everything


@pytest.mark.parametrize("stream", [False, True])
def test_chats_labels_and_streams_are_traced_too(
    http: httpx.Client, exporter: InMemorySpanExporter, stream: bool
) -> None:
    """Each has its GenAI operation; a stream's spans end with its last token."""
    body = {"model": "tone", "prompt": "the", "max_tokens": 3, "n": 2, "stream": stream, "ignore_eos": True}
    assert http.post("/v1/completions", json=body).status_code == 200
    until(lambda: [span.name for span in exporter.get_finished_spans()].count("text_completion tone") == 2)
    labels = {"model": "tone", "input": "the", "labels": [" yes", " no"]}
    assert http.post("/v1/classify", json=labels).status_code == 200
    until(lambda: "classify tone" in spans_of(exporter))
    assert spans_of(exporter)["classify tone"].attributes["gen_ai.usage.output_tokens"] == 0  # type: ignore[index]


def test_probes_are_not_traced_and_errors_are(http: httpx.Client, exporter: InMemorySpanExporter) -> None:
    """Scrapes and probes make no spans; a refused request has its HTTP span and none below."""
    for path in ("/livez", "/readyz", "/metrics"):
        assert http.get(path).status_code == 200
    assert exporter.get_finished_spans() == ()
    assert http.post("/v1/completions", json={"model": "tone", "prompt": "x", "max_tokens": -1}).status_code == 400
    until(exporter.get_finished_spans)
    (only,) = exporter.get_finished_spans()
    assert only.attributes is not None and only.attributes["http.response.status_code"] == 400


def test_who_was_erased_is_in_no_span(http: httpx.Client, exporter: InMemorySpanExporter) -> None:
    """A path that names a person is written without the name."""
    assert http.delete("/v1/users/ada.org").status_code == 200
    until(lambda: "/v1/users/" in str([span.attributes for span in exporter.get_finished_spans()]))
    assert "ada" not in json.dumps([json.loads(span.to_json()) for span in exporter.get_finished_spans()])


def phases_of(header: str) -> dict[str, float]:
    """The header as milliseconds by phase."""
    parts = [TIMING.match(part) for part in header.split(", ")]
    assert all(parts), header
    return {part[1]: float(part[2]) for part in parts if part}


def test_every_answer_says_where_its_time_went(server: LiveServer) -> None:
    """`Server-Timing` has the phases of the engine's own clock; a stream's last event has them too."""
    body = {"model": "p1", "prompt": "the", "max_tokens": 8, "ignore_eos": True}
    with server.http() as http:
        reply = http.post("/v1/completions", json=body)
        told = phases_of(reply.headers["server-timing"])
        assert list(told) == ["store", "queue", "load", "prefill", "decode"]
        assert 0 < sum(told.values()) <= 1000 * reply.elapsed.total_seconds()
        assert told["decode"] > 0 and told["prefill"] > 0
        bare = phases_of(http.post("/v1/completions", json={**body, "model": None}).headers["server-timing"])
        assert set(bare) == set(told)
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
        reply = http.post("/v1/completions", json=streamed)
        events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
        usage = json.loads(events[-2])["usage"]
        assert list(usage["timings_ms"]) == list(told) and usage["completion_tokens"] == 8
        assert "server-timing" not in http.get("/v1/models").headers


def test_logs_name_request_tenant_version_and_trace(http: httpx.Client) -> None:
    """One line a request, with everything to find it by, and neither its text nor its key."""
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        reply = http.post("/v1/completions", json={"model": "tone", "prompt": SECRET, "max_tokens": 2})
        ours = reply.headers["x-request-id"]  # lines are written behind the last byte, earlier requests' perhaps now
        until(lambda: [line for line in lines if line.get("request_id") == ours])
    (line,) = [one for one in lines if one.get("request_id") == ours and one["event"] == "request"]
    assert (line["tenant"], line["trace_id"]) == ("acme", TRACE)
    assert line["prompts"] == reply.json()["prompt_versions"]
    assert set(line["milliseconds"]) >= {"queue", "prefill"}
    assert SECRET not in str(lines) and KEY not in str(lines)


def test_without_a_collector_nothing_is_traced(server: LiveServer) -> None:
    """No header, no span, whatever the caller sends."""
    with server.http(**HEADERS) as http:
        reply = http.post("/v1/completions", json={"prompt": "the", "max_tokens": 1})
    assert reply.status_code == 200 and "traceresponse" not in reply.headers


def test_spans_reach_a_collector(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """`--traces` sends them by OTLP over HTTP, all of them before the server has stopped."""
    with Collector() as collector:
        settings = Settings(
            model=str(tiny_models["llama"]),
            store=str(tmp_path),
            training="off",
            traces=collector.url,
            drain_seconds=1,
        )
        with serve(settings, tiny_models["llama"]) as live, live.http() as http:
            assert http.post("/v1/completions", json={"prompt": "the", "max_tokens": 2}).status_code == 200
    assert {"POST /v1/completions", "prefill", "decode"} <= collector.names()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra the error says what to install."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InvalidRequestError, match=r"promptd\[traces\]") as caught:
        open_tracing("http://127.0.0.1:4318", "0")
    assert caught.value.param == "traces"
