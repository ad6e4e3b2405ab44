"""Many jobs in one pass: each computes what it computes alone, and a broken one breaks nothing but itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from promptd.errors import NumericalError
from promptd.modeling import FrozenModel
from promptd.training import (
    Example,
    PromptTuningConfig,
    PTuningV2Config,
    ResidualConfig,
    TaskFormat,
    Trainer,
    TrainingConfig,
    TrainingJob,
    Watcher,
    passes,
)
from promptd.training.passes import Share, run_shares
from tests.tiny_models import FAMILIES

METHODS = {
    "residual": ResidualConfig(4, bottleneck_size=8, dropout=0.1),
    "prompt_tuning": PromptTuningConfig(9),
    "prefix": PTuningV2Config(3),
    "longer": ResidualConfig(13, bottleneck_size=8, separate_networks=True),
}


def jobs_of(
    model: FrozenModel, label_task: TaskFormat, label_rows: list[Example], text_rows: list[Example]
) -> dict[str, TrainingJob]:
    """Four jobs of different methods, lengths, rates, schedules, tasks and seeds."""
    jobs = {}
    for seed, (name, method) in enumerate(METHODS.items()):
        config = TrainingConfig(method, num_steps=6 + seed, batch_size=2 + seed, num_evaluations=3, seed=seed)
        task, rows = (label_task, label_rows) if seed % 2 else (TaskFormat(), text_rows)
        jobs[name] = TrainingJob(model, config, task, rows, rows)
    return jobs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_pass_gives_every_job_its_own_gradient(
    frozen_models: dict[str, FrozenModel],
    label_task: TaskFormat,
    label_rows: list[Example],
    text_rows: list[Example],
    family: str,
) -> None:
    """At each of twenty steps, a job's gradient in a mixed pass is the one it gets alone at the same parameters."""
    model = frozen_models[family]
    jobs = jobs_of(model, label_task, label_rows, text_rows)
    for job in jobs.values():
        job.config = dataclasses.replace(job.config, num_steps=20)
    running = {name: job.shares() for name, job in jobs.items()}
    waiting = {name: next(shares) for name, shares in running.items()}
    worst, num_learning = 0.0, 0
    for _ in range(20):
        alone = {}
        for name, share in waiting.items():
            copy = dataclasses.replace(share, prompt=_fresh(share.prompt))
            run_shares(model, [copy])
            alone[name] = None if copy.prompt is None else copy.prompt.grad
        known = {name: _kept(share.prompt) for name, share in waiting.items()}
        run_shares(model, list(waiting.values()))
        for name, share in waiting.items():
            expected = alone[name]
            if share.learns and share.prompt is not None and share.prompt.grad is not None and expected is not None:
                gradient = share.prompt.grad - known[name]
                worst = max(worst, ((gradient - expected).norm() / expected.norm()).item())
                num_learning += 1
        waiting = {name: next(shares) for name, shares in running.items()}
    assert worst < 1e-5
    assert num_learning > 40


def _fresh(prompt: torch.Tensor | None) -> torch.Tensor | None:
    return None if prompt is None else prompt.detach().clone().requires_grad_(prompt.requires_grad)


