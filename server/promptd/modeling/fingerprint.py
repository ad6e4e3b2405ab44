"""Identity of a base model: what it is, not how its files are cut."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

_CHUNK_BYTES = 1 << 22
COMPUTING_SETTINGS = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters", "sliding_window", "layer_types",
    "hidden_act", "activation_function", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
    "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling",
    "query_pre_attn_scalar", "use_parallel_residual", "scale_attn_by_inverse_layer_idx",
    "relative_attention_num_buckets", "relative_attention_max_distance", "feed_forward_proj", "scale_decoder_outputs",
    "encoder_attention_heads", "decoder_attention_heads", "scale_embedding", "decoder_start_token_id",
)  # fmt: skip
"""Settings that change what a model computes and leave no trace in the names and shapes of its tensors."""


def computing_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return those of `COMPUTING_SETTINGS` that a model's config has."""
    found = {name: getattr(config, name, None) for name in COMPUTING_SETTINGS}
    return {name: value for name, value in found.items() if value is not None}


StoredTensor = tuple[str, str, list[int], str]
"""Name, dtype, shape and sha256 of a tensor in a safetensors file, as stored."""


def stored_tensors(files: Sequence[Path]) -> list[StoredTensor]:
    """Read all tensors of these files, in any order of them; the same for one file or many shards."""
    return sorted(row for file in files for row in _tensors_in(file))


def _tensors_in(file: Path) -> Iterator[StoredTensor]:
    with file.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(header_bytes))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            stream.seek(8 + header_bytes + begin)
            digest, left = hashlib.sha256(), end - begin
            while left:
                chunk = stream.read(min(left, _CHUNK_BYTES))
                digest.update(chunk)
                left -= len(chunk)
            yield name, entry["dtype"], entry["shape"], digest.hexdigest()


def fingerprint(architecture: str, settings: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> str:
    """Return `sha256:…` over architecture, settings and all stored tensors."""
    return _digest({"architecture": architecture, "settings": settings, "tensors": tensors})


def digest_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return `sha256:…` over the tensors of a model in memory: shows that training changed nothing."""
    rows = []
    for name, tensor in sorted(tensors.items()):
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        rows.append((name, str(tensor.dtype), list(tensor.shape), hashlib.sha256(raw).hexdigest()))
    return _digest({"tensors": rows})


def _digest(facts: Mapping[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
