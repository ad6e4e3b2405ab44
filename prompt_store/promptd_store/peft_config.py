"""PEFT's adapter_config.json as data, and PEFT's flat prefix layout. Class names and paths in it are never followed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from promptd_store.artifact import BaseModelSpec
from promptd_store.errors import ArtifactError
from promptd_store.manifest import PromptKind
from promptd_store.strict_json import parse_object, shown

MAX_CONFIG_BYTES = 16 << 10

_KINDS: Mapping[str, PromptKind] = {
    "PROMPT_TUNING": PromptKind.SOFT,
    "P_TUNING": PromptKind.SOFT,
    "PREFIX_TUNING": PromptKind.PREFIX,
    "CARTRIDGE": PromptKind.PREFIX,
}


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The few fields of adapter_config.json that decide how a file is read; None where the file has null."""

    kind: PromptKind
    peft_type: str
    num_virtual_tokens: int | None
    token_dim: int | None
    num_layers: int | None
    num_attention_heads: int | None
    num_transformer_submodules: int
    raw: bytes


def parse_adapter_config(config: Mapping[str, Any] | bytes) -> AdapterConfig:
    """Read an adapter_config from its bytes or its values; other fields are kept in `raw` and not looked at."""
    raw = config if isinstance(config, bytes) else dump_config(config)
    if len(raw) > MAX_CONFIG_BYTES:
        raise ArtifactError(
            "adapter_config_too_large",
            f"adapter_config has {len(raw)} bytes, at most {MAX_CONFIG_BYTES} are allowed",
            "adapter_config",
        )
    values = parse_object(raw, "adapter_config")
    peft_type = values.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in _KINDS:
        raise ArtifactError(
            "peft_type_not_supported",
            f"adapter_config has peft_type {shown(peft_type)}, supported: {sorted(_KINDS)}",
            "peft_type",
        )
    submodules = _count(values, "num_transformer_submodules")
    if submodules is None:
        submodules = 2 if values.get("task_type") == "SEQ_2_SEQ_LM" else 1
    return AdapterConfig(
        kind=_KINDS[peft_type],
        peft_type=peft_type,
        num_virtual_tokens=_count(values, "num_virtual_tokens"),
        token_dim=_count(values, "token_dim"),
        num_layers=_count(values, "num_layers"),
        num_attention_heads=_count(values, "num_attention_heads"),
        num_transformer_submodules=submodules,
        raw=raw,
    )


def check_adapter_config(config: AdapterConfig, spec: BaseModelSpec) -> None:
    """Refuse a config that was written for another shape of base model."""
    is_prefix = config.kind is PromptKind.PREFIX
    if config.num_transformer_submodules != 1 and not spec.num_encoder_layers:
        raise ArtifactError(
            "peft_layout_not_supported",
            f"num_transformer_submodules is {config.num_transformer_submodules}: made for an encoder-decoder, "
            f"{spec.architecture} has one stack",
            "num_transformer_submodules",
        )
    expected: list[tuple[str, int | None, int]] = [
        ("num_layers", config.num_layers, spec.peft_layers),
        ("token_dim", config.token_dim, spec.num_kv_heads * spec.head_dim if is_prefix else spec.hidden_size),
    ]
    if is_prefix:
        expected.append(("num_attention_heads", config.num_attention_heads, spec.num_kv_heads))
    for name, value, wanted in expected:
        if value is not None and value != wanted:
            raise ArtifactError(
                "shape_mismatch",
                f"adapter_config has {name} {value}, this base model ({spec.architecture}) needs {wanted}",
                name,
            )


def dump_config(config: Mapping[str, Any]) -> bytes:
    """Write a config byte for byte as PEFT does."""
    try:
        return json.dumps(config, indent=2, sort_keys=True).encode()
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            "adapter_config_invalid_json", f"adapter_config is not JSON: {error}", "adapter_config"
        ) from None


def flatten_prefix(prefix: torch.Tensor) -> torch.Tensor:
    """`[L, 2, H, n, D]` -> `[n, L*2*H*D]`, column ((2*layer + kv)*H + head)*D + dim."""
    return prefix.permute(3, 0, 1, 2, 4).reshape(prefix.shape[3], -1).contiguous()


def unflatten_prefix(flat: torch.Tensor, num_layers: int, num_kv_heads: int, head_dim: int) -> torch.Tensor:
    """`[n, L*2*H*D]` -> `[L, 2, H, n, D]`."""
    return flat.view(flat.shape[0], num_layers, 2, num_kv_heads, head_dim).permute(1, 2, 3, 0, 4).contiguous()


def _count(values: Mapping[str, Any], name: str) -> int | None:
    value = values.get(name)
    if value is None or (type(value) is int and 0 < value < 1 << 31):
        return value
    raise ArtifactError(
        "adapter_config_invalid", f"adapter_config has {name} {shown(value)}, expected a positive integer", name
    )
