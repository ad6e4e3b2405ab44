"""OpenTelemetry traces, off unless a collector is named. The only module that imports OpenTelemetry.

FastAPI makes the span of each HTTP request and takes in the caller's `traceparent`. Below it stand what the request did
in the store, and a span for every text in the engine with its phases. Attributes have OpenTelemetry's GenAI names where
there are some (https://opentelemetry.io/docs/specs/semconv/gen-ai/); no text, no token and no key is in any of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from promptd.api.trail import Run, Trail, shown_path, spans_of
from promptd.errors import InvalidRequestError

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

QUIET_PATHS = frozenset({"/livez", "/readyz", "/startupz", "/health", "/metrics"})
"""Probes: neither traced nor logged."""
_SPANS = {"queue": "queue", "load": "prompt_load", "prefill": "prefill", "decode": "decode"}


class Tracing:
    """Writes spans to the exporters of one provider."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace

        self._trace = trace
        self._provider = provider
        self._tracer = provider.get_tracer("promptd")
        provider.add_span_processor(_stripper())

    @property
    def telemetry(self) -> TelemetryConfig:
        """What FastAPI is to record by itself: HTTP requests, but for probes."""
        return {**NO_TELEMETRY, "tracing": True, "tracer_provider": self._provider, "exclude": _is_quiet}

    def ids(self) -> Mapping[str, str]:
        """Return `trace_id` and `span_id` of the request that is being served; empty outside of one."""
        context = self._trace.get_current_span().get_span_context()
        if not context.is_valid:
            return {}
        return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}

    def traceresponse(self) -> str:
        """Return the header that tells a caller the ids (https://www.w3.org/TR/trace-context-2/); empty without."""
        context = self._trace.get_current_span().get_span_context()
        ids = self.ids()
        return f"00-{ids['trace_id']}-{ids['span_id']}-{int(context.trace_flags):02x}" if ids else ""

    def record(self, trail: Trail) -> None:
        """Write a request's spans, below the one that is being served."""
        to_epoch = time.time() - time.monotonic()

        def span(name: str, begin: float, end: float, attributes: Mapping[str, Any], parent: Context | None) -> Context:
            begin_ns, end_ns = (int((at + to_epoch) * 1e9) for at in (begin, end))
            made = self._tracer.start_span(name, context=parent, attributes=attributes, start_time=begin_ns)
            made.end(end_ns)
            below: Context = self._trace.set_span_in_context(made)
            return below

        for lookup in trail.lookups:
            span("store", lookup.began, lookup.ended, {"promptd.store.operation": lookup.what}, None)
        for run in trail.runs:
            end = run.timings.finished
            if end is None:
                continue
            whole = span(f"{trail.operation} {trail.model}", run.timings.arrived, end, _attributes(trail, run), None)
            for phase, begin, phase_end in spans_of(run.timings):
                span(_SPANS[phase], begin, phase_end, {}, whole)

    def close(self) -> None:
        """Send what is still here."""
        self._provider.shutdown()


def open_tracing(endpoint: str, version: str) -> Tracing:
    """Make what sends spans to a collector by OTLP over HTTP, for example `http://127.0.0.1:4318`.

    Sampling and everything else beyond the address is OpenTelemetry's own: `OTEL_TRACES_SAMPLER` and its other
    variables work. Raises `InvalidRequestError` where the packages are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise InvalidRequestError(
            f"traces need {error.name}: pip install 'promptd[traces]'", param="traces", code="missing_package"
        ) from None
    resource = Resource.create({"service.name": "promptd", "service.version": version})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")))
    return Tracing(provider)


NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "operation_spans": False}
"""FastAPI records nothing by itself: metrics and logs are ours."""


def _attributes(trail: Trail, run: Run) -> Mapping[str, Any]:
    found: dict[str, Any] = {
        "gen_ai.operation.name": trail.operation,
        "gen_ai.provider.name": "promptd",
        "gen_ai.request.model": trail.model,
        "gen_ai.usage.input_tokens": run.num_prompt_tokens,
        "gen_ai.usage.output_tokens": run.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": run.num_cached_tokens,
        "promptd.tenant": trail.tenant,
        "promptd.usage.virtual_tokens": run.num_virtual_tokens,
    }
    if run.finish_reason is not None:
        found["gen_ai.response.finish_reasons"] = [run.finish_reason]
    if trail.prompts:
        found["gen_ai.prompt.name"] = trail.prompts[-1]
        found["promptd.prompt.versions"] = trail.versions
    return found


def _is_quiet(scope: MutableMapping[str, Any]) -> bool:
    return scope["path"] in QUIET_PATHS


def _stripper() -> Any:
    """FastAPI notes addresses as they are: a query may have a text or a key in it, a path the name of a person."""
    from opentelemetry.sdk.trace import Span, SpanProcessor

    class Stripper(SpanProcessor):
        def on_start(self, span: Span, parent_context: Context | None = None) -> None:
            attributes = span.attributes or {}
            if "url.query" in attributes:
                span.set_attribute("url.query", "")
            if "url.path" in attributes:
                span.set_attribute("url.path", shown_path(str(attributes["url.path"])))

    return Stripper()
