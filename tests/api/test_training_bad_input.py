"""What users hand in by mistake, on a server that trains: a typed error at once, or a failed job that says why.

Bad fields of a request are in `test_fine_tuning.py`, bad uploads in `test_files.py`, bad lines in `tests/training`.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from promptd import housekeeping
from promptd.api.job_schemas import MAX_ROWS
from promptd.settings import Settings
from tests.api.conftest import MODEL, LiveServer, serve
from tests.patience import PATIENCE_SECONDS, until

ROWS = [{"text": f"{('rain', 'song')[n % 2]} {n}", "label": ("weather", "music")[n % 2]} for n in range(20)]
MARKER = "Xyzzy4711"
MB = 1 << 20


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the store."""
    return tmp_path_factory.mktemp("bad-input")


@pytest.fixture(scope="module")
def live(tiny_models: dict[str, Path], store: Path) -> Iterator[LiveServer]:
    """A server that trains, and cleans up twenty times a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(housekeeping, "FIRST_RUN_SECONDS", 0.05)
        settings = Settings(
            model=str(tiny_models["llama"]),
            store=str(store),
            housekeeping_seconds=0.05,
            drain_seconds=0,
            max_upload_bytes=16 * MB,
        )
        with serve(settings, tiny_models["llama"]) as live:
            yield live


@pytest.fixture
def sdk(live: LiveServer) -> Iterator[openai.OpenAI]:
    """OpenAI's client."""
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def hyper(**values: Any) -> dict[str, Any]:
    """A method with these hyper-parameters, and few steps."""
    return {"type": "residual", "residual": {"hyperparameters": {"num_steps": 4, "batch_size": 4, **values}}}


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    """Rows as a file."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


BAD_FILES = [
    ("a key twice", b'{"text": "x", "text": "y", "label": "weather"}', "line 21: has the key 'text' twice"),
    ("a number as text", b'{"text": 3, "label": "weather"}', "line 21: 'text' must be a string, got 3"),
    ("mixed kinds", b'{"text": "x", "completion": "y"}', "line 21: has a completion, but line 1 has a label"),
    ("utf-16 inside", '{"text": "x", "label": "weather"}'.encode("utf-16-le"), "line 21: not JSON"),
]


@pytest.mark.parametrize(("line", "told"), [bad[1:] for bad in BAD_FILES], ids=[bad[0] for bad in BAD_FILES])
def test_bad_lines_of_files(sdk: openai.OpenAI, line: bytes, told: str) -> None:
    """The job is refused with the line's number; the control: without the line it is not."""
    for content, is_bad in ((jsonl(ROWS) + line, True), (jsonl(ROWS), False)):
        file = sdk.files.create(file=("rows.jsonl", content), purpose="fine-tune")
        if is_bad:
            with pytest.raises(openai.BadRequestError) as caught:
                sdk.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
            assert (caught.value.code, caught.value.param) == ("invalid_training_data", "training_file")
            assert told in caught.value.message
        else:
            sdk.fine_tuning.jobs.cancel(sdk.fine_tuning.jobs.create(model=MODEL, training_file=file.id).id)


def test_a_file_of_windows(live: LiveServer, sdk: openai.OpenAI) -> None:
    """A byte-order mark and line ends of two characters are no mistakes; UTF-16 is one, and is called so."""
    content = b"\xef\xbb\xbf" + jsonl(ROWS).replace(b"\n", b"\r\n")
    file = sdk.files.create(file=("windows.jsonl", content), purpose="fine-tune")
    job = sdk.fine_tuning.jobs.create(
        model=MODEL, training_file=file.id, method=hyper(), extra_body={"publish_worse": True}
    )  # type: ignore[call-overload]
    assert live.ended(job.id)["status"] == "succeeded"
    with pytest.raises(openai.BadRequestError, match="line 1: not UTF-8"):
        sdk.files.create(file=("utf16.jsonl", jsonl(ROWS).decode().encode("utf-16")), purpose="fine-tune")


