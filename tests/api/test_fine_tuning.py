"""Training jobs over HTTP: OpenAI's SDK drives them; a pretended worker does what they ask for."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from promptd.jobs import JobClaims, JobError, JobProgress, JobSpec
from promptd.training import METHODS
from promptd.training.job_spec import training_config
from tests.api.conftest import MODEL, LiveServer
from tests.api.training_server import TrainingServer, result
from tests.patience import PATIENCE_SECONDS, until

pytestmark = pytest.mark.usefixtures("no_open_jobs")
ROWS = [{"text": f"row {number}", "label": ("no", "yes")[number % 2]} for number in range(8)]
METHOD = {"type": "residual", "residual": {"hyperparameters": {"num_virtual_tokens": 4, "num_steps": 40}}}


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    """Rows as a file."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def file_id(trainer: TrainingServer) -> Iterator[str]:
    """A training file of acme."""
    client = trainer.sdk()
    made = client.files.create(file=("train.jsonl", jsonl(ROWS)), purpose="fine-tune")
    yield made.id
    client.files.delete(made.id)


def test_sdk_from_upload_to_success(trainer: TrainingServer, file_id: str) -> None:
    """The SDK creates a job, watches it, and learns the name of the prompt that came out."""
    jobs = trainer.sdk().fine_tuning.jobs
    job = jobs.create(
        model=MODEL, training_file=file_id, suffix="yes-no", seed=7, method=METHOD, metadata={"team": "a"}
    )  # type: ignore[call-overload]
    assert (job.object, job.status, job.model, job.seed) == ("fine_tuning.job", "queued", MODEL, 7)
    assert job.id.startswith("ftjob-") and job.fine_tuned_model is None and job.finished_at is None
    assert job.training_file == file_id and job.metadata == {"team": "a"} and job.error is None
    assert job.hyperparameters.model_dump(exclude_unset=True) == METHOD["residual"]["hyperparameters"]  # type: ignore[index]

    async def train(worker: JobClaims) -> None:
        (claim,) = await worker.claim(1)
        assert claim.job.spec.label_words == {
            "no": " no",
            "yes": " yes",
        }  # the labels themselves, unless said otherwise
        claim = await worker.save_checkpoint(claim, b"state", 20)
        progress = JobProgress(
            20, 40, num_tokens=900, loss=0.5, validation_loss=0.6, tokens_per_second=9, eta_seconds=60
        )
        earliest = int(time.time()) + 60
        await worker.report(claim, progress)
        running = jobs.retrieve(job.id)
        assert (running.status, running.trained_tokens) == ("running", None)
        assert running.estimated_finish is not None and earliest <= running.estimated_finish <= time.time() + 61
        (checkpoint,) = jobs.checkpoints.list(job.id)
        assert (checkpoint.step_number, checkpoint.fine_tuned_model_checkpoint) == (20, None)
        assert (checkpoint.metrics.train_loss, checkpoint.metrics.full_valid_loss) == (0.5, 0.6)
        await worker.finish(claim, result("yes-no"))

    trainer.work(train)
    done = jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model, done.trained_tokens) == ("succeeded", "yes-no", 900)
    assert done.finished_at is not None and done.model_dump()["result"]["scores_after"] == {"accuracy": 0.9}
    (checkpoint,) = jobs.checkpoints.list(job.id)
    assert (checkpoint.step_number, checkpoint.fine_tuned_model_checkpoint) == (40, "yes-no@1")
    events = list(jobs.list_events(job.id, limit=2))  # through all pages
    assert [event.type for event in events] == ["message", "metrics", "message", "message"]
    assert [event.created_at for event in events] == sorted((event.created_at for event in events), reverse=True)
    assert events[0].message == "The job has published yes-no@1"
    assert events[1].data["loss"] == 0.5  # type: ignore[index]
    assert next(iter(jobs.list(limit=1))).id == job.id


