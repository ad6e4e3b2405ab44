"""`/v1/files`, through OpenAI's SDK and with bare requests."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import httpx
import openai
import pytest

from tests.api.training_server import MAX_UPLOAD_BYTES, TrainingServer

ROWS = b'{"prompt": "1 + 1 =", "completion": " 2"}\n'


def test_sdk_round_trip(trainer: TrainingServer) -> None:
    """Upload, describe, download and delete; then it is gone."""
    client = trainer.sdk()
    made = client.files.create(file=("train.jsonl", ROWS), purpose="fine-tune")
    assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(ROWS), "train.jsonl", "fine-tune")
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == ROWS
    assert client.files.delete(made.id).deleted is True
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(made.id)
        assert caught.value.code == "file_not_found"


def test_sdk_pages(trainer: TrainingServer) -> None:
    """The SDK walks through all pages, newest first."""
    client = trainer.sdk()
    ids = [client.files.create(file=(f"{number}", ROWS), purpose="fine-tune").id for number in range(5)]
    assert [file.id for file in client.files.list(limit=2)][:5] == ids[::-1]
    assert client.files.list(limit=2, after=ids[2]).data[0].id == ids[1]
    for file_id in ids:
        client.files.delete(file_id)


def test_files_belong_to_a_tenant(trainer: TrainingServer) -> None:
    """Another tenant sees nothing; a foreign file looks like one that never was."""
    made = trainer.sdk().files.create(file=("train.jsonl", ROWS), purpose="fine-tune")
    eve = trainer.sdk("eve")
    assert list(eve.files.list()) == []
    with trainer.http("eve") as http:
        foreign, absent = http.get(f"/v1/files/{made.id}"), http.get("/v1/files/file-none")
    assert foreign.status_code == absent.status_code == 404
    assert foreign.text.replace(made.id, "ID") == absent.text.replace("file-none", "ID")


FORM: dict[str, Any] = {"files": {"file": ("a.jsonl", ROWS)}, "data": {"purpose": "fine-tune"}}
BAD: list[tuple[str, dict[str, Any], int, str, str | None, str]] = [
    ("empty", {**FORM, "files": {"file": ("a", b"")}}, 400, "invalid_training_data", "file", "no rows at all"),
    ("binary", {**FORM, "files": {"file": ("a", ROWS + b"\xff")}}, 400, "invalid_training_data", "file", "line 2"),
    ("name", {**FORM, "files": {"file": ("a" * 256, ROWS)}}, 400, "invalid_value", "file", "printable"),
    ("purpose", {**FORM, "data": {"purpose": "vision"}}, 400, "invalid_value", "purpose", "'vision'"),
    ("no purpose", {**FORM, "data": {}}, 400, "invalid_value", "purpose", "required"),
    ("no file", {"files": {"other": ("a", ROWS)}, "data": FORM["data"]}, 400, "invalid_value", "file", "required"),
    ("text as file", {"data": {**FORM["data"], "file": "x"}}, 400, "invalid_value", "file", "file"),
    ("extra", {**FORM, "data": {"purpose": "fine-tune", "x": "1"}}, 400, "unknown_field", "x", "x"),
    ("json", {"json": {"file": "x", "purpose": "fine-tune"}}, 400, "invalid_value", "file", "required"),
    (
        "too large",
        {**FORM, "files": {"file": ("a", ROWS * (MAX_UPLOAD_BYTES // len(ROWS)))}},
        413,
        "payload_too_large",
        None,
        "larger",
    ),
]


@pytest.mark.parametrize(
    ("request_", "status", "code", "param", "told"), [one[1:] for one in BAD], ids=[b[0] for b in BAD]
)
def test_bad_uploads(
    trainer: TrainingServer, request_: dict[str, Any], status: int, code: str, param: str | None, told: str
) -> None:
    """Every bad upload is a typed error that names the part, and leaves no file."""
    with trainer.http("eve") as http:
        reply = http.post("/v1/files", **request_)
        assert http.get("/v1/files").json()["data"] == []
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param)
    assert told in error["message"]


def test_endless_uploads_are_cut(trainer: TrainingServer) -> None:
    """A body without a length is refused once it is too long; nobody reads it to its end."""
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    body = itertools.chain([head], itertools.repeat(ROWS * 200, 1000))
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    reply = None
    with trainer.http("eve") as http, contextlib.suppress(httpx.TransportError):  # it may hang up while we still send
        reply = http.post("/v1/files", content=body, headers=headers)
    assert reply is None or (reply.status_code, reply.json()["error"]["code"]) == (413, "payload_too_large")
    assert next(body, None) is not None or reply is not None
    with trainer.http("eve") as http:
        assert http.get("/v1/files").json()["data"] == []


def test_without_a_key(trainer: TrainingServer) -> None:
    """Nothing is read from callers that nobody knows."""
    with trainer.live.http() as http:
        assert http.post("/v1/files", **FORM).status_code == 401
        assert http.get("/v1/files").status_code == 401