def test_a_line_without_end(live: LiveServer, sdk: openai.OpenAI) -> None:
    """A line of 5 MB is refused by its number; a body of 200 MB by its length, before it is sent."""
    long = jsonl([*ROWS, {"text": "x" * 5 * MB, "label": "music"}])
    with pytest.raises(openai.BadRequestError, match=r"line 21: has \d+ bytes, at most 4194304 are allowed"):
        sdk.files.create(file=("long.jsonl", long), purpose="fine-tune")
    address = live.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=PATIENCE_SECONDS) as raw:
        raw.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            b"Content-Length: %d\r\n\r\n" % (200 * MB)
        )
        reply = raw.recv(65536).decode()
        while "}}" not in reply and (more := raw.recv(65536)):
            reply += more.decode()
    assert reply.startswith("HTTP/1.1 413") and "payload_too_large" in reply


def test_too_many_rows(live: LiveServer, sdk: openai.OpenAI) -> None:
    """51,000 rows are refused wherever they come from, with the limit; the control: 50,000 are taken."""
    row = {"text": "a", "label": "x"}
    rows = [row, {**row, "label": "y"}] * 25_500
    file = sdk.files.create(file=("many.jsonl", jsonl(rows)), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
    assert "line 50001: at most 50000 rows" in caught.value.message and "51000" in caught.value.message
    with live.http() as http:
        reply = http.post("/v1/fine_tuning/jobs", json={"rows": rows})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, "rows") and "50000" in error["message"]
        taken = http.post("/v1/fine_tuning/jobs", json={"rows": rows[:MAX_ROWS]})
        assert taken.status_code == 200, taken.text
        assert http.post(f"/v1/fine_tuning/jobs/{taken.json()['id']}/cancel").status_code == 200


FAILING: list[tuple[str, dict[str, Any], str, str]] = [
    ("too long", {"rows": [*ROWS, {"text": "long " * 300, "label": "music"}]}, "invalid_training_data", "line 21: "),
    ("prompt too long", {"method": hyper(num_virtual_tokens=300)}, "invalid_training_data", "300 virtual tokens + "),
    ("two rows", {"rows": ROWS[:2]}, "invalid_value", "0 training and 2 validation rows are too few"),
    ("diverges", {"method": hyper(learning_rate=1e30, num_steps=50)}, "numerical_error", "a smaller learning_rate"),
    ("same words", {"label_words": {"weather": " a", "music": " a"}}, "invalid_value", "the same word ' a'"),
]


@pytest.mark.parametrize(
    ("fields", "code", "told"), [failing[1:] for failing in FAILING], ids=[failing[0] for failing in FAILING]
)
def test_jobs_that_must_fail_say_why(live: LiveServer, fields: dict[str, Any], code: str, told: str) -> None:
    """What only the model can tell ends the job with a reason, in its error and its last event; there is no prompt."""
    with live.http() as http:
        body = {"suffix": "never", "rows": ROWS, "method": hyper(), **fields}
        job = live.ended(http.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"])
        assert (job["status"], job["error"]["code"]) == ("failed", code), job
        assert told in job["error"]["message"]
        event = http.get(f"/v1/fine_tuning/jobs/{job['id']}/events").json()["data"][0]
        assert (event["level"], event["message"]) == ("error", job["error"]["message"])
        assert http.get("/v1/prompts/never").status_code == 404


def test_a_file_that_is_deleted_under_its_job(live: LiveServer, sdk: openai.OpenAI) -> None:
    """A job that waits fails, and names the file; one that runs has its rows and goes on."""
    file = sdk.files.create(file=("rows.jsonl", jsonl(ROWS)), purpose="fine-tune")
    options = {"model": MODEL, "training_file": file.id, "extra_body": {"publish_worse": True}}
    endless = hyper(num_steps=100_000, num_evaluations=1)
    waiting, running = (sdk.fine_tuning.jobs.create(**options, method=endless) for _ in range(2))

    def steps(job_id: str) -> int:
        progress = sdk.fine_tuning.jobs.retrieve(job_id).model_dump()["progress"]
        return 0 if progress is None else int(progress["step"])

    for job in (waiting, running):
        until(lambda job_id=job.id: steps(job_id), "the job runs", pause_seconds=0.02)  # type: ignore[misc]
    sdk.fine_tuning.jobs.pause(waiting.id)
    sdk.files.delete(file.id)
    before = steps(running.id)
    until(lambda: steps(running.id) > before, "the other one goes on", pause_seconds=0.02)
    sdk.fine_tuning.jobs.cancel(running.id)
    with live.http() as http:
        resume = f"/v1/fine_tuning/jobs/{waiting.id}/resume"
        until(lambda: http.post(resume).status_code == 200, "it has been paused", pause_seconds=0.02)
    failed = live.ended(waiting.id)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "file_not_found")
    assert failed["error"]["message"] == f"training_file {file.id!r} was deleted"


