"""Training into a folder, without a server: it is the server's training, and it goes on after any interruption."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from promptd_store import read_prompt

from promptd.errors import ConflictError
from promptd.jobs import JobData, JobProgress
from promptd.modeling import FrozenModel
from promptd.training import Progress
from promptd.training.folder import PromptFolder
from promptd.training.local import LocalEnd, LocalJob, LocalTraining
from tests.training.process import process
from tests.training.site import CONTENT, quiet_version, spec_of


def local_job(name: str, seed: int = 0, content: bytes = CONTENT, **hyperparameters: Any) -> LocalJob:
    """A job on the rows that the tests of survival train on, too."""
    return LocalJob(name, spec_of(name, seed, **hyperparameters), JobData(content, None))


def trained(
    model: FrozenModel, folder: Path, *jobs: LocalJob, stop_at: int | None = None, **options: Any
) -> tuple[list[LocalEnd], dict[str, int]]:
    """Run jobs, stopping all of them at some step of any; return how they ended and after which steps they began."""
    ends: list[LocalEnd] = []
    begins: dict[str, int] = {}

    def progressed(name: str, told: JobProgress, progress: Progress) -> None:
        if progress.step == stop_at:
            training.stop()

    training = LocalTraining(
        model, PromptFolder(folder), on_start=begins.__setitem__, on_progress=progressed, on_end=ends.append, **options
    )
    training.run(jobs)
    return sorted(ends, key=lambda end: end.name), begins


def test_prompts_are_those_of_the_server(llama: FrozenModel, tmp_path: Path) -> None:
    """Three jobs at once, strictly: each prompt is the one of a job alone, whole, with its card; a second run is over
    at once."""
    jobs = [local_job(f"p{seed}", seed) for seed in range(3)]
    ends, _ = trained(llama, tmp_path, *jobs, strict=True)
    assert [(end.name, end.state) for end in ends] == [(f"p{seed}", "trained") for seed in range(3)]
    for seed, end in enumerate(ends):
        assert end.card == json.loads((tmp_path / f"p{seed}.json").read_bytes())
        artifact = read_prompt(tmp_path / f"p{seed}.safetensors", llama.spec)
        assert artifact.version == end.card["version"] == quiet_version(llama, seed)
        scores = end.card["provenance"]["scores"]
        assert scores["after"]["num_rows"] == scores["before"]["num_rows"] and scores["after"] != scores["before"]
    assert not list(tmp_path.glob("*.checkpoint"))
    again, begins = trained(llama, tmp_path, *jobs)
    assert [end.state for end in again] == ["unchanged"] * 3 and not begins
    assert [end.card for end in again] == [end.card for end in ends]


def test_stopped_jobs_go_on(llama: FrozenModel, tmp_path: Path) -> None:
    """A stop saves all jobs where they are, those not begun too; the next run comes to the prompts of a quiet one."""
    jobs = [local_job(f"p{seed}", seed) for seed in range(2)]
    ends, _ = trained(llama, tmp_path, *jobs, stop_at=5, strict=True)
    assert [end.state for end in ends] == ["stopped"] * 2
    assert not list(tmp_path.glob("*.safetensors"))
    ends, begins = trained(llama, tmp_path, *jobs, strict=True)
    assert begins == {"p0": 6, "p1": 5}  # the pass of one goes before the other's
    versions = [(end.card or {})["version"] for end in ends]
    assert versions == [quiet_version(llama, seed) for seed in range(2)] and versions[0] != versions[1]


def test_kill_9(llama: FrozenModel, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """`promptd train` is killed; the same command goes on from its last checkpoint."""
    rows = tmp_path / "prompt.jsonl"
    rows.write_bytes(CONTENT)
    hyperparameters = {"num_steps": 60, "batch_size": 4, "num_evaluations": 3}
    settings = [f"{name}={value}" for name, value in hyperparameters.items()]
    options = {"files": [rows], "output": tmp_path / "out", "model": str(tiny_models["llama"]), "settings": settings}
    checkpoint = tmp_path / "out" / "prompt.checkpoint"
    with process("train", tmp_path / "log", **options, checkpoint_seconds=0.0) as child:
        until = time.monotonic() + 60
        while not checkpoint.exists():
            assert time.monotonic() < until and child.is_alive(), (tmp_path / "log").read_text()
            time.sleep(0.01)
        child.kill()
        child.join(60)
    assert checkpoint.exists() and not list(checkpoint.parent.glob("*.safetensors"))
    with process("train", tmp_path / "log", **options) as child:
        child.join(60)
        assert child.exitcode == 0, (tmp_path / "log").read_text()
    assert "prompt: goes on after step " in (tmp_path / "log").read_text()
    version = read_prompt(tmp_path / "out" / "prompt.safetensors", llama.spec).version
    assert version == quiet_version(llama, **hyperparameters)


def test_a_prompt_of_other_rows_is_not_replaced(llama: FrozenModel, tmp_path: Path) -> None:
    """Other settings or rows under the same name fail before any training, unless told to overwrite."""
    trained(llama, tmp_path, local_job("p", num_steps=2))
    before = (tmp_path / "p.safetensors").read_bytes()
    for other in (local_job("p", num_steps=3), local_job("p", num_steps=2, content=CONTENT + b"\n" + CONTENT)):
        (end,), begins = trained(llama, tmp_path, other)
        assert end.error is not None and end.error.code == "prompt_exists" and "p.safetensors" in end.error.message
        assert not begins and (tmp_path / "p.safetensors").read_bytes() == before
    (end,), _ = trained(llama, tmp_path, local_job("p", num_steps=3), overwrite=True)
    assert end.state == "trained" and (tmp_path / "p.safetensors").read_bytes() != before


def test_a_checkpoint_of_other_rows_is_not_used(llama: FrozenModel, tmp_path: Path) -> None:
    """Settings that have changed in between begin anew; a file that is no checkpoint is named, and nothing is lost."""
    trained(llama, tmp_path, local_job("p"), stop_at=2)
    _, begins = trained(llama, tmp_path, local_job("p", num_steps=5))
    assert begins == {"p": 0}
    trained(llama, tmp_path, local_job("q"), stop_at=2)
    path = tmp_path / "q.checkpoint"
    path.write_bytes(path.read_bytes()[:500])
    (end,), _ = trained(llama, tmp_path, local_job("q"))
    assert end.error is not None and str(path) in end.error.message and path.exists()


def test_a_bad_file_fails_alone(llama: FrozenModel, tmp_path: Path) -> None:
    """The others are trained; the reason names the line."""
    bad = local_job("bad", content=CONTENT + b'\n{"text": "x", "label": 3}')
    ends, _ = trained(llama, tmp_path, bad, local_job("good", num_steps=2))
    assert [end.state for end in ends] == ["failed", "trained"]
    assert ends[0].error is not None and ends[0].error.message.startswith("line 25: 'label' must be")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """A second process that trains into the folder is told so; afterwards it may."""
    folder = tmp_path / "new"
    with (
        PromptFolder(folder).locked(),
        pytest.raises(ConflictError, match="another process trains"),
        PromptFolder(folder).locked(),
    ):
        pass
    with PromptFolder(folder).locked():
        pass
