"""From a finished training to what is stored: the artifact that is served and the provenance that is recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from promptd_store import PREFIX_TENSOR, SOFT_TENSOR, TARGET_TENSOR, PromptArtifact, PromptKind, encode

from promptd.modeling import FrozenModel
from promptd.training.encoding import TaskFormat, reads_words
from promptd.training.methods import METHODS
from promptd.training.methods.headed import split
from promptd.training.result import TrainingResult


def make_artifact(
    model: FrozenModel,
    task: TaskFormat,
    result: TrainingResult,
    *,
    default_sampling: Mapping[str, float | int] | None = None,
    stop: tuple[str, ...] = (),
) -> PromptArtifact:
    """Return the folded prompt as a native artifact, in float32, bound to this base model, with its head if any."""
    kind, learned = METHODS[result.config.method.name].kind, result.prompt.cpu()
    has_head = model.reads_whole and not reads_words(model, task)
    labels = tuple(task.label_words or ()) if has_head else None
    tensors: torch.Tensor | dict[str, torch.Tensor] = learned.contiguous()
    num_target = result.config.method.num_target_tokens
    if num_target:
        tensors = {SOFT_TENSOR: learned[:-num_target].contiguous(), TARGET_TENSOR: learned[-num_target:].contiguous()}
    if labels:
        prompt, head = split(learned, kind, len(labels), model.spec)
        name = SOFT_TENSOR if kind is PromptKind.SOFT else PREFIX_TENSOR
        tensors = {name: prompt, "head.weight": head[:, :-1], "head.bias": head[:, -1]}
    return encode(
        kind,
        tensors,
        base_fingerprint=model.spec.fingerprint,
        base_architecture=model.spec.architecture,
        template=task.template,
        add_special_tokens=task.add_special_tokens,
        default_sampling=default_sampling,
        stop=stop,
        prompt_after_bos=model.family.learns_behind_first and kind is PromptKind.SOFT,
        label_words=None if labels else task.label_words,
        labels=labels,
    )


def provenance(result: TrainingResult) -> dict[str, Any]:
    """Return where a prompt comes from as plain JSON values; it goes into the record, not into the identity."""
    config = asdict(result.config)
    method = config.pop("method")
    return {
        "method": result.config.method.name,
        "hyperparameters": {**method, **config},
        "seed": result.config.seed,
        "data_digest": result.data_digest,
        "best_step": result.best_step,
        "scores": {
            "before": result.bare.to_json(),
            "after": result.report.to_json(),
            "selection": result.selection.to_json(),
        },
        "majority": None if result.majority is None else {"label": result.majority[0], "share": result.majority[1]},
        "distilled": result.distilled,
        "trainable_params": result.trainable_params,
        "stored_params": result.stored_params,
        "seconds": round(result.seconds, 1),
    }