def test_sdk_cancel_pause_resume(trainer: TrainingServer, file_id: str) -> None:
    """Pause, resume and cancel; a job that is about to stop shows as running."""
    jobs = trainer.sdk().fine_tuning.jobs
    job = jobs.create(model=MODEL, training_file=file_id)
    assert job.method is not None and job.method.type == "residual"
    assert jobs.pause(job.id).status == "paused"
    assert jobs.resume(job.id).status == "queued"

    async def train(worker: JobClaims) -> None:
        (claim,) = await worker.claim(1)
        assert jobs.cancel(job.id).status == "running"
        assert jobs.retrieve(job.id).status == "running"
        assert (await worker.heartbeat(claim)).job.state == "cancelling"
        await worker.release(claim)

    trainer.work(train)
    assert jobs.retrieve(job.id).status == "cancelled"
    assert jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError) as caught:
        jobs.resume(job.id)
    assert caught.value.code == "job_state_conflict"


def test_failed_job_says_why(trainer: TrainingServer, file_id: str) -> None:
    """A failed job carries code, message and field; there is no prompt."""
    jobs = trainer.sdk().fine_tuning.jobs
    job = jobs.create(model=MODEL, training_file=file_id)

    async def train(worker: JobClaims) -> None:
        (claim,) = await worker.claim(1)
        await worker.fail(claim, JobError("numerical_error", "the loss is not finite at step 3", "learning_rate"))

    trainer.work(train)
    failed = jobs.retrieve(job.id)
    assert failed.status == "failed" and failed.fine_tuned_model is None and failed.error is not None
    assert (failed.error.code, failed.error.param) == ("numerical_error", "learning_rate")
    assert list(jobs.checkpoints.list(job.id)) == []


def test_events_stream(trainer: TrainingServer, file_id: str) -> None:
    """A stream of events is complete, in order, goes on behind a cursor, and ends with the job."""
    jobs = trainer.sdk().fine_tuning.jobs
    job = jobs.create(model=MODEL, training_file=file_id)
    seen: list[dict[str, Any]] = []

    def read(after: str | None = None) -> list[dict[str, Any]]:
        params = {"stream": "true"} | ({} if after is None else {"after": after})
        with (
            trainer.http() as http,
            http.stream("GET", f"/v1/fine_tuning/jobs/{job.id}/events", params=params) as reply,
        ):
            assert reply.headers["content-type"].startswith("text/event-stream")
            lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    reader = threading.Thread(target=lambda: seen.extend(read()))
    reader.start()

    async def train(worker: JobClaims) -> None:
        (claim,) = await worker.claim(1)
        for step in range(1, 4):
            await worker.report(claim, JobProgress(step, 3))
        await worker.finish(claim, result("x"))

    trainer.work(train)
    reader.join(timeout=PATIENCE_SECONDS)
    assert not reader.is_alive()
    assert seen == [event.model_dump(exclude_unset=True) for event in jobs.list_events(job.id, limit=100)][::-1]
    assert [one["data"].get("step") for one in seen if one["type"] == "metrics"] == [1, 2, 3]
    assert read(after=seen[2]["id"]) == seen[3:]


def test_idempotency_key(trainer: TrainingServer, file_id: str) -> None:
    """The same request under the same key is the same job, even when its file is gone; another one is a conflict."""
    body = {"model": MODEL, "rows": ROWS, "suffix": "once"}
    with trainer.http() as http:
        headers = {"Idempotency-Key": "key-1"}
        first, again = (http.post("/v1/fine_tuning/jobs", json=body, headers=headers).json() for _ in range(2))
        other = http.post("/v1/fine_tuning/jobs", json={**body, "suffix": "twice"}, headers=headers)
        long = http.post("/v1/fine_tuning/jobs", json=body, headers={"Idempotency-Key": "k" * 256})
    assert first["id"] == again["id"]
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert (long.status_code, long.json()["error"]["param"]) == (400, "idempotency-key")


def hyper(**values: Any) -> dict[str, Any]:
    """A method with these hyper-parameters."""
    return {"method": {"type": "residual", "residual": {"hyperparameters": values}}}


