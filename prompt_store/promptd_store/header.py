"""A strict reader of safetensors headers: everything is checked before anything is allocated."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from promptd_store.artifact import PREFIX_TENSOR, SOFT_TENSOR, TARGET_TENSOR
from promptd_store.base import Content
from promptd_store.errors import ArtifactError
from promptd_store.head import is_head, name_from_peft
from promptd_store.strict_json import parse_object, shown

MAX_HEADER_BYTES = 64 << 10
MAX_TENSORS = 6
MAX_RANK = 5

_ITEM_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}
_ALLOWED_NAMES = frozenset({SOFT_TENSOR, TARGET_TENSOR, PREFIX_TENSOR})
_PREFIX_BYTES = 8
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive (torch.save writes these)"),
    (b"\x80", "a pickle"),
    (b"\x1f\x8b", "gzip"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"{", "bare JSON"),
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `[begin, end)` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header."""

    metadata: Mapping[str, str]
    tensors: tuple[TensorEntry, ...]


def read_header(content: Content, max_header_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Check a file but for its numbers: names, dtypes, shapes, and that every byte belongs to a tensor."""
    plain = parse_object(_header_bytes(content, max_header_bytes), "header")
    metadata = _metadata(plain.pop("__metadata__", {}))
    if len(plain) > MAX_TENSORS:
        raise ArtifactError(
            "too_many_tensors", f"file has {len(plain)} tensors, at most {MAX_TENSORS} are allowed", None
        )
    start = _PREFIX_BYTES + struct.unpack_from("<Q", content)[0]
    tensors = tuple(sorted((_entry(name, plain[name], start) for name in plain), key=lambda entry: entry.begin))
    expected = start
    for entry in tensors:
        if entry.begin != expected:
            raise ArtifactError(
                "offsets_invalid",
                f"tensor {entry.name} begins at byte {entry.begin - start} of the data, expected {expected - start}: "
                "tensors must follow each other without holes or overlaps",
                entry.name,
            )
        expected = entry.end
    if expected < len(content):
        raise ArtifactError(
            "trailing_bytes", f"{len(content) - expected} bytes follow the last tensor; every byte must belong to one"
        )
    if expected > len(content):
        raise ArtifactError(
            "truncated", f"file has {len(content)} bytes, its header describes {expected}", tensors[-1].name
        )
    return Header(metadata, tensors)


def _header_bytes(content: Content, max_header_bytes: int) -> bytes:
    if len(content) < _PREFIX_BYTES:
        raise ArtifactError("truncated", f"file has {len(content)} bytes, a safetensors file has at least 8")
    (size,) = struct.unpack_from("<Q", content)
    if size > max_header_bytes:
        for magic, what in _MAGIC:
            if bytes(content[: len(magic)]) == magic:
                raise ArtifactError("unsupported_format", f"file looks like {what}; only safetensors is accepted")
        raise ArtifactError(
            "header_too_large", f"header has {size} bytes, at most {max_header_bytes} are allowed", "header"
        )
    if size > len(content) - _PREFIX_BYTES:
        raise ArtifactError(
            "truncated", f"header has {size} bytes, the file ends after {len(content) - _PREFIX_BYTES}", "header"
        )
    header = bytes(content[_PREFIX_BYTES : _PREFIX_BYTES + size])
    if not header.startswith(b"{"):
        raise ArtifactError("header_invalid_json", f"header must start with '{{', got {shown(header[:8])}", "header")
    return header


def _metadata(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ArtifactError(
            "metadata_invalid", f"__metadata__ must be an object of strings, got {shown(value)}", "__metadata__"
        )
    return value


def _entry(name: str, value: Any, start: int) -> TensorEntry:
    if name not in _ALLOWED_NAMES and not is_head(name) and name_from_peft(name) is None:
        raise ArtifactError(
            "tensor_name_not_allowed",
            f"tensor name {shown(name)} is not one of {sorted(_ALLOWED_NAMES)}{_hint(name)}",
            name[:80],
        )
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(
            "header_invalid_entry",
            f"tensor {name} must have exactly dtype, shape and data_offsets, got {shown(value)}",
            name,
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ArtifactError(
            "dtype_not_allowed", f"tensor {name} has dtype {shown(dtype)}, allowed: {sorted(_ITEM_BYTES)}", name
        )
    if not isinstance(shape, list) or not 1 <= len(shape) <= MAX_RANK or not all(_is_size(n, 1) for n in shape):
        raise ArtifactError("shape_invalid", f"tensor {name} has shape {shown(shape)}", name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n, 0) for n in offsets):
        raise ArtifactError("offsets_invalid", f"tensor {name} has data_offsets {shown(offsets)}", name)
    num_bytes = _ITEM_BYTES[dtype]
    for size in shape:
        num_bytes *= size
    if offsets[1] - offsets[0] != num_bytes:
        raise ArtifactError(
            "offsets_invalid",
            f"tensor {name} of shape {shape} and dtype {dtype} has {num_bytes} bytes, "
            f"its data_offsets {offsets} span {offsets[1] - offsets[0]}",
            name,
        )
    return TensorEntry(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _is_size(value: Any, low: int) -> bool:
    return type(value) is int and low <= value < 1 << 48


def _hint(name: str) -> str:
    if name.startswith("prefix_task_"):
        return "; multitask prompt tuning is not supported: fold one task into prompt_embeddings first"
    if "lora_" in name:
        return "; this looks like LoRA, which is not a prompt"
    if name.startswith("base_model."):
        return "; of modules_to_save only a classification head is taken: a prompt never changes the base model"
    return ""
