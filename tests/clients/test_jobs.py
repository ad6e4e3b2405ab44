"""Training files and jobs: both clients and the command line, against a real server with a pretended worker."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from promptd_client import AsyncClient, Client, InvalidRequestError, Job, JobEvent, NotFoundError, _async_jobs, _jobs
from promptd_client.errors import APIError
from typer.testing import CliRunner, Result

from promptd.cli import app
from promptd.commands import console
from promptd.jobs import JobClaims, JobError, JobProgress
from tests.api.training_server import KEYS, TrainingServer, result, serve_training
from tests.clients.wire import Script, cut_events, events, reply

ROWS = [{"text": f"row {number}", "label": ("no", "yes")[number % 2]} for number in range(8)]
JOB = {"id": "ftjob-1", "status": "running", "prompt": "tone", "model": "tiny", "created_at": 1}
EVENTS = [
    {"id": f"ftevent-{number}", "created_at": 1, "level": "info", "type": "message", "message": f"{number}"}
    for number in range(4)
]


@pytest.fixture(scope="module")
def trainer(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingServer]:
    """A server that takes training jobs."""
    yield from serve_training(tiny_models["llama"], tmp_path_factory.mktemp("training"))


@pytest.fixture
def client(trainer: TrainingServer) -> Iterator[Client]:
    """A client of acme; no job stays open."""
    with Client(trainer.live.url, api_key=KEYS["acme"], max_retries=0) as client:
        yield client
        for job in client.jobs.list():
            if not job.has_ended:
                client.jobs.cancel(job.id)


def run(trainer: TrainingServer, *arguments: str) -> Result:
    """Run `promptd jobs …` in this process."""
    options = ["--url", trainer.live.url, "--api-key", KEYS["acme"]]
    return CliRunner().invoke(app, ["jobs", *arguments, *options])


@contextmanager
def training(trainer: TrainingServer, *, fails: bool = False) -> Iterator[None]:
    """Have the next job trained beside what the test does."""

    async def work(worker: JobClaims) -> None:
        with anyio.fail_after(60):
            while not (claimed := await worker.claim(1)):  # noqa: ASYNC110 - workers poll
                await anyio.sleep(0.02)
        (claim,) = claimed
        for step in range(1, 4):
            measured = 0.5 if step == 3 else None
            progress = JobProgress(
                step, 3, loss=1 / step, validation_loss=measured, tokens_per_second=100, eta_seconds=9
            )
            await worker.report(claim, progress)
        if fails:
            await worker.fail(claim, JobError("numerical_error", "the loss is not finite"))
        else:
            await worker.finish(claim, result(claim.job.prompt_name))

    thread = threading.Thread(target=trainer.work, args=(work,))
    thread.start()
    try:
        yield
    finally:
        thread.join(timeout=60)
    assert not thread.is_alive()


def test_files(client: Client, tmp_path: Path) -> None:
    """Files go up from bytes and from paths, are listed newest first, come back whole, and go."""
    content = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    (tmp_path / "train.jsonl").write_bytes(content)
    one, two = client.files.create(content), client.files.create(tmp_path / "train.jsonl")
    assert (one.filename, two.filename, two.bytes) == ("rows.jsonl", "train.jsonl", len(content))
    assert [file.id for file in client.files.list()][:2] == [two.id, one.id]
    assert client.files.content(two.id) == content and client.files.get(one.id) == one
    for file in (one, two):
        client.files.delete(file.id)
    with pytest.raises(NotFoundError):
        client.files.get(one.id)
    with pytest.raises(InvalidRequestError, match="no rows at all"):
        client.files.create(b"\n")


def test_a_job_from_creation_to_its_end(trainer: TrainingServer, client: Client) -> None:
    """Create, pause, resume, wait: every event comes once, and the prompt's scores are there."""
    job = client.jobs.create(rows=ROWS, suffix="tone", seed=3, method={"type": "prompt_tuning"})
    assert (job.status, job.prompt, job.fine_tuned_model, job.has_ended) == ("queued", "tone", None, False)
    assert job.label_words == {"no": " no", "yes": " yes"}
    assert client.jobs.pause(job.id).status == "paused"
    assert client.jobs.resume(job.id).status == "queued"
    seen: list[JobEvent] = []
    with training(trainer):
        done = client.jobs.wait(job.id, on_event=seen.append)
    assert (done.status, done.fine_tuned_model) == ("succeeded", "tone")
    assert done.result is not None and done.result.scores_after == {"accuracy": 0.9}
    assert seen == list(client.jobs.events(job.id))[::-1]
    assert [event.progress.step for event in seen if event.progress is not None] == [1, 2, 3]
    assert client.jobs.list()[0].id == job.id
    assert client.jobs.wait(job.id) == done


