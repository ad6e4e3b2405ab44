"""The numbers of a prompt: finite, finite in the serving dtype, and of a size that the base model has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from promptd_store.artifact import BaseModelSpec
from promptd_store.errors import ArtifactError
from promptd_store.head import MAX_CLASSES
from promptd_store.header import MAX_HEADER_BYTES
from promptd_store.manifest import PromptKind


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of an upload. The factors multiply the base model's own largest magnitudes."""

    soft_factor: float = 100.0
    """Times the largest |embedding output|."""
    prefix_factor: float = 20.0
    """Times the layer's own largest |K| or |V|."""
    max_bytes: int = 512 << 20
    max_header_bytes: int = MAX_HEADER_BYTES
    allow_all_zero: bool = False


def largest_file(spec: BaseModelSpec, kind: PromptKind | None, max_virtual_tokens: int) -> int:
    """Return the most bytes that a file of a prompt of so many virtual tokens has for this base model: 4 a number.

    A text takes any; without a kind it is the larger of a soft prompt's and a prefix's.
    """
    stacks = 2 if spec.num_encoder_layers else 1  # PEFT keeps a soft prompt for each
    soft = stacks * spec.hidden_size
    prefix = max(spec.prefix_layers) * 2 * spec.num_kv_heads * spec.head_dim
    numbers = soft if kind is PromptKind.SOFT else prefix if kind is PromptKind.PREFIX else max(soft, prefix)
    head = (MAX_CLASSES + spec.hidden_size) * (spec.hidden_size + 1) if spec.takes_head else 0
    return 8 + MAX_HEADER_BYTES + 4 * (numbers * max_virtual_tokens + head)


def check_soft(name: str, tensor: torch.Tensor, spec: BaseModelSpec, bounds: Bounds) -> None:
    """Check embeddings `[n, hidden_size]`."""
    low, high = torch.aminmax(tensor)
    limit = bounds.soft_factor * spec.max_embedding_abs
    _check(name, tensor, [(name, max(-low.item(), high.item()), limit)], spec, bounds)


def check_prefix(name: str, tensor: torch.Tensor, spec: BaseModelSpec, bounds: Bounds) -> None:
    """Check a prefix `[num_layers, 2, num_kv_heads, n, head_dim]`, each layer's K and V against its own limit."""
    flat = tensor.flatten(2)
    largest = torch.maximum(flat.amax(2), -flat.amin(2)).tolist()
    rows = [
        (f"{name} layer {layer} {what}", largest[layer][kv], bounds.prefix_factor * limits[layer])
        for layer in range(len(largest))
        for kv, (what, limits) in enumerate((("keys", spec.max_key_abs), ("values", spec.max_value_abs)))
    ]
    _check(name, tensor, rows, spec, bounds)


def check_finite(name: str, tensor: torch.Tensor, spec: BaseModelSpec) -> None:
    """Check a tensor that may have any size: finite, here and in the serving dtype."""
    low, high = torch.aminmax(tensor)
    largest = max(-low.item(), high.item())
    _check(name, tensor, [(name, largest, float("inf"))], spec, Bounds(allow_all_zero=True))


def _check(
    name: str, tensor: torch.Tensor, rows: Sequence[tuple[str, float, float]], spec: BaseModelSpec, bounds: Bounds
) -> None:
    serving = getattr(torch, spec.serving_dtype)
    if not all(largest < float("inf") for _, largest, _ in rows):
        flat = tensor.flatten()
        at = int((~torch.isfinite(flat)).nonzero()[0, 0])
        raise ArtifactError("non_finite", f"{name} is {flat[at].item()} at element {at} of {flat.numel()}", name)
    for where, largest, limit in rows:
        # Rounding is monotone: where the largest stays finite after the cast, every element does.
        if not torch.tensor(largest, dtype=torch.float64).to(tensor.dtype).to(serving).isfinite():
            raise ArtifactError(
                "overflow_in_serving_dtype",
                f"{where} reaches {largest:g}, which {spec.serving_dtype} cannot hold",
                name,
            )
        if largest > limit:
            raise ArtifactError(
                "magnitude_exceeded", f"{where} reaches {largest:g}, this base model allows {limit:g}", name
            )
    if not bounds.allow_all_zero and not any(largest for _, largest, _ in rows):
        raise ArtifactError("all_zero", f"{name} is zero everywhere", name)