LABELS = {"template": "{text} is", "label_words": {"yes": " y", "no": " n"}}
BAD: list[tuple[dict[str, Any], int, str, str | None, str]] = [
    ({"model": "nobody"}, 404, "model_not_found", "model", "nobody"),
    ({"rows": None}, 400, "invalid_value", "training_file", "either training_file or rows"),
    ({"training_file": "file-1"}, 400, "invalid_value", "training_file", "either training_file or rows"),
    ({"rows": None, "training_file": "file-1"}, 400, "file_not_found", "training_file", "no file 'file-1'"),
    ({"validation_file": "file-1"}, 400, "file_not_found", "validation_file", "no file 'file-1'"),
    ({"rows": []}, 400, "invalid_value", "rows", "at least 1"),
    ({"rows": [{"text": "x"}]}, 400, "invalid_training_data", "rows", "line 1: needs exactly one of"),
    ({"rows": [*ROWS, {"text": "x", "label": 3}]}, 400, "invalid_training_data", "rows", "line 9: 'label'"),
    ({"rows": [*ROWS, {"text": "x", "completion": "y"}]}, 400, "invalid_training_data", "rows", "line 9: has a comp"),
    ({"rows": [*ROWS, {"txt": "x", "label": "no"}]}, 400, "invalid_training_data", "rows", "line 9: template field"),
    ({"rows": [{"text": "x", "label": "no"}] * 2}, 400, "invalid_training_data", "rows", "1 different labels"),
    ({**LABELS, "rows": [{"text": "x", "label": "maybe"}]}, 400, "invalid_training_data", "rows", "line 1: label 'may"),
    ({"template": "{text"}, 400, "template_invalid", "template", "single '{'"),
    ({"template": "{other}"}, 400, "invalid_training_data", "rows", "line 1: template field 'other'"),
    ({"label_words": {"yes": "y"}}, 400, "invalid_value", "label_words", "at least 2"),
    ({"method": {"type": "magic"}}, 400, "invalid_value", "method.type", "'magic'"),
    (hyper(rank=3), 400, "invalid_value", "method.residual.hyperparameters.rank", "num_steps"),
    (hyper(num_steps=0), 400, "invalid_value", "method.residual.hyperparameters.num_steps", "got 0"),
    (hyper(learning_rate="inf"), 400, "invalid_value", "method.residual.hyperparameters.learning_rate", "'inf'"),
    (
        hyper(num_virtual_tokens=10**6),
        400,
        "invalid_value",
        "method.residual.hyperparameters.num_virtual_tokens",
        "1 to",
    ),
    ({"suffix": "a b"}, 400, "invalid_prompt_name", "name", "'a b'"),
    ({"suffix": MODEL}, 409, "prompt_name_reserved", "name", "reserved"),
    ({"base_prompt": "nobody"}, 404, "model_not_found", "base_prompt", "nobody"),
    ({"behind": ["nobody"]}, 404, "model_not_found", "behind", "nobody"),
    ({"behind": ["p0"] * 16}, 400, "invalid_value", "behind", "at most 15"),
    ({"distill": {}}, 400, "invalid_value", "distill.text", "give one of them"),
    ({"distill": {"text": "a", "prompt": "p0"}}, 404, "model_not_found", "distill.prompt", "p0"),
    ({"distill": {"text": "a", "depth": 3}}, 400, "invalid_value", "distill.depth", "top_k"),
    ({"distill": {"text": "a", "top_k": 0}}, 400, "invalid_value", "distill.top_k", "got 0"),
    ({"distill": {"text": 3}}, 400, "invalid_value", "distill.text", "a string, got 3"),
    ({"distill": {"prompt": 3}}, 400, "invalid_value", "distill.prompt", "a string, got 3"),
    ({"distill": {"prompt": "nobody"}}, 404, "model_not_found", "distill.prompt", "nobody"),
    ({"distill": {"text": "a"}}, 400, "invalid_training_data", "rows", "line 1: has a label, 'no'"),
    ({"seed": -1}, 400, "invalid_value", "seed", "-1"),
    ({"priority": 10}, 400, "invalid_value", "priority", "10"),
    ({"integrations": [{"type": "wandb"}]}, 400, "invalid_value", "integrations", "at most 0"),
    ({"hyperparameters": {"n_epochs": 3}}, 400, "unknown_field", "hyperparameters", "hyperparameters"),
]


