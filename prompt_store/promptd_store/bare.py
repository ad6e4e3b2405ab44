"""Files without a manifest: PEFT's, or a lone canonical tensor. Kind and layout follow from the shape and the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from promptd_store.artifact import PREFIX_TENSOR, SOFT_TENSOR, TARGET_TENSOR, BaseModelSpec
from promptd_store.base import Content
from promptd_store.errors import ArtifactError
from promptd_store.head import check_head, name_from_peft
from promptd_store.header import Header, TensorEntry
from promptd_store.layout import TENSOR_NAMES, check_length, check_prefix_shape, load_tensor
from promptd_store.manifest import Manifest, PromptKind
from promptd_store.peft_config import AdapterConfig, check_adapter_config, parse_adapter_config, unflatten_prefix
from promptd_store.peft_seq2seq import served_layers, served_rows


def decode_bare(
    content: Content,
    header: Header,
    spec: BaseModelSpec,
    kind: PromptKind | None,
    num_virtual_tokens: int | None,
    adapter_config: Mapping[str, Any] | bytes | None,
) -> tuple[Manifest, AdapterConfig | None, dict[str, torch.Tensor]]:
    """Read the one tensor of a file without a manifest, and the classification head that PEFT may have saved beside it.

    The caller's wishes and the adapter_config must agree.
    """
    if adapter_config is None and "adapter_config" in header.metadata:
        adapter_config = header.metadata["adapter_config"].encode()
    config = None if adapter_config is None else parse_adapter_config(adapter_config)
    if config is not None:
        if kind is not None and kind is not config.kind:
            raise ArtifactError(
                "kind_mismatch", f"kind {kind} was asked for, adapter_config says {config.peft_type}", "kind"
            )
        kind = config.kind
        check_adapter_config(config, spec)
        if config.num_virtual_tokens is not None:
            if num_virtual_tokens not in (None, config.num_virtual_tokens):
                raise ArtifactError(
                    "num_virtual_tokens_mismatch",
                    f"num_virtual_tokens {num_virtual_tokens} was asked for, adapter_config says "
                    f"{config.num_virtual_tokens}",
                    "num_virtual_tokens",
                )
            num_virtual_tokens = config.num_virtual_tokens
    head = {name: entry for entry in header.tensors if (name := name_from_peft(entry.name)) is not None}
    if len(header.tensors) != 1 + len(head):
        raise ArtifactError(
            "tensor_count_mismatch", f"file has {len(header.tensors)} tensors, a prompt without a manifest has 1"
        )
    check_head({name: entry.shape for name, entry in head.items()}, spec)
    (entry,) = [entry for entry in header.tensors if name_from_peft(entry.name) is None]
    if entry.name == TARGET_TENSOR:
        raise ArtifactError(
            "tensor_name_not_allowed",
            f"{entry.name} stands beside {SOFT_TENSOR}, in a file with a manifest",
            entry.name,
        )
    kind, rows = _infer(entry, spec, kind)
    if kind is PromptKind.SOFT:
        rows = served_rows(entry, spec, config)
    if num_virtual_tokens not in (None, rows):
        raise ArtifactError(
            "num_virtual_tokens_mismatch",
            f"num_virtual_tokens is {num_virtual_tokens}, tensor {entry.name} of shape {list(entry.shape)} has {rows}",
            "num_virtual_tokens",
        )
    manifest = Manifest(kind=kind, num_virtual_tokens=rows)
    check_length(manifest, spec, None)
    tensor = load_tensor(content, entry)
    if kind is PromptKind.SOFT:
        tensor = tensor[:rows].clone()
    elif tensor.dim() == 2:
        stored = unflatten_prefix(tensor, spec.peft_layers, spec.num_kv_heads, spec.head_dim)
        tensor = stored[list(served_layers(spec))] if spec.num_encoder_layers else stored
    tensors = {TENSOR_NAMES[kind][0]: tensor}
    return manifest, config, tensors | {name: load_tensor(content, entry) for name, entry in head.items()}


def _infer(entry: TensorEntry, spec: BaseModelSpec, kind: PromptKind | None) -> tuple[PromptKind, int]:
    """Return the kind that the shape means on this base model, and its number of virtual tokens."""
    if kind is PromptKind.TEXT:
        raise ArtifactError("kind_mismatch", "a text prompt needs a manifest; this file has a tensor", "kind")
    if entry.name == PREFIX_TENSOR:
        count = entry.shape[3] if len(entry.shape) == 5 else 0
        check_prefix_shape(entry, count, spec)
        if kind is PromptKind.SOFT:
            raise ArtifactError("kind_mismatch", "kind soft was asked for, the file has a prefix", "kind")
        return PromptKind.PREFIX, count
    widths = {PromptKind.SOFT: spec.hidden_size, PromptKind.PREFIX: spec.prefix_width}
    fitting = [one for one, width in widths.items() if len(entry.shape) == 2 and entry.shape[1] == width]
    if kind is not None:
        fitting = [one for one in fitting if one is kind]
        widths = {kind: widths[kind]}
    if not fitting:
        wanted = " or ".join(f"[n, {width}] ({one})" for one, width in widths.items())
        hint = ""
        if entry.shape[-1] == spec.num_layers * 2 * spec.num_attention_heads * spec.head_dim:
            hint = "; this width has one K/V head per attention head, as PEFT wrote before it knew grouped heads"
        raise ArtifactError(
            "shape_mismatch",
            f"tensor {entry.name} has shape {list(entry.shape)}, {spec.architecture} needs {wanted}{hint}",
            entry.name,
        )
    if len(fitting) > 1:
        raise ArtifactError(
            "ambiguous_kind",
            f"tensor {entry.name} of shape {list(entry.shape)} may be soft or prefix: "
            "say ?kind= or send the adapter_config",
            "kind",
        )
    return fitting[0], entry.shape[0]
