"""Learned prompts in other programs' files, read for `promptd convert`: the one place that opens pickles and .npy.

torch's files are read with `weights_only=True` and NumPy's with `allow_pickle=False`; neither runs code. This happens
on the user's machine, never in the server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from promptd_store.peft import CONFIG_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file

MAX_FILE_BYTES = 4 << 30
PICKLE_NAME = "adapter_model.bin"
TENSOR_NAME = "prompt_embeddings"
PRE_MLP_WARNING = (
    "prompt.npy of ResidualPrompts holds the prompt BEFORE its residual MLP, and the MLP was never saved: "
    "it will not answer as it did in training. Use it as a start for new training, or as it is if it is from elsewhere"
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class ConversionError(Exception):
    """A file is not a learned prompt that can be written as safetensors."""


@dataclass(frozen=True, slots=True)
class OldPrompt:
    """One prompt read: its tensor `[rows, width]`, the adapter_config.json to write beside it, and remarks."""

    tensor: torch.Tensor
    config: bytes
    warnings: tuple[str, ...] = field(default=())


def read_old(source: Path) -> OldPrompt:
    """Read a PEFT folder with a pickle, a TGIS prompt folder, or a single .pt, .bin or .npy file."""
    if source.is_file():
        return _read_file(source)
    if (source / CONFIG_NAME).is_file():
        return _read_peft(source)
    files = {name: source / f"{name}.pt" for name in ("encoder", "decoder") if (source / f"{name}.pt").is_file()}
    if files:
        return _read_tgis({name: _state(_load_torch(path), path) for name, path in files.items()}, source)
    for name in (PICKLE_NAME, WEIGHTS_NAME):  # TGIS took PEFT's weights without their configuration
        if (source / name).is_file():
            return _read_file(source / name)
    raise ConversionError(f"{source}: no {PICKLE_NAME}, decoder.pt or encoder.pt in it")


def _read_peft(folder: Path) -> OldPrompt:
    config = (folder / CONFIG_NAME).read_bytes()
    try:
        kind = json.loads(config).get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ConversionError(f"{folder / CONFIG_NAME}: not a JSON object ({error})") from error
    if kind not in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE"):
        raise ConversionError(f"{folder}: peft_type {kind!r} is not a learned prompt that promptd serves")
    if (folder / WEIGHTS_NAME).is_file():
        raise ConversionError(f"{folder}: has {WEIGHTS_NAME} already; nothing to convert")
    tensor, remarks = _plain(_state(_load_torch(folder / PICKLE_NAME), folder / PICKLE_NAME))
    return OldPrompt(tensor, config, remarks)


def _read_tgis(parts: Mapping[str, torch.Tensor], folder: Path) -> OldPrompt:
    """An encoder-decoder's two prompts become PEFT's one tensor: the encoder's rows, then the decoder's."""
    if len({tensor.shape for tensor in parts.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in parts.items())
        raise ConversionError(f"{folder}: PEFT keeps equally many rows for encoder and decoder, here are {shapes}")
    tensor, remarks = _plain(torch.cat([parts[name] for name in ("encoder", "decoder") if name in parts]))
    rows = tensor.shape[0] // len(parts)
    is_seq2seq = "encoder" in parts
    if is_seq2seq:
        remarks += ("made for an encoder-decoder model",)
    return OldPrompt(tensor, _config(rows, tensor.shape[1], len(parts), is_seq2seq=is_seq2seq), remarks)


def _read_file(path: Path) -> OldPrompt:
    remarks: tuple[str, ...] = ()
    if path.suffix == ".npy":
        raw = _matrix(_load_numpy(path), path)
        if path.name == "prompt.npy":
            remarks = (PRE_MLP_WARNING,)
    elif path.suffix in (".pt", ".pth", ".bin"):
        raw = _state(_load_torch(path), path)
    elif path.suffix == ".safetensors":
        raw = _state(_load_safetensors(path), path)
    else:
        raise ConversionError(f"{path}: expected .pt, .pth, .bin or .npy")
    tensor, more = _plain(raw)
    return OldPrompt(tensor, _config(tensor.shape[0], tensor.shape[1], 1), remarks + more)


def _load_torch(path: Path) -> Any:
    if not path.is_file():
        raise ConversionError(f"{path.parent}: no {path.name}")
    _check_size(path)
    try:
        with torch.sparse.check_sparse_tensor_invariants():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(f"{path}: holds more than tensors, or is damaged; not read ({reason[:160]})") from error


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path}: not a safetensors file ({error})") from error


def _load_numpy(path: Path) -> torch.Tensor:
    _check_size(path)
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ConversionError(f"{path}: not a plain NumPy array ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise ConversionError(f"{path}: not an array of floating-point numbers")
    return torch.from_numpy(array.astype(np.float64 if array.dtype.itemsize > 4 else array.dtype.newbyteorder("=")))


def _state(value: Any, path: Path) -> torch.Tensor:
    """Return the one tensor of a state dict, whatever prefix its name carries, or a lone tensor."""
    if isinstance(value, torch.Tensor):
        return _matrix(value, path)
    if not isinstance(value, Mapping):
        raise ConversionError(f"{path}: holds a {type(value).__name__}, not tensors")
    fitting = [name for name in value if isinstance(name, str) and name.split(".")[-1] == TENSOR_NAME]
    if not fitting and len(value) == 1:
        fitting = list(value)
    if len(value) != 1 or len(fitting) != 1 or not isinstance(value[fitting[0]], torch.Tensor):
        names = ", ".join(sorted(str(name) for name in value)[:5])
        raise ConversionError(f"{path}: expected one tensor {TENSOR_NAME}, got {len(value)}: {names}")
    tensor: torch.Tensor = value[fitting[0]]
    return _matrix(tensor, path)


def _matrix(value: torch.Tensor, path: Path) -> torch.Tensor:
    if value.layout is not torch.strided:
        raise ConversionError(f"{path}: holds a sparse tensor; only dense ones are read")
    if value.dim() == 3 and value.shape[0] == 1:
        value = value[0]
    if value.dim() != 2 or 0 in value.shape or not value.is_floating_point():
        raise ConversionError(f"{path}: expected numbers of shape [rows, width], got {list(value.shape)} {value.dtype}")
    return value


def _plain(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Return a dense float tensor that safetensors and the server take."""
    remarks = () if tensor.dtype in _DTYPES else (f"{tensor.dtype} was rounded to float32",)
    kept = tensor if tensor.dtype in _DTYPES else tensor.to(torch.float32)
    if not torch.isfinite(kept).all():
        raise ConversionError("the tensor has numbers that are not finite")
    return kept.detach().contiguous().clone(), remarks


def _check_size(path: Path) -> None:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ConversionError(f"{path}: has more than {MAX_FILE_BYTES} bytes")


def _config(rows: int, width: int, num_submodules: int, *, is_seq2seq: bool = False) -> bytes:
    """Write the configuration that PEFT would have written, as far as the file tells."""
    config = {
        "base_model_name_or_path": None,
        "inference_mode": True,
        "num_transformer_submodules": num_submodules,
        "num_virtual_tokens": rows,
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "task_type": "SEQ_2_SEQ_LM" if is_seq2seq else "CAUSAL_LM",
        "token_dim": width,
    }
    return json.dumps(config, indent=2, sort_keys=True).encode()
