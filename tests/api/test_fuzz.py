"""Requests drawn from the server's own OpenAPI page: never a 500, every error in the envelope, nothing undocumented."""

from __future__ import annotations

import os

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis import Case
from schemathesis.checks import CHECKS

from promptd.api.routes import ROUTES, Route
from tests.api.conftest import MODEL, LiveServer
from tests.api.training_server import KEYS, TrainingServer

SEED = int(os.environ.get("FUZZ_SEED", "1"))
MAX_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "12"))
CONFORMANCE = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)


@pytest.fixture(scope="module")
def schema(server: LiveServer) -> schemathesis.openapi.OpenApiSchema:
    """The page that the running server shows."""
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def use_name(case: Case, name: str) -> None:
    """Ask for a model that exists: drawn names are nearly always absent ones."""
    if isinstance(case.body, dict):
        for field in ("prompt_id", "prompt_ids", "ensemble"):
            case.body.pop(field, None)
        case.body["model"] = name
    elif case.method == "GET" and "name" in (case.path_parameters or {}):
        case.path_parameters["name"] = name


@pytest.mark.parametrize(
    "route", [route for route in ROUTES if not route.is_page], ids=lambda route: f"{route.method} {route.path}"
)
def test_fuzz(
    server: LiveServer, trainer: TrainingServer, schema: schemathesis.openapi.OpenApiSchema, route: Route
) -> None:
    """Valid and invalid requests of one operation, from a fixed seed; training is asked of a server that trains."""
    path = route.path.replace(":path", "")
    operation = schema[path][route.method]
    url = trainer.live.url if route.tag == "training" else server.url
    strategy = operation.as_strategy(schemathesis.GenerationMode.POSITIVE) | operation.as_strategy(
        schemathesis.GenerationMode.NEGATIVE
    )

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=MAX_EXAMPLES,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(case=strategy, name=st.sampled_from([None, MODEL, "p0", "p5"]))
    def run(case: Case, name: str | None) -> None:
        if name is not None:
            use_name(case, name)
        response = case.call(base_url=url, headers={"Authorization": f"Bearer {KEYS['admin']}"})
        case.validate_response(response, checks=CHECKS.get_by_names(CONFORMANCE))
        if response.status_code >= 400 and "/readyz" not in path:
            body = response.json()
            assert list(body) == ["error"]
            assert list(body["error"]) == ["message", "type", "param", "code"]
            assert body["error"]["code"]

    run()