def _kept(prompt: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros(()) if prompt is None or prompt.grad is None else prompt.grad.clone()


def test_jobs_end_beside_others_as_they_end_alone(
    llama: FrozenModel, label_task: TaskFormat, label_rows: list[Example], text_rows: list[Example]
) -> None:
    """Losses within 1 %; the same number of steps; and the jobs really shared passes."""
    alone, num_alone = _run(llama, jobs_of(llama, label_task, label_rows, text_rows), one_at_a_time=True)
    mixed, num_mixed = _run(llama, jobs_of(llama, label_task, label_rows, text_rows))
    assert num_mixed < num_alone / 2
    for name, losses in alone.items():
        assert mixed[name] == pytest.approx(losses, rel=0.01)


def _run(
    model: FrozenModel, jobs: dict[str, TrainingJob], *, one_at_a_time: bool = False
) -> tuple[dict[str, list[float]], int]:
    """Return each job's losses by step, and how many passes it took."""
    losses: dict[str, list[float]] = {name: [] for name in jobs}
    watchers = {name: Watcher(lambda progress, name=name: losses[name].append(progress.loss)) for name in jobs}
    groups: Sequence[Sequence[str]] = [[name] for name in jobs] if one_at_a_time else [list(jobs)]
    num_passes = 0
    for names in groups:
        trainer = Trainer(model)
        for name in names:
            trainer.add(name, jobs[name], watchers[name])
        while trainer.has_work:
            assert not any(isinstance(outcome, Exception) for outcome in trainer.run_pass().values())
            num_passes += 1
    return losses, num_passes


def test_a_job_that_diverges_leaves_the_others_untouched(
    llama: FrozenModel, label_task: TaskFormat, label_rows: list[Example], text_rows: list[Example]
) -> None:
    """It ends with a typed error that names the step; the others' losses are those of a run without it."""
    expected, _ = _run(llama, jobs_of(llama, label_task, label_rows, text_rows))
    jobs = jobs_of(llama, label_task, label_rows, text_rows)
    wild = TrainingConfig(PromptTuningConfig(4, learning_rate=1e38), num_steps=20, warmup_ratio=0.0)
    trainer = Trainer(llama)
    losses: dict[str, list[float]] = {name: [] for name in jobs}
    trainer.add("wild", TrainingJob(llama, wild, TaskFormat(), text_rows, text_rows))
    for name, job in jobs.items():
        trainer.add(name, job, Watcher(lambda progress, name=name: losses[name].append(progress.loss)))
    outcomes = {}
    while trainer.has_work:
        outcomes |= trainer.run_pass()
    assert isinstance(outcomes.pop("wild"), NumericalError)
    assert not any(isinstance(outcome, Exception) for outcome in outcomes.values())
    for name, own in losses.items():
        assert own == pytest.approx(expected[name], rel=1e-3)


def test_a_removed_job_is_not_run_again(
    llama: FrozenModel, label_task: TaskFormat, label_rows: list[Example], text_rows: list[Example]
) -> None:
    """Cancelling takes effect before the next pass; the others end."""
    trainer, seen = Trainer(llama), []
    for name, job in jobs_of(llama, label_task, label_rows, text_rows).items():
        trainer.add(name, job, Watcher(lambda progress, name=name: seen.append(name)))
    trainer.run_pass()
    trainer.remove("residual")
    num_steps, outcomes = seen.count("residual"), {}
    while trainer.has_work:
        outcomes |= trainer.run_pass()
    assert seen.count("residual") == num_steps
    assert set(outcomes) == set(METHODS) - {"residual"}


def test_a_pass_that_does_not_fit_is_cut(
    llama: FrozenModel,
    label_task: TaskFormat,
    label_rows: list[Example],
    text_rows: list[Example],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With memory for only two rows at once every job still ends, with the same losses; with none, it says so."""
    expected, _ = _run(llama, jobs_of(llama, label_task, label_rows, text_rows))

    def with_room_for(num_rows: int) -> None:
        def cramped(model: FrozenModel, shares: Sequence[Share], between_layers: object = None) -> None:
            if sum(len(share.rows) for share in shares) > num_rows:
                raise torch.OutOfMemoryError("out of memory")
            run_shares(model, shares)

        monkeypatch.setattr(passes, "run_shares", cramped)

    with_room_for(2)
    losses, _ = _run(llama, jobs_of(llama, label_task, label_rows, text_rows))
    for name, own in losses.items():
        assert own == pytest.approx(expected[name], rel=1e-3)
    with_room_for(0)
    trainer = Trainer(llama)
    trainer.add("job", jobs_of(llama, label_task, label_rows, text_rows)["residual"])
    outcome = trainer.run_pass()["job"]
    assert isinstance(outcome, torch.OutOfMemoryError) and not trainer.has_work


def test_layers_can_be_waited_between(llama: FrozenModel, text_rows: list[Example]) -> None:
    """The callback comes at every layer, both ways, and at the loss; it may run the model itself unnoticed."""
    job = TrainingJob(llama, TrainingConfig(METHODS["prompt_tuning"]), TaskFormat(), text_rows, text_rows)
    share = next(job.shares())
    plain = dataclasses.replace(share, prompt=_fresh(share.prompt))
    run_shares(llama, [plain])
    calls: list[int] = []

    def serve() -> None:
        calls.append(1)
        with torch.no_grad():
            run_shares(llama, [dataclasses.replace(share, prompt=None)])

    run_shares(llama, [share], serve)
    assert len(calls) == 2 * llama.spec.num_layers + 1
    assert share.prompt is not None and plain.prompt is not None
    assert torch.equal(share.prompt.grad, plain.prompt.grad)  # type: ignore[arg-type]
