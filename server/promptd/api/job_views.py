"""Jobs, events and checkpoints as the API shows them: OpenAI's fields, and ours beside them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from promptd.jobs import JobEvent, JobRecord, JobState

EVENT_PREFIX = "ftevent-"
CHECKPOINT_PREFIX = "ftckpt-"
MAX_SHOWN_TEXT = 200


def job_view(job: JobRecord, model: str) -> dict[str, Any]:
    """A job; `fine_tuned_model` is there once it can be asked."""
    spec, progress = job.spec, job.progress
    has_succeeded = job.state is JobState.SUCCEEDED
    is_running = job.state is JobState.RUNNING and progress is not None and progress.eta_seconds is not None
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": _seconds(job.finished_at),
        "model": model,
        "fine_tuned_model": job.prompt_name if has_succeeded else None,
        "organization_id": job.tenant,
        # OpenAI knows no word for a job that is about to stop.
        "status": (JobState.RUNNING if job.state is JobState.CANCELLING else job.state).value,
        "training_file": spec.training_file,
        "validation_file": spec.validation_file,
        "result_files": [],
        "trained_tokens": progress.num_tokens if has_succeeded and progress is not None else None,
        "error": None if job.error is None else asdict(job.error),
        "method": dict(spec.method),
        "hyperparameters": _hyperparameters(job),
        "seed": spec.settings.get("seed", 0),
        "estimated_finish": int(time.time() + (progress.eta_seconds or 0)) if is_running and progress else None,
        "integrations": [],
        "metadata": spec.settings.get("metadata", {}),
        "prompt": job.prompt_name,
        "base_prompt": spec.base_prompt,
        "behind": list(spec.behind),
        "distill": None if spec.distill is None else _shortened(spec.distill),
        "template": spec.template,
        "label_words": None if spec.label_words is None else dict(spec.label_words),
        "priority": spec.priority,
        "started_at": _seconds(job.started_at),
        "attempts": job.attempts,
        "progress": None if progress is None else asdict(progress),
        "result": None if job.result is None else asdict(job.result),
    }


def _shortened(distill: Mapping[str, Any]) -> dict[str, Any]:
    """A document of a megabyte is not repeated in every answer."""
    text = distill.get("text")
    cut = {"text": text[:MAX_SHOWN_TEXT] + "…"} if isinstance(text, str) and len(text) > MAX_SHOWN_TEXT else {}
    return {**distill, **cut}


def event_view(event: JobEvent) -> dict[str, Any]:
    """An event; a change of state is a message with the state beside it."""
    return {
        "id": f"{EVENT_PREFIX}{event.seq}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": "metrics" if event.kind == "metrics" else "message",
        "data": dict(event.data),
    }


def checkpoint_views(job: JobRecord) -> list[dict[str, Any]]:
    """Where the job would continue, or what it has published; none before the first."""
    if job.result is not None:
        name, step, at = f"{job.result.prompt}@{job.result.number}", job.result.best_step, job.finished_at
    elif job.checkpoint is not None:
        name, step, at = None, job.checkpoint.step, job.checkpoint.saved_at
    else:
        return []
    metrics: dict[str, float] = {"step": step}
    if job.progress is not None:
        losses = {"train_loss": job.progress.loss, "full_valid_loss": job.progress.validation_loss}
        metrics |= {field: value for field, value in losses.items() if value is not None}
    return [
        {
            "id": f"{CHECKPOINT_PREFIX}{job.id.removeprefix('ftjob-')}-{step}",
            "object": "fine_tuning.job.checkpoint",
            "created_at": _seconds(at),
            "fine_tuning_job_id": job.id,
            "fine_tuned_model_checkpoint": name,
            "step_number": step,
            "metrics": metrics,
        }
    ]


def _hyperparameters(job: JobRecord) -> dict[str, Any]:
    method = job.spec.method
    own = method.get(str(method["type"])) or {}
    return dict(own.get("hyperparameters") or {})


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)
