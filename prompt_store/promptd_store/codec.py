"""Bytes to prompt and back. `decode` is the gate: whatever passes it can be served by this base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from safetensors.torch import save

from promptd_store.artifact import DTYPE_NAMES, TARGET_TENSOR, BaseModelSpec, PromptArtifact, tensor_info
from promptd_store.bare import decode_bare
from promptd_store.base import Content
from promptd_store.bounds import Bounds, check_finite, check_prefix, check_soft
from promptd_store.errors import ArtifactError
from promptd_store.head import check_head, check_labels, is_head
from promptd_store.header import MAX_HEADER_BYTES, Header, read_header
from promptd_store.layout import (
    TENSOR_NAMES,
    check_length,
    check_names,
    check_prefix_shape,
    check_shape,
    check_target_shape,
    expected_shape,
    load_tensor,
    parse_kind,
)
from promptd_store.manifest import Manifest, PromptKind
from promptd_store.strict_json import shown

METADATA_KEY = "promptd"

_DEFAULT_BOUNDS = Bounds()


def decode(
    content: Content,
    spec: BaseModelSpec,
    *,
    kind: PromptKind | str | None = None,
    num_virtual_tokens: int | None = None,
    adapter_config: Mapping[str, Any] | bytes | None = None,
    bounds: Bounds = _DEFAULT_BOUNDS,
) -> PromptArtifact:
    """Check uploaded bytes against the base model and return the prompt, or raise ArtifactError.

    Accepts native files (manifest in the metadata) and PEFT's or bare ones; for the latter `kind`,
    `num_virtual_tokens` or an adapter_config (also as metadata) decide where the shape alone does not.
    """
    if len(content) > bounds.max_bytes:
        raise ArtifactError(
            "artifact_too_large", f"file has {len(content)} bytes, at most {bounds.max_bytes} are allowed", status=413
        )
    asked = parse_kind(kind)
    header = read_header(content, bounds.max_header_bytes)
    if METADATA_KEY in header.metadata:
        manifest = Manifest.from_json(header.metadata[METADATA_KEY])
        config = None
        if asked is not None and asked is not manifest.kind:
            raise ArtifactError("kind_mismatch", f"kind {asked} was asked for, the file is {manifest.kind}", "kind")
        check_names([entry.name for entry in header.tensors], manifest.kind)
        _check_base(manifest, spec)
        tensors = _native_tensors(content, header, manifest, spec)
    else:
        manifest, config, tensors = decode_bare(content, header, spec, asked, num_virtual_tokens, adapter_config)
    check_length(manifest, spec, num_virtual_tokens)
    for name, tensor in tensors.items():
        if is_head(name):
            check_finite(name, tensor, spec)
        else:
            (check_soft if manifest.kind is PromptKind.SOFT else check_prefix)(name, tensor, spec, bounds)
    check_labels(manifest, {name: tensor.shape for name, tensor in tensors.items()})
    manifest = _with_tensors(manifest, tensors)
    return PromptArtifact(
        manifest=manifest,
        version=manifest.version(),
        content=content,
        tensors=tensors,
        adapter_config=None if config is None else config.raw,
        is_native=METADATA_KEY in header.metadata,
    )


def encode(
    kind: PromptKind | str,
    tensors: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    *,
    base_fingerprint: str | None = None,
    base_architecture: str | None = None,
    position_convention: Literal["shifted", "unshifted"] = "shifted",
    template: str | None = None,
    add_special_tokens: bool | None = None,
    prompt_after_bos: bool = False,
    truncation_side: Literal["left", "right"] = "right",
    default_sampling: Mapping[str, float | int] | None = None,
    stop: tuple[str, ...] = (),
    label_words: Mapping[str, str] | None = None,
    labels: tuple[str, ...] | None = None,
    text: str | None = None,
) -> PromptArtifact:
    """Make a native artifact from a canonical tensor (none for a text), or from several by their names where a
    classification head or a target's embeddings come with it. The same input gives the same bytes."""
    chosen = parse_kind(kind) or PromptKind.SOFT
    named = _named(chosen, tensors)
    count = 0
    for name, tensor in named.items():
        if is_head(name):
            continue
        rank, axis = (2, 0) if chosen is PromptKind.SOFT else (5, 3)
        if tensor.dim() != rank or tensor.dtype not in DTYPE_NAMES:
            raise ArtifactError(
                "shape_invalid",
                f"{name} must have {rank} dimensions and dtype float32, float16 or bfloat16, "
                f"got {tuple(tensor.shape)} of {tensor.dtype}",
                name,
            )
        if name in TENSOR_NAMES[chosen]:
            count = tensor.shape[axis]
    manifest = Manifest(
        kind=chosen,
        num_virtual_tokens=count,
        base_fingerprint=base_fingerprint,
        base_architecture=base_architecture,
        tensors=tuple(tensor_info(name, tensor) for name, tensor in sorted(named.items())),
        position_convention=position_convention,
        template=template,
        add_special_tokens=add_special_tokens,
        prompt_after_bos=prompt_after_bos,
        truncation_side=truncation_side,
        default_sampling=dict(default_sampling or {}),
        stop=tuple(stop),
        label_words=None if label_words is None else dict(label_words),
        labels=None if labels is None else tuple(labels),
        text=text,
    )
    check_labels(manifest, {name: tensor.shape for name, tensor in named.items()})
    content = save(named, {METADATA_KEY: manifest.to_json()})
    header_bytes = int.from_bytes(content[:8], "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ArtifactError(
            "header_too_large", f"manifest takes {header_bytes} bytes, at most {MAX_HEADER_BYTES} are allowed", "header"
        )
    return PromptArtifact(manifest=manifest, version=manifest.version(), content=content, tensors=named)


