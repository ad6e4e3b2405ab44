"""A running job as one safetensors file: plain tensors, and counters as JSON in its metadata. Nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from promptd.errors import InvalidRequestError
from promptd.training.scores import Scores

METADATA_KEY = "promptd_checkpoint"


@dataclass(frozen=True, slots=True)
class Best:
    """The best prompt so far."""

    step: int
    scores: Scores
    folded: torch.Tensor
    sidecar: bytes


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A job between two steps."""

    step: int
    num_evaluations: int
    num_stale: int
    """Evaluations since the best one."""
    seconds: float
    data_digest: str
    sidecar: bytes
    """The method's parameters and random state now."""
    optimizer: Mapping[int, Mapping[str, Any]]
    """Parameter's index -> the optimizer's tensors and numbers for it."""
    best: Best | None
    targets: Sequence[tuple[int, ...]] | None = None
    """Of all rows, where a teacher has written them: another worker's teacher might write others."""


def write_checkpoint(checkpoint: Checkpoint) -> bytes:
    """Return the file."""
    tensors = {"sidecar": _tensor(checkpoint.sidecar)}
    numbers: dict[str, float | None] = {}
    for index, state in checkpoint.optimizer.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                numbers[f"{index}.{name}"] = value
    facts: dict[str, Any] = {
        name: getattr(checkpoint, name) for name in ("step", "num_evaluations", "num_stale", "seconds", "data_digest")
    }
    facts["optimizer"] = numbers
    if checkpoint.best is not None:
        tensors["best.folded"] = checkpoint.best.folded.cpu().contiguous()
        tensors["best.sidecar"] = _tensor(checkpoint.best.sidecar)
        facts["best"] = {"step": checkpoint.best.step, "scores": asdict(checkpoint.best.scores)}
    if checkpoint.targets is not None:
        tensors["targets.ids"] = torch.tensor([token for row in checkpoint.targets for token in row])
        tensors["targets.lengths"] = torch.tensor([len(row) for row in checkpoint.targets])
    return save(tensors, {METADATA_KEY: json.dumps(facts)})


def read_checkpoint(content: bytes) -> Checkpoint:
    """Read the file. Raises `InvalidRequestError` where it is none."""
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        facts = json.loads(header["__metadata__"][METADATA_KEY])
        optimizer: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, part = name.split(".", 2)
                optimizer.setdefault(int(index), {})[part] = tensor
        for name, number in facts.pop("optimizer").items():
            index, part = name.split(".", 1)
            optimizer.setdefault(int(index), {})[part] = number
        best = facts.pop("best", None)
        if best is not None:
            folded, sidecar = tensors["best.folded"], _bytes(tensors["best.sidecar"])
            best = Best(best["step"], Scores(**best["scores"]), folded, sidecar)
        targets = None
        if "targets.ids" in tensors:
            rows = tensors["targets.ids"].split(tensors["targets.lengths"].tolist())
            targets = [tuple(row.tolist()) for row in rows]
        return Checkpoint(**facts, sidecar=_bytes(tensors["sidecar"]), optimizer=optimizer, best=best, targets=targets)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InvalidRequestError(f"not a checkpoint of a training job ({error})", param="checkpoint") from None


def _tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