@pytest.mark.parametrize(("fields", "status", "code", "param", "told"), BAD)
def test_bad_jobs(
    trainer: TrainingServer, fields: dict[str, Any], status: int, code: str, param: str | None, told: str
) -> None:
    """Every bad job is refused at once, with field, value and line; nothing is queued."""
    body = {name: value for name, value in {"model": MODEL, "rows": ROWS, **fields}.items() if value is not None}
    with trainer.http("eve") as http:
        reply = http.post("/v1/fine_tuning/jobs", json=body)
        assert http.get("/v1/fine_tuning/jobs").json()["data"] == []
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param), error
    assert told in error["message"]


def test_readers_of_events_are_bounded(trainer: TrainingServer, file_id: str) -> None:
    """Each looks at the store again and again: one tenant gets 4/5 of them, and 503 for more; a list is always told."""
    budget = trainer.live.app.state.services.gate.budgets.event_streams
    with trainer.sdk() as sdk, trainer.http() as http:
        job = sdk.fine_tuning.jobs.create(model=MODEL, training_file=file_id)
        path = f"/v1/fine_tuning/jobs/{job.id}/events"
        with http.stream("GET", path, params={"stream": "true"}) as reply:
            assert reply.status_code == 200 and budget.reading().used == 1
            budget.take("acme", budget.most_for_one - 1)
            refused = http.get(path, params={"stream": "true"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert http.get(path).status_code == 200
            budget.give_back("acme", budget.most_for_one - 1)
        until(lambda: budget.reading().used == 0, "the reader has left")
        sdk.fine_tuning.jobs.cancel(job.id)
        assert http.get(path, params={"stream": "true"}).text.endswith("[DONE]\n\n")


def test_infinity_is_not_json(trainer: TrainingServer) -> None:
    """A learning rate of Infinity is refused where the body is read."""
    body = json.dumps({"model": MODEL, "rows": ROWS, **hyper(learning_rate=float("inf"))})
    with trainer.http() as http:
        reply = http.post("/v1/fine_tuning/jobs", content=body, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_json")


def test_bad_rows_of_files(trainer: TrainingServer) -> None:
    """Faults of the validation file's rows name that file's field."""
    client = trainer.sdk()
    good = client.files.create(file=("good", jsonl(ROWS)), purpose="fine-tune").id
    bad = client.files.create(file=("bad", b'{"text": "x", "label": "no"}\n[1]\n'), purpose="fine-tune").id
    half = client.files.create(file=("half", b'{"text": "\\ud800", "label": "no"}\n'), purpose="fine-tune").id
    for fields, param, told in (
        ({"training_file": bad}, "training_file", "line 2: must be an object"),
        ({"training_file": good, "validation_file": bad}, "validation_file", "line 2: must be an object"),
        ({"training_file": half}, "training_file", "line 1: has half a character"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.fine_tuning.jobs.create(model=MODEL, **fields)
        assert caught.value.param == param and told in str(caught.value)


def test_jobs_belong_to_a_tenant(trainer: TrainingServer, file_id: str) -> None:
    """Another tenant can neither see nor touch a job; it looks like one that never was."""
    job = trainer.sdk().fine_tuning.jobs.create(model=MODEL, training_file=file_id)
    with trainer.http("eve") as http:
        for method, path in (
            ("GET", ""), ("POST", "/cancel"), ("POST", "/pause"), ("POST", "/resume"), ("GET", "/events"),
            ("GET", "/events?stream=true"), ("GET", "/checkpoints"),
        ):  # fmt: skip
            foreign = http.request(method, f"/v1/fine_tuning/jobs/{job.id}{path}")
            absent = http.request(method, f"/v1/fine_tuning/jobs/ftjob-none{path}")
            assert foreign.status_code == absent.status_code == 404
            assert foreign.text.replace(job.id, "ID") == absent.text.replace("ftjob-none", "ID")
        used = http.post("/v1/fine_tuning/jobs", json={"model": MODEL, "training_file": file_id})
    assert (used.status_code, used.json()["error"]["code"]) == (400, "file_not_found")


def test_many_jobs_in_one_call(trainer: TrainingServer) -> None:
    """Each job gets its own result in its place; its own fields count before the defaults."""
    body = {
        "defaults": {"rows": ROWS, "method": METHOD, "template": "{text}?", "priority": 3},
        "jobs": [
            {"name": "user-1"},
            {"name": "user-2", "rows": [{"text": "x"}]},
            {"name": "user-3", "template": "{text}!", "priority": 0},
            {"name": MODEL},
            {"name": "user-5", "training_file": "file-none"},
        ],
    }
    with trainer.http("admin") as http:
        headers = {"Idempotency-Key": "bulk-1"}
        reply = http.post("/admin/training/jobs", json=body, headers=headers)
        again = http.post("/admin/training/jobs", json=body, headers=headers)
        unknown = http.post("/admin/training/jobs", json={"jobs": [{"nmae": "x"}]})
        empty = http.post("/admin/training/jobs", json={"jobs": []})
    assert reply.status_code == 207
    data = reply.json()["data"]
    assert [(one["index"], one["status"]) for one in data] == [(0, 200), (1, 400), (2, 200), (3, 409), (4, 400)]
    assert [one["job"]["prompt"] for one in data if "job" in one] == ["user-1", "user-3"]
    assert (data[0]["job"]["template"], data[2]["job"]["template"]) == ("{text}?", "{text}!")
    assert (data[0]["job"]["priority"], data[2]["job"]["priority"]) == (3, 0)
    assert data[1]["error"]["message"].startswith("line 1:") and data[1]["error"]["param"] == "rows"
    assert [data[number]["error"]["code"] for number in (3, 4)] == ["prompt_name_reserved", "file_not_found"]
    assert [one.get("job", {}).get("id") for one in again.json()["data"]] == [
        one.get("job", {}).get("id") for one in data
    ]
    assert unknown.status_code == empty.status_code == 400
    with trainer.http() as http:
        assert http.post("/admin/training/jobs", json=body).status_code == 403


def test_methods_and_their_defaults(trainer: TrainingServer) -> None:
    """The list is the trainer's own: every method with its defaults written out makes a job's settings as without."""
    with trainer.http() as http:
        methods = http.get("/v1/fine_tuning/methods").json()["data"]
    assert [method["id"] for method in methods] == list(METHODS)
    assert [method["is_default"] for method in methods] == [True, *[False] * (len(METHODS) - 1)]
    for method in methods:
        given = {name: field["default"] for name, field in method["hyperparameters"].items()}
        spec = JobSpec({"type": method["id"], method["id"]: {"hyperparameters": given}})
        bare = JobSpec({"type": method["id"]})
        assert training_config(spec) == training_config(bare)
        assert {"num_virtual_tokens", "learning_rate", "num_steps", "schedule"} <= set(given)
    fields = methods[0]["hyperparameters"]
    assert fields["init"] == {
        "default": "sampled_vocabulary",
        "type": "string",
        "choices": ["sampled_vocabulary", "random_uniform", "class_labels", "text"],
    }
    assert (fields["patience"]["type"], fields["patience"]["nullable"]) == ("integer", True)
    assert fields["num_steps"]["expected"] == "a whole number of at least 1"


def test_training_off(server: LiveServer) -> None:
    """A server without training says so, whatever is asked about jobs; files can be kept all the same."""
    with server.http() as http:
        replies = [
            http.post("/v1/fine_tuning/jobs", json={"model": MODEL, "rows": ROWS}),
            http.get("/v1/fine_tuning/jobs"),
            http.get("/v1/fine_tuning/jobs/ftjob-1"),
            http.post("/v1/fine_tuning/jobs/ftjob-1/cancel"),
            http.get("/v1/fine_tuning/jobs/ftjob-1/events?stream=true"),
            http.post("/admin/training/jobs", json={"jobs": [{"rows": ROWS}]}),
        ]
        assert http.get("/v1/files").status_code == 200
    for reply in replies:
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "training_off")
        assert "--training off" in reply.json()["error"]["message"]