def test_nothing_is_kept_of_what_was_deleted(live: LiveServer, sdk: openai.OpenAI, store: Path) -> None:
    """Rows, labels and what quotes them are in no file of the store once file, jobs and prompt are deleted."""
    rows = [{"text": f"{MARKER} {row['text']}", "label": f"{MARKER}-{row['label']}"} for row in ROWS]
    file = sdk.files.create(file=("rows.jsonl", jsonl(rows)), purpose="fine-tune")
    with live.http() as http:

        def create(**fields: Any) -> str:
            body = {"method": hyper(), "publish_worse": True, **fields}
            job: dict[str, Any] = http.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()
            return str(live.ended(job["id"])["id"])

        jobs = [
            create(training_file=file.id, suffix="marked"),
            create(rows=rows, suffix="marked"),
            create(training_file=file.id, label_words={row["label"]: f" {MARKER}" for row in rows}),  # fails, quoting
        ]
        assert http.get(f"/v1/fine_tuning/jobs/{jobs[2]}").json()["error"]["message"].count(MARKER)
        found = files_with(store, MARKER)
        assert any("blobs" in path.parts for path in found) and any("sqlite" in path.name for path in found)
        http.delete(f"/v1/files/{file.id}").raise_for_status()
        http.delete("/v1/prompts/marked").raise_for_status()
        for job in jobs:
            assert http.delete(f"/v1/fine_tuning/jobs/{job}").json()["deleted"] is True
            assert http.get(f"/v1/fine_tuning/jobs/{job}").status_code == 404
    for path in (store / "blobs").glob("*/*/*"):  # garbage is left alone while it is young
        os.utime(path, (0, 0))
    until(lambda: not files_with(store, MARKER), "it is in a file", pause_seconds=0.05)


def files_with(folder: Path, text: str) -> list[Path]:
    """The files that have a text in them, as a stranger with the disk in his hands would look."""
    found = []
    for path in folder.rglob("*"):
        try:
            if path.is_file() and text.encode() in path.read_bytes():
                found.append(path)
        except FileNotFoundError:  # it is being cleaned up
            continue
    return found


def test_open_jobs_are_not_deleted(live: LiveServer) -> None:
    """A job that may still run has to be cancelled first."""
    with live.http() as http:
        job = http.post("/v1/fine_tuning/jobs", json={"rows": ROWS, "method": hyper(num_steps=100_000)}).json()
        refused = http.delete(f"/v1/fine_tuning/jobs/{job['id']}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "job_state_conflict")
        http.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel").raise_for_status()
        live.ended(job["id"])
        assert http.delete(f"/v1/fine_tuning/jobs/{job['id']}").status_code == 200
        assert http.delete(f"/v1/fine_tuning/jobs/{job['id']}").status_code == 404