def to_native(artifact: PromptArtifact) -> bytes:
    """Return the artifact as a native file: its own bytes, or a bare or PEFT upload with its manifest written in."""
    if artifact.is_native:
        return bytes(artifact.content)
    return save(dict(artifact.tensors), {METADATA_KEY: artifact.manifest.to_json()})


def _named(kind: PromptKind, tensors: torch.Tensor | Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    if isinstance(tensors, torch.Tensor):
        tensors = dict.fromkeys(TENSOR_NAMES[kind], tensors)
    named = dict(tensors or {})
    check_names(list(named), kind)
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}


def _check_base(manifest: Manifest, spec: BaseModelSpec) -> None:
    pairs = (
        ("base_fingerprint", manifest.base_fingerprint, spec.fingerprint),
        ("base_architecture", manifest.base_architecture, spec.architecture),
    )
    for name, value, wanted in pairs:
        if value is not None and value != wanted:
            raise ArtifactError("base_mismatch", f"{name} is {value}, this server has {wanted}", name, status=409)


def _native_tensors(
    content: Content, header: Header, manifest: Manifest, spec: BaseModelSpec
) -> dict[str, torch.Tensor]:
    tensors = {}
    check_head({entry.name: entry.shape for entry in header.tensors if is_head(entry.name)}, spec)
    for entry in header.tensors:
        if entry.name == TARGET_TENSOR:
            check_target_shape(entry, spec)
        elif manifest.kind is PromptKind.PREFIX and not is_head(entry.name):
            check_prefix_shape(entry, manifest.num_virtual_tokens, spec)
        elif not is_head(entry.name):
            check_shape(entry, expected_shape(manifest.kind, manifest.num_virtual_tokens, spec))
        tensors[entry.name] = load_tensor(content, entry)
    return tensors


def _with_tensors(manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> Manifest:
    """Fill in the tensors' digests, or check the ones that the file claims."""
    actual = tuple(tensor_info(name, tensor) for name, tensor in sorted(tensors.items()))
    if manifest.tensors and manifest.tensors != actual:
        raise ArtifactError(
            "manifest_tensor_mismatch",
            f"manifest describes {shown(manifest.tensors)}, the file has other bytes",
            "tensors",
        )
    return replace(manifest, tensors=actual)