def test_async_is_the_same(trainer: TrainingServer) -> None:
    """The asynchronous client does all of it too."""

    async def go() -> tuple[Job, Job]:
        async with AsyncClient(trainer.live.url, api_key=KEYS["acme"], max_retries=0) as client:
            file = await client.files.create(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS))
            assert await client.files.get(file.id) in await client.files.list()
            assert (await client.files.content(file.id)).count(b"\n") == len(ROWS)
            job = await client.jobs.create(training_file=file.id)
            await client.jobs.pause(job.id)
            await client.jobs.resume(job.id)
            seen: list[JobEvent] = []
            with training(trainer):
                done = await client.jobs.wait(job.id, on_event=seen.append)
            assert seen == list(await client.jobs.events(job.id))[::-1]
            assert await client.jobs.get(job.id) == (await client.jobs.list())[0] == done
            await client.files.delete(file.id)
            await client.jobs.delete((await client.jobs.cancel((await client.jobs.create(rows=ROWS)).id)).id)
            other = await client.jobs.cancel((await client.jobs.create(rows=ROWS)).id)
            return done, other

    done, cancelled = anyio.run(go)
    assert (done.status, cancelled.status) == ("succeeded", "cancelled")
    assert done.fine_tuned_model == f"ft-{done.id}"


def test_many_jobs(trainer: TrainingServer) -> None:
    """One call starts many; what failed is an error in its place."""
    with Client(trainer.live.url, api_key=KEYS["admin"], max_retries=0) as admin:
        good, bad = admin.jobs.create_many([{"name": "u1"}, {"name": "u2", "rows": [{}]}], rows=ROWS)
        assert isinstance(good, Job) and good.prompt == "u1"
        assert isinstance(bad, InvalidRequestError) and bad.code == "invalid_training_data" and bad.param == "rows"
        admin.jobs.cancel(good.id)


def _wait(script: Script, seen: list[JobEvent]) -> Job:
    with Client("http://server", transport=script, max_retries=0) as client:
        return client.jobs.wait("ftjob-1", on_event=seen.append)


def _wait_async(script: Script, seen: list[JobEvent]) -> Job:
    async def go() -> Job:
        async with AsyncClient("http://server", transport=script, max_retries=0) as client:
            return await client.jobs.wait("ftjob-1", on_event=seen.append)

    return anyio.run(go)


