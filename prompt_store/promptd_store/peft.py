"""PEFT folders in and out. What came from PEFT goes back byte for byte; native prompts are written as PEFT would."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from promptd_store.artifact import HEAD_PREFIX, PREFIX_TENSOR, SOFT_TENSOR, BaseModelSpec, PromptArtifact
from promptd_store.bounds import Bounds
from promptd_store.codec import decode
from promptd_store.errors import ArtifactError
from promptd_store.head import name_to_peft
from promptd_store.header import read_header
from promptd_store.manifest import PromptKind
from promptd_store.peft_config import MAX_CONFIG_BYTES, dump_config, flatten_prefix
from promptd_store.peft_seq2seq import stored_layers

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_VERSION = "0.17.0"
"""The version of PEFT whose format is written for native prompts; later ones read it."""


def read_peft(
    source: str | Path | tuple[bytes, bytes], spec: BaseModelSpec, *, bounds: Bounds | None = None
) -> PromptArtifact:
    """Read a PEFT folder, or (adapter_config.json, adapter_model.safetensors) as bytes, and check it."""
    limits = bounds or Bounds()
    if isinstance(source, tuple):
        config, weights = source
    else:
        folder = Path(source)
        config = _read(folder / CONFIG_NAME, MAX_CONFIG_BYTES)
        weights = _read(folder / WEIGHTS_NAME, limits.max_bytes)
    return decode(weights, spec, adapter_config=config, bounds=limits)


def to_peft(
    artifact: PromptArtifact, *, spec: BaseModelSpec | None = None, base_model_name_or_path: str | None = None
) -> tuple[bytes, bytes]:
    """Return (adapter_config.json, adapter_model.safetensors). The arguments only fill a config that is not kept."""
    manifest = artifact.manifest
    if manifest.kind is PromptKind.TEXT or manifest.prompt_after_bos or manifest.position_convention != "shifted":
        raise ArtifactError(
            "not_exportable",
            f"PEFT cannot express kind {manifest.kind}, prompt_after_bos {manifest.prompt_after_bos}, "
            f"position_convention {manifest.position_convention}",
            "format",
        )
    if artifact.target_embeddings is not None:
        raise ArtifactError(
            "not_exportable",
            "PEFT never puts a soft prompt in front of the decoder's input; this one has such",
            "format",
        )
    config = artifact.adapter_config
    if config is None:
        config = dump_config(_config(artifact, spec, base_model_name_or_path))
    if not artifact.is_native and PREFIX_TENSOR not in _names(artifact):
        return config, bytes(artifact.content)
    tensor = artifact.tensors[SOFT_TENSOR if manifest.kind is PromptKind.SOFT else PREFIX_TENSOR]
    if spec is not None and spec.num_encoder_layers:
        tensor = tensor.repeat(2, 1) if manifest.kind is PromptKind.SOFT else stored_layers(tensor, spec)
    flat = tensor if manifest.kind is PromptKind.SOFT else flatten_prefix(tensor)
    tensors = {SOFT_TENSOR: flat.contiguous()}
    tensors |= {name_to_peft(HEAD_PREFIX + name): tensor for name, tensor in artifact.head.items()}
    return config, save(tensors, {"format": "pt"})


def write_peft(
    artifact: PromptArtifact,
    folder: str | Path,
    *,
    spec: BaseModelSpec | None = None,
    base_model_name_or_path: str | None = None,
) -> None:
    """Write both files into a folder, which is made where it is missing."""
    config, weights = to_peft(artifact, spec=spec, base_model_name_or_path=base_model_name_or_path)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / WEIGHTS_NAME).write_bytes(weights)
    (target / CONFIG_NAME).write_bytes(config)


def _config(artifact: PromptArtifact, spec: BaseModelSpec | None, base_model: str | None) -> Mapping[str, Any]:
    is_pair = spec is not None and spec.num_encoder_layers > 0
    common: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "modules_to_save": ["classifier", "score"] if artifact.head else None,
        "num_transformer_submodules": 2 if is_pair else 1,
        "num_virtual_tokens": artifact.num_virtual_tokens,
        "peft_version": PEFT_VERSION,
        "revision": None,
        "task_type": "SEQ_CLS" if artifact.head else "SEQ_2_SEQ_LM" if is_pair else "CAUSAL_LM",
    }
    if artifact.kind is PromptKind.SOFT:
        return common | {
            "num_attention_heads": None if spec is None else spec.num_attention_heads,
            "num_layers": None if spec is None else spec.num_layers,
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "token_dim": artifact.tensors[SOFT_TENSOR].shape[1],
            "tokenizer_kwargs": None,
            "tokenizer_name_or_path": None,
        }
    num_layers, _, num_kv_heads, _, head_dim = artifact.tensors[PREFIX_TENSOR].shape
    return common | {
        "encoder_hidden_size": num_kv_heads * head_dim,
        "init_weights": None,
        "num_attention_heads": num_kv_heads,
        "num_layers": num_layers if spec is None else spec.peft_layers,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "token_dim": num_kv_heads * head_dim,
    }


def _names(artifact: PromptArtifact) -> set[str]:
    """Return the tensor names in the uploaded file; a lone canonical prefix is not PEFT's layout."""

    return {entry.name for entry in read_header(artifact.content).tensors}


def _read(file: Path, max_bytes: int) -> bytes:
    if not file.is_file():
        hint = ""
        if file.name == WEIGHTS_NAME and file.with_suffix(".bin").exists():
            hint = "; adapter_model.bin is a pickle and is not read"
        raise ArtifactError("peft_file_missing", f"no {file.name} in {file.parent}{hint}", file.name)
    with file.open("rb") as stream:
        content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ArtifactError("artifact_too_large", f"{file.name} has more than {max_bytes} bytes", file.name, status=413)
    return content
