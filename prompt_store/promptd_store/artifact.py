"""A learned prompt in memory, and the base model that it is checked against. A prompt is a prefix of the KV cache."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from promptd_store.base import Content
from promptd_store.manifest import Manifest, PromptKind, TensorInfo

SOFT_TENSOR = "prompt_embeddings"
TARGET_TENSOR = "target_embeddings"
"""`[m, hidden_size]` beside a soft prompt for a sequence-to-sequence model: stands in front of the target."""
PREFIX_TENSOR = "prefix"
HEAD_PREFIX = "head."
"""Begins the names of a classification head's tensors, which may stand beside a prompt for an encoder."""

DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class BaseModelSpec:
    """What an artifact is checked against: one frozen base model as it is served."""

    architecture: str
    fingerprint: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_attention_heads: int
    max_model_len: int
    serving_dtype: str
    """float32, float16 or bfloat16."""
    max_embedding_abs: float
    """Largest |embedding output| over the vocabulary."""
    max_key_abs: tuple[float, ...]
    """Largest |K| of each layer on a probe text, as it lies in the cache."""
    max_value_abs: tuple[float, ...]
    """Largest |V| of each layer on the same text."""
    takes_head: bool = False
    """Whether a classification head may come with a prompt: encoders."""
    num_encoder_layers: int = 0
    """Layers of the stack that reads sources, in a sequence-to-sequence model; `num_layers` are then the decoder's."""

    @property
    def prefix_layers(self) -> tuple[int, ...]:
        """How many layers a prefix may have: the answering stack's own; with a second stack also all of its banks'
        (the decoder's own, the encoder's own, the decoder's to the encoder)."""
        own, other = self.num_layers, self.num_encoder_layers
        return (own, 2 * own + other) if other else (own,)

    @property
    def peft_layers(self) -> int:
        """Layers that a flat prefix has: PEFT counts the encoder's where there are two stacks."""
        return self.num_encoder_layers or self.num_layers

    @property
    def prefix_width(self) -> int:
        """Numbers a virtual token of a flat prefix has: layers * 2 * num_kv_heads * head_dim."""
        return self.peft_layers * 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, eq=False)
class PromptArtifact:
    """One immutable prompt. Two artifacts of equal `version` are served identically."""

    manifest: Manifest
    version: str
    content: Content
    """The uploaded bytes, never re-encoded: native safetensors or PEFT's."""
    tensors: Mapping[str, torch.Tensor]
    """Canonical, dtype as stored: soft {"prompt_embeddings": [n, hidden_size]}, text {}, prefix
    {"prefix": [num_layers, 2, num_kv_heads, n, head_dim]}; with a classification head also its "head.…", and a soft
    prompt may have {"target_embeddings": [m, hidden_size]} for the decoder of a sequence-to-sequence model."""
    adapter_config: bytes | None = None
    """The bytes of PEFT's adapter_config.json where they came with the upload."""
    is_native: bool = True
    """True where `content` carries its own manifest; False for bare and PEFT files."""

    @property
    def kind(self) -> PromptKind:
        """Soft, prefix or text."""
        return self.manifest.kind

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that the prompt takes; 0 for a text, which is tokenized like any other."""
        return self.manifest.num_virtual_tokens

    @property
    def learned(self) -> torch.Tensor:
        """The soft prompt or the prefix. Raises `KeyError` for a text."""
        return self.tensors[SOFT_TENSOR if self.kind is PromptKind.SOFT else PREFIX_TENSOR]

    @property
    def target_embeddings(self) -> torch.Tensor | None:
        """What stands in front of the target; None where the prompt is the source's alone."""
        return self.tensors.get(TARGET_TENSOR)

    @property
    def head(self) -> Mapping[str, torch.Tensor]:
        """The classification head's tensors without the prefix of their names; empty where there is none."""
        return {
            name.removeprefix(HEAD_PREFIX): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(HEAD_PREFIX)
        }

    @property
    def class_labels(self) -> tuple[str, ...] | None:
        """Names of the head's classes, in their order; None where there is no head."""
        rows = [tensor.shape[0] for name, tensor in self.head.items() if name in ("weight", "out_proj.weight")]
        if not rows:
            return None
        return self.manifest.labels or tuple(f"LABEL_{number}" for number in range(rows[0]))

    @property
    def num_bytes(self) -> int:
        """Host memory that the artifact holds."""
        tensor_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
        return len(self.content) + len(self.adapter_config or b"") + tensor_bytes

    @property
    def verified(self) -> bool:
        """True where the artifact names the base model it was made for (and decode checked it)."""
        return self.manifest.base_fingerprint is not None


def tensor_info(name: str, tensor: torch.Tensor) -> TensorInfo:
    """Describe one tensor; the digest is of its little-endian bytes in row-major order."""
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return TensorInfo(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), hashlib.sha256(raw).hexdigest())