@pytest.mark.parametrize("wait", [_wait, _wait_async])
def test_broken_streams_are_taken_up(
    wait: Callable[[Script, list[JobEvent]], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a stream breaks, or ends before its job, waiting goes on behind the last event; none comes twice."""
    for module in (_jobs, _async_jobs):
        monkeypatch.setattr(module, "RECONNECT_SECONDS", 0.0)
    done: dict[str, Any] = {**JOB, "status": "succeeded"}
    script = Script(
        [cut_events(*EVENTS[:2]), reply(JOB), events(EVENTS[2]), reply(JOB), events(EVENTS[3]), reply(done)]
    )
    seen: list[JobEvent] = []
    assert wait(script, seen).status == "succeeded"
    assert [event.message for event in seen] == ["0", "1", "2", "3"]
    asked = [request.url.params.get("after") for request in script.requests if request.url.path.endswith("events")]
    assert asked == [None, "ftevent-1", "ftevent-2"]


def test_creation_is_sent_again_under_one_key() -> None:
    """A creation whose answer was lost is repeated with its key, so that there is one job; an upload is not."""
    script = Script([reply({}, 502), reply(JOB)])
    with Client("http://server", transport=script) as client:
        assert client.jobs.create(rows=ROWS).id == "ftjob-1"
        keys = [request.headers["idempotency-key"] for request in script.requests]
        assert len(keys) == 2 and keys[0] == keys[1]
        client.jobs.create(rows=ROWS)
        assert script.requests[-1].headers["idempotency-key"] != keys[0]
    script = Script([reply({}, 502)])
    with Client("http://server", transport=script) as client, pytest.raises(APIError):
        client.files.create(b"{}")
    assert len(script.requests) == 1


def test_cli_create_and_watch(trainer: TrainingServer, client: Client, tmp_path: Path) -> None:
    """Create uploads and starts; with --watch it shows every evaluation and ends with the scores."""
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = [
        "-n",
        "tone",
        "-s",
        "num_steps=7",
        "-s",
        "init=random_uniform",
        "--label",
        "no= nein",
        "--label",
        "yes= ja",
    ]
    with training(trainer):
        shown = run(trainer, "create", str(file), *options, "--seed", "5", "--watch")
    assert shown.exit_code == 0, shown.output
    for told in (
        "Step 3 of 3  loss 0.3333  validation 0.5000  100 tokens/s  9 s left",
        "accuracy 50.0% -> 90.0% on held-out rows",
        "tone is v1",
    ):
        assert told in shown.output
    assert "Step 2 of 3" not in shown.output  # nobody watches a pipe: not a line for every step
    job = client.jobs.list()[0]
    assert job.method["residual"]["hyperparameters"] == {"num_steps": 7, "init": "random_uniform"}
    assert job.label_words == {"no": " nein", "yes": " ja"} and job.model_extra is not None
    assert job.model_extra["seed"] == 5
    listed = run(trainer, "ls")
    assert f"{job.id}" in listed.output and "succeeded" in listed.output and "3/3" in listed.output
    assert json.loads(run(trainer, "ls", "--json").output.splitlines()[0])["id"] == job.id
    details = run(trainer, "show", job.id, "--events", "2").output
    for told in ("num_steps=7, init=random_uniform", "no=' nein', yes=' ja'", "Step 3 of 3", "accuracy 50.0% -> 90.0%"):
        assert told in details
    assert "Step 2 of 3" not in details
    assert len(json.loads(run(trainer, "show", job.id, "--json").stdout)["events"]) == 6


def test_cli_ids_are_whole_on_narrow_terminals(
    trainer: TrainingServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is cut from the list, it is not the ids, which the other commands take."""
    job = client.jobs.create(rows=ROWS, suffix="a-prompt-with-quite-a-long-name-" + "x" * 40)
    monkeypatch.setattr(console, "PIPED_WIDTH", 80)
    listed = run(trainer, "ls").output
    assert job.id in listed and "queued" in listed and "a-prom" in listed and "…" in listed
    assert max(map(len, listed.splitlines())) <= 80


def test_cli_changes_and_failures(trainer: TrainingServer, client: Client, tmp_path: Path) -> None:
    """Pause, resume and cancel say what became of the job; a failed one ends `watch` with its reason and status 1."""
    job = client.jobs.create(rows=ROWS)
    for command, status in (("pause", "paused"), ("resume", "queued")):
        done = run(trainer, command, job.id)
        assert done.exit_code == 0 and done.output.split()[:2] == [job.id, status]
    with training(trainer, fails=True):
        watched = run(trainer, "watch", job.id)
    assert watched.exit_code == 1 and "numerical_error: the loss is not finite" in watched.output
    assert "there is nothing to learn from" in run(trainer, "create").output
    (tmp_path / "manual.txt").write_text("Close the door, always.")
    made = run(trainer, "create", "--distill", str(tmp_path / "manual.txt"), "-n", "manual", "--json")
    job = client.jobs.get(json.loads(made.output)["id"])
    assert (job.prompt, job.distill, job.training_file) == ("manual", {"text": "Close the door, always."}, None)
    client.jobs.cancel(job.id)
    assert "cancel it first" in run(trainer, "rm", client.jobs.create(rows=ROWS).id).output
    forgotten = run(trainer, "rm", job.id)
    assert forgotten.exit_code == 0 and job.id not in [one.id for one in client.jobs.list()]
    other = client.jobs.create(rows=ROWS)
    assert json.loads(run(trainer, "cancel", other.id, "--json").output)["status"] == "cancelled"
    assert "job_not_found" in run(trainer, "watch", "ftjob-none").output
    (tmp_path / "empty.jsonl").write_text("")
    assert "no rows at all" in run(trainer, "create", str(tmp_path / "empty.jsonl")).output
    assert "--set takes NAME=VALUE, got 'x'" in run(trainer, "create", str(tmp_path / "empty.jsonl"), "-s", "x").output
