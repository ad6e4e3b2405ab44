"""`POST /v1/prompts/{name}/evaluate`: the runner's own numbers, bounded, and never in the way of others."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from promptd_client import Client

from promptd import LLM
from promptd.engine.request import ScoreOutput, ScoreRequest
from promptd.errors import OverloadedError
from tests.api.conftest import LiveServer
from tests.evaluation.test_runner import LABELLED, WRITTEN, labels, run
from tests.overload.wire import request_bytes
from tests.patience import PATIENCE_SECONDS, until

ROWS = [{**example.fields, "label": example.label} for example in LABELLED]


def ask(server: LiveServer, name: str, **body: Any) -> httpx.Response:
    """POST one evaluation."""
    with server.http() as http:
        return http.post(f"/v1/prompts/{name}/evaluate", json=body)


def test_it_is_the_evaluation_of_the_runner(llm: LLM, server: LiveServer, prompt_files: dict[str, str]) -> None:
    """The same metrics, predictions and versions as in this process, for labels and for texts."""
    answer = ask(server, "c1", rows=ROWS, return_predictions=True).json()
    assert answer["object"] == "prompt.evaluation" and answer["id"].startswith("eval-")
    for key, result in zip(
        ("majority_class", "prompt", "bare_model"), run(llm, LABELLED, [prompt_files["c1"], None]), strict=True
    ):
        assert answer[key]["metrics"] == pytest.approx(result.metrics)
        assert [row["prediction"] for row in answer[key]["predictions"]] == labels(result)
        assert answer[key]["prompt_versions"] == list(result.prompt_versions)
        assert answer[key]["template"] == "{text} is a"
    assert [row["line"] for row in answer["prompt"]["predictions"]] == list(range(1, len(ROWS) + 1))

    rows = [{**example.fields, "completion": example.completion} for example in WRITTEN]
    answer = ask(server, "writer@1", rows=rows).json()
    expected = run(llm, WRITTEN, [prompt_files["writer"], None])
    for key, result in zip(("prompt", "bare_model"), expected, strict=True):
        assert answer[key]["metrics"] == pytest.approx(result.metrics)
        assert set(answer[key]["metrics"]) == {"bleu", "chrf", "rouge_l", "token_f1", "exact_match"}
    assert answer["majority_class"] is None and "predictions" not in answer["prompt"]


def test_a_file_is_as_good_as_rows(server: LiveServer) -> None:
    """Rows uploaded once score the same; a bad line and too many rows are named with the field."""
    with server.http() as http:

        def upload(rows: list[dict[str, Any]]) -> str:
            content = "\n".join(map(json.dumps, rows))
            answer = http.post("/v1/files", files={"file": ("rows.jsonl", content)}, data={"purpose": "fine-tune"})
            return answer.json()["id"]  # type: ignore[no-any-return]

        good, bad, many = upload(ROWS), upload([*ROWS, {"text": "x"}]), upload(ROWS * 167)
    expected = ask(server, "c0", rows=ROWS).json()["prompt"]["metrics"]
    assert ask(server, "c0", file_id=good).json()["prompt"]["metrics"] == pytest.approx(expected)
    with Client(server.url) as client:
        for rows in (good, ROWS):
            measured = client.prompts.evaluate("c0", rows)
            assert measured.prompt.metrics == pytest.approx(expected)
            assert measured.majority_class is not None and measured.bare_model.num_rows == len(ROWS)
    for file_id, part in ((bad, "line 13: needs exactly one"), (many, "2004 rows, an evaluation takes 2000")):
        error = ask(server, "c0", file_id=file_id).json()["error"]
        assert part in error["message"] and error["param"] == "file_id"


def test_bad_requests_name_the_row(server: LiveServer) -> None:
    """Each mistake has its own code and place; nothing runs."""
    cases: list[tuple[str, dict[str, Any], int, str, str]] = [
        ("absent", {"rows": ROWS}, 404, "model_not_found", "absent"),
        ("c0", {}, 400, "invalid_value", "either rows or file_id"),
        ("c0", {"rows": ROWS, "file_id": "file-1"}, 400, "invalid_value", "either rows or file_id"),
        ("c0", {"file_id": "file-absent"}, 404, "file_not_found", "file-absent"),
        ("c0", {"rows": []}, 400, "invalid_value", "rows"),
        ("c0", {"rows": [{"text": "x", "label": "fox"}] * 2001}, 400, "invalid_value", "2000"),
        ("c0", {"rows": ROWS, "answer_by": "guess"}, 400, "invalid_value", "answer_by"),
        ("c0", {"rows": ROWS, "file": "x"}, 400, "unknown_field", "file"),
        ("c0", {"rows": [*ROWS, {"text": "x"}]}, 400, "invalid_training_data", "line 13: needs exactly one"),
        ("c0", {"rows": [*ROWS, {"text": "x", "label": "cat"}]}, 400, "invalid_training_data", "line 13: label 'cat'"),
        ("c0", {"rows": [ROWS[0], {"text": "x", "completion": "y"}]}, 400, "invalid_training_data", "line 2: has a"),
        ("c0", {"rows": [{"question": "x", "label": "fox"}]}, 400, "invalid_training_data", "line 1: template field"),
    ]
    for name, body, status, code, part in cases:
        answer = ask(server, name, **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
        assert part in answer.json()["error"]["message"], answer.text


def test_it_never_has_more_than_half_of_the_rows(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open requests of two evaluations at once stay within the bound; a full queue makes them wait, not fail."""
    services = server.app.state.services
    now, most, refusals = 0, 0, 3
    score: Callable[[ScoreRequest], Any] = services.engine.score

    async def watched(request: ScoreRequest) -> ScoreOutput:
        nonlocal now, most, refusals
        if refusals:
            refusals -= 1
            raise OverloadedError("full", code="queue_full")
        now += 1
        most = max(most, now)
        try:
            return await score(request)  # type: ignore[no-any-return]
        finally:
            now -= 1

    monkeypatch.setattr(services.engine, "score", watched)
    bodies = [{"rows": ROWS}, {"rows": ROWS[::-1]}]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda body: ask(server, "c0", **body), bodies))
    one, other = (answer.json()["prompt"]["metrics"] for answer in answers)
    assert one == pytest.approx(other)
    assert 1 < most <= services.max_evaluating == 8
    assert refusals == 0


def test_a_lost_client_ends_the_evaluation(server: LiveServer) -> None:
    """Nothing of it is left in the engine, and nothing new comes."""
    engine = server.app.state.services.engine
    rows = [{"text": f"the fox {number} and the dog", "completion": "x"} for number in range(1000)]
    url, before = httpx.URL(server.url), engine.stats()
    with socket.create_connection((url.host, url.port), timeout=PATIENCE_SECONDS) as connection:
        connection.sendall(request_bytes({"rows": rows}, path="/v1/prompts/plain/evaluate"))
        until(lambda: engine.engine.has_work)
    until(lambda: engine.stats().requests_aborted > before.requests_aborted and not engine.engine.has_work)
    finished = engine.stats().requests_finished
    assert finished - before.requests_finished < len(rows)
    time.sleep(0.3)
    assert not engine.engine.has_work and engine.stats().requests_finished == finished
