"""Good files and hostile ones, made byte by byte so that no library can repair them."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import torch
from promptd_store import ArtifactError, BaseModelSpec, decode, encode

SPEC = BaseModelSpec(
    architecture="LlamaForCausalLM",
    fingerprint="sha256:" + "a" * 64,
    vocab_size=320,
    hidden_size=48,
    num_layers=3,
    num_kv_heads=2,
    head_dim=16,
    num_attention_heads=4,
    max_model_len=128,
    serving_dtype="float32",
    max_embedding_abs=2.0,
    max_key_abs=(4.0, 5.0, 6.0),
    max_value_abs=(1.0, 2.0, 3.0),
)


def raw_file(header: Any, data: bytes = b"", *, header_bytes: int | None = None) -> bytes:
    """A safetensors file from a header (JSON values, or bytes as they are) and data, with any claimed length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if header_bytes is None else header_bytes) + text + data


def entry(shape: list[Any], num_bytes: int, *, dtype: str = "F32", begin: int = 0) -> dict[str, Any]:
    """One tensor's header entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + num_bytes]}


def bare_file(
    tensor: torch.Tensor, metadata: dict[str, str] | None = None, *, name: str = "prompt_embeddings"
) -> bytes:
    """A file as PEFT writes it: one tensor, no manifest."""
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}[tensor.dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else metadata}
    header[name] = entry(list(tensor.shape), len(data), dtype=dtype)
    return raw_file(header, data)


def native_file(manifest: Any, tensor: torch.Tensor, *, name: str = "prompt_embeddings") -> bytes:
    """A file with a hand-written manifest (JSON values, or text as it is)."""
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    return bare_file(tensor, {"promptd": text}, name=name)


def soft(num_virtual_tokens: int = 5, *, seed: int = 0) -> torch.Tensor:
    """Random embeddings `[n, hidden_size]`."""
    return torch.randn(num_virtual_tokens, SPEC.hidden_size, generator=torch.Generator().manual_seed(seed))


def prefix(num_virtual_tokens: int = 4, *, seed: int = 0) -> torch.Tensor:
    """A random prefix `[num_layers, 2, num_kv_heads, n, head_dim]`."""
    shape = (SPEC.num_layers, 2, SPEC.num_kv_heads, num_virtual_tokens, SPEC.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def soft_file(seed: int = 0, **fields: Any) -> bytes:
    """A good native soft prompt; distinct for each seed."""
    return encode("soft", soft(seed=seed), **fields).content


def refusal(content: bytes, spec: BaseModelSpec = SPEC, **wishes: Any) -> ArtifactError:
    """The error that decoding raises."""
    with pytest.raises(ArtifactError) as caught:
        decode(content, spec, **wishes)
    assert 400 <= caught.value.status < 500
    return caught.value
