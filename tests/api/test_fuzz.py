"""Requests drawn from the server's own OpenAPI page: never a 500, every error in the envelope, nothing undocumented."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from pydantic import SecretStr
from schemathesis import Case
from schemathesis.checks import CHECKS

from promptd.api.routes import ROUTES, Route
from promptd.settings import Settings
from tests.api.conftest import MODEL, LiveServer, serve
from tests.api.training_server import KEYS
from tests.engine.harness import library

SEED = int(os.environ.get("FUZZ_SEED", "1"))
MAX_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "12"))
NUM_USERS = 8
CONFORMANCE = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)


@dataclass(frozen=True)
class Fuzzed:
    """A server that asks everybody for a key, and the page that it shows."""

    live: LiveServer
    schema: schemathesis.openapi.OpenApiSchema
    known: Mapping[str, Sequence[str]]
    """Parameter of a path -> what there is of it."""


@pytest.fixture(scope="module")
def fuzzed(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    """One with six prompts, some files, keys and tenants, and jobs for workers which never come."""
    folder = tiny_models["llama"]
    settings = Settings(
        model=str(folder),
        store=str(tmp_path_factory.mktemp("fuzz")),
        max_queue=24,
        drain_seconds=1,
        training="worker",
        admin_key=SecretStr(KEYS["admin"]),
    )
    with serve(settings, folder) as live:
        with live.http(Authorization=f"Bearer {KEYS['admin']}") as http:
            for number, artifact in enumerate(library(folder)[:6]):
                assert http.put(f"/v1/prompts/p{number}", content=artifact.content).status_code == 201
            known = {"file_id": [make_file(http) for _ in range(3)], "tenant": [f"tenant-{n}" for n in range(3)]}
            known["user"] = [f"user-{number}" for number in range(NUM_USERS)]
            for user in known["user"]:
                make_file(http, user=user)
            for parameter, path, bodies in (
                (
                    "job_id",
                    "/v1/fine_tuning/jobs",
                    [{"model": MODEL, "training_file": one} for one in known["file_id"]],
                ),
                ("key_id", "/admin/keys", [{"tenant": tenant} for tenant in known["tenant"]]),
            ):
                known[parameter] = [http.post(path, json=body).raise_for_status().json()["id"] for body in bodies]
        yield Fuzzed(live, schemathesis.openapi.from_url(f"{live.url}/openapi.json"), known)


def make_file(http: httpx.Client, **fields: str) -> str:
    """Upload training data and return its id."""
    rows = b'{"prompt": "a", "completion": "b"}\n' * 4
    made = http.post("/v1/files", files={"file": ("rows.jsonl", rows)}, data={"purpose": "fine-tune", **fields})
    return str(made.raise_for_status().json()["id"])


def body_fields(fuzzed: Fuzzed, route: Route) -> set[str]:
    """The fields that a route's page names for its JSON body."""
    page = fuzzed.schema.raw_schema
    operation = page["paths"][route.path.replace(":path", "")][route.method.lower()]
    schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    if "$ref" in schema:
        schema = page["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return set(schema.get("properties", ()))


def use_known(case: Case, name: str, which: int, known: Mapping[str, Sequence[str]], fields: Set[str]) -> None:
    """Ask for what exists: drawn names are nearly always absent ones."""
    parameters = case.path_parameters or {}
    for parameter in parameters.keys() & known.keys():
        parameters[parameter] = known[parameter][which % len(known[parameter])]
    if isinstance(case.body, dict) and "model" in fields:
        for field in ("prompt_id", "prompt_ids", "ensemble"):
            case.body.pop(field, None)
        case.body["model"] = name
        if case.path == "/v1/fine_tuning/jobs":
            case.body["training_file"] = known["file_id"][0]
    if "name" in parameters and not (case.method == "DELETE" and "tenant" not in parameters):  # else it is gone
        parameters["name"] = name


def draw(fuzzed: Fuzzed, route: Route, num_cases: int) -> Counter[int]:
    """Send so many requests of one operation, valid and not, from a fixed seed; check each answer."""
    path = route.path.replace(":path", "")
    operation = fuzzed.schema[path][route.method]
    strategy = operation.as_strategy(schemathesis.GenerationMode.POSITIVE) | operation.as_strategy(
        schemathesis.GenerationMode.NEGATIVE
    )
    fields, statuses = body_fields(fuzzed, route), Counter[int]()

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(case=strategy, name=st.sampled_from([None, MODEL, "p0", "p5"]), which=st.integers(0, 99))
    def run(case: Case, name: str | None, which: int) -> None:
        if name is not None:
            use_known(case, name, which, fuzzed.known, fields)
        response = case.call(base_url=fuzzed.live.url, headers={"Authorization": f"Bearer {KEYS['admin']}"})
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS.get_by_names(CONFORMANCE))
        if response.status_code >= 400 and "/readyz" not in path:
            body = response.json()
            assert list(body) == ["error"]
            assert list(body["error"]) == ["message", "type", "param", "code"]
            assert body["error"]["code"]

    run()
    return statuses


all_routes = pytest.mark.parametrize(
    "route",
    [route for route in ROUTES if not route.is_page],
    ids=lambda route: f"{route.method} {route.path}",
)


@all_routes
def test_fuzz(fuzzed: Fuzzed, route: Route) -> None:
    """A dozen of each operation."""
    draw(fuzzed, route, MAX_EXAMPLES)


@pytest.mark.long
@all_routes
def test_fuzz_long(fuzzed: Fuzzed, route: Route) -> None:
    """2,000 of each operation; none is answered with a server error, or with a status that its page does not name."""
    statuses = draw(fuzzed, route, 2000)
    print(json.dumps({"route": f"{route.method} {route.path}", "statuses": dict(sorted(statuses.items()))}))
    assert max(statuses) < 500
