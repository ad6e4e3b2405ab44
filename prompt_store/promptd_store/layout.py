"""Which tensors a kind has, their shapes on a base model, and how one is read from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from promptd_store.artifact import DTYPES, PREFIX_TENSOR, SOFT_TENSOR, TARGET_TENSOR, BaseModelSpec
from promptd_store.base import Content
from promptd_store.errors import ArtifactError
from promptd_store.head import is_head
from promptd_store.header import TensorEntry
from promptd_store.manifest import Manifest, PromptKind
from promptd_store.strict_json import shown

TENSOR_NAMES: Mapping[PromptKind, tuple[str, ...]] = {
    PromptKind.SOFT: (SOFT_TENSOR,),
    PromptKind.PREFIX: (PREFIX_TENSOR,),
    PromptKind.TEXT: (),
}


def check_names(names: Sequence[str], kind: PromptKind) -> None:
    """Refuse any tensors but the kind's own, and those that may stand beside them."""
    beside = {TARGET_TENSOR} if kind is PromptKind.SOFT else set()
    own = tuple(name for name in names if name not in beside and not is_head(name))
    if own != TENSOR_NAMES[kind]:
        raise ArtifactError(
            "tensor_name_not_allowed",
            f"kind {kind} has the tensors {list(TENSOR_NAMES[kind])}, got {list(names)}",
            own[0] if own else "tensors",
        )


def parse_kind(kind: PromptKind | str | None) -> PromptKind | None:
    """Read a kind that a caller asked for."""
    try:
        return None if kind is None else PromptKind(kind)
    except ValueError:
        raise ArtifactError("kind_invalid", f"kind must be soft, prefix or text, got {shown(kind)}", "kind") from None


def expected_shape(kind: PromptKind, count: int, spec: BaseModelSpec) -> tuple[int, ...]:
    """Return the canonical shape of `count` virtual tokens."""
    if kind is PromptKind.SOFT:
        return (count, spec.hidden_size)
    return (spec.num_layers, 2, spec.num_kv_heads, count, spec.head_dim)


def check_target_shape(entry: TensorEntry, spec: BaseModelSpec) -> None:
    """Refuse a target's embeddings where the model has no targets, or of another width, or none at all."""
    if not spec.num_encoder_layers:
        raise ArtifactError(
            "tensor_name_not_allowed",
            f"{spec.architecture} has no target apart from its text, the file has {entry.name}",
            entry.name,
        )
    count = entry.shape[0] if entry.shape else 0
    check_shape(entry, (max(count, 1), spec.hidden_size))
    if count >= spec.max_model_len:
        raise ArtifactError(
            "num_virtual_tokens_out_of_range",
            f"{entry.name} has {count} rows, this base model allows 1 to {spec.max_model_len - 1}",
            entry.name,
        )


def check_prefix_shape(entry: TensorEntry, count: int, spec: BaseModelSpec) -> None:
    """Refuse a prefix that has neither the answering stack's layers nor those of all its banks."""
    whole = expected_shape(PromptKind.PREFIX, count, spec)
    layers = next((one for one in spec.prefix_layers if entry.shape[:1] == (one,)), whole[0])
    check_shape(entry, (layers, *whole[1:]))


def check_shape(entry: TensorEntry, expected: tuple[int, ...]) -> None:
    """Refuse a tensor whose shape is not exactly this."""
    if entry.shape != expected:
        raise ArtifactError(
            "shape_mismatch",
            f"tensor {entry.name} has shape {list(entry.shape)}, this base model needs {list(expected)}",
            entry.name,
        )


def check_length(manifest: Manifest, spec: BaseModelSpec, asked: int | None) -> None:
    """Refuse more virtual tokens than leave room for one token of text, or another number than asked for."""
    count = manifest.num_virtual_tokens
    if asked not in (None, count):
        raise ArtifactError(
            "num_virtual_tokens_mismatch",
            f"num_virtual_tokens {asked} was asked for, the file has {count}",
            "num_virtual_tokens",
        )
    if count >= spec.max_model_len:
        raise ArtifactError(
            "num_virtual_tokens_out_of_range",
            f"num_virtual_tokens is {count}, this base model allows 1 to {spec.max_model_len - 1}",
            "num_virtual_tokens",
        )


def load_tensor(content: Content, entry: TensorEntry) -> torch.Tensor:
    """Return one tensor of the file: a copy, or where the file is mapped what lies there."""
    dtype, data = DTYPES[entry.dtype], memoryview(content)[entry.begin : entry.end]
    is_usable = not data.readonly and entry.begin % dtype.itemsize == 0  # a map begins with a page
    return torch.frombuffer(data if is_usable else bytearray(data), dtype=dtype).view(entry.shape)
