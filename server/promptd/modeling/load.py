"""Load, check and freeze a base model."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from promptd_store import BaseModelSpec
from promptd_store.passing_thread import in_passing_thread
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from promptd.errors import ModelRefusedError
from promptd.modeling.activations import fuse_activations
from promptd.modeling.attention import ATTENTION_NAME, attend_by
from promptd.modeling.compiled_linear import CompiledLinear, can_compile
from promptd.modeling.families.base import Magnitudes, Sizes
from promptd.modeling.families.choice import Choice, choose
from promptd.modeling.fingerprint import computing_settings, fingerprint, stored_tensors
from promptd.modeling.freed_memory import keep_freed_memory
from promptd.modeling.frozen import FrozenModel
from promptd.modeling.frozen_linear import FrozenLinear, let_files_go, replace_linears
from promptd.modeling.norms import fuse_norms
from promptd.modeling.packed_linear import PackedLinear, can_pack
from promptd.modeling.quantized_linear import QuantizedLinear, can_quantize
from promptd.modeling.ranks import Rank
from promptd.modeling.step_graph import step_graph

STRICT_TILE_ROWS = 16
_SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_WEIGHT_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def load_model(
    path_or_id: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_model_len: int | None = None,
    packed_linears: bool = True,
    quantization: str = "none",
    strict: bool = False,
    served_name: str | None = None,
    rank: Rank | None = None,
) -> FrozenModel:
    """Load a model of transformers and prove that packed rows equal its own forward.

    `dtype="auto"` is float32 on the CPU and the checkpoint's on CUDA. `strict` multiplies in fixed tiles of rows, so
    that a row's bits do not depend on its neighbours. Weights must be safetensors; remote code is never run.
    `quantization="int8"` then multiplies in 8 bits on the CPU: the proof is of the model before that. `rank` loads one
    part of the model, beside other processes that load the others: see `tensor_parallel`.
    Raises `ModelRefusedError` where the model would not be served exactly.
    """
    model = in_passing_thread(
        _load,
        model_folder(path_or_id),
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        packed_linears=packed_linears,
        quantization=quantization,
        strict=strict,
        served_name=served_name,
        rank=rank,
    )
    if model.device.type == "cpu":
        gc.collect()  # layers that were replaced refer to themselves
        keep_freed_memory()  # not before: weights want fresh memory, which lies in huge pages
    return model


def _load(
    folder: Path,
    *,
    device: str,
    dtype: str,
    max_model_len: int | None,
    packed_linears: bool,
    quantization: str,
    strict: bool,
    served_name: str | None,
    rank: Rank | None,
) -> FrozenModel:
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    _check_quantization(quantization, target)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    choice = choose(config)
    sizes = choice.sizes
    if rank is not None and choice.auto_class is not AutoModelForCausalLM:
        raise ModelRefusedError(f"tensor_parallel {rank.size}: only decoders are divided, {config.model_type} is none")
    own_sizes = sizes if rank is None else rank.part_of(sizes)
    with ThreadPoolExecutor(1) as reader:  # hashing takes as long as loading does
        tensors = reader.submit(stored_tensors, _weight_files(folder))
        hf = _frozen(folder, choice, target, _dtype(dtype, target), {} if rank is None else rank.load_options(config))
    if target.type == "cpu" and rank is None and _SAFETENSORS.get(hf.dtype) in {one[1] for one in tensors.result()}:
        let_files_go(hf)  # tensors of other dtypes have been copied
    settings = computing_settings(hf.config if rank is None else config)  # as if it were whole
    spec = BaseModelSpec(
        architecture=type(hf).__name__,
        fingerprint=fingerprint(type(hf).__name__, settings, tensors.result()),
        vocab_size=config.vocab_size,
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        num_attention_heads=sizes.num_attention_heads,
        num_encoder_layers=sizes.num_encoder_layers,
        takes_head=choice.takes_head,
        max_model_len=_length(max_model_len, sizes),
        serving_dtype=str(hf.dtype).removeprefix("torch."),
        max_embedding_abs=_max_embedding(hf),
        max_key_abs=(),
        max_value_abs=(),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    family = choice.make(hf, tokenizer, folder)
    family.sizes = own_sizes
    model = FrozenModel(hf, tokenizer, spec, served_name or folder.resolve().name, family)
    if quantization == "none":
        model = _proven(model, packed_linears=packed_linears and rank is None, strict=strict, rank=rank)
    else:
        model = _proven(model, packed_linears=False, strict=False, rank=rank)
        replace_linears(hf, QuantizedLinear)
        with _refusing(spec.architecture):  # once more: nobody may reach past the layers for weights of old
            family.check_layers()
    if model.device.type != "cpu" or family.reads_whole or rank is not None:
        return model
    return dataclasses.replace(
        model, step_graph=step_graph(model.forward, model.embed, spec.vocab_size, spec.max_model_len)
    )


def _check_quantization(name: str, device: torch.device) -> None:
    if name not in ("none", "int8"):
        raise ModelRefusedError(f"quantization {name!r} is not one of none, int8")
    if name == "int8" and (device.type != "cpu" or not can_quantize()):
        raise ModelRefusedError(f"quantization 'int8' is for CPUs with 8-bit products; this is {device}")


def _proven(model: FrozenModel, *, packed_linears: bool, strict: bool, rank: Rank | None) -> FrozenModel:
    """Switch to our attention and linears, compare with transformers' answers, measure the K/V magnitudes."""
    hf = model.hf
    with _refusing(model.spec.architecture):
        prove = model.family.prove()
        attend_by(hf, ATTENTION_NAME)
    packs = packed_linears and model.device.type == "cpu"
    compiles, pack = packs and can_compile(model.dtype), packs and can_pack(model.dtype)
    if compiles or pack or strict:
        packed = partial(PackedLinear, pack=pack, tile_rows=STRICT_TILE_ROWS if strict else 0)
        replace_linears(hf, partial(_compiled, otherwise=packed) if compiles else packed)
    fuse_activations(hf)
    fuse_norms(hf)
    with _refusing(model.spec.architecture):
        model.family.install()
        model.family.check_layers()
    largest = prove(model)
    if rank is not None:
        largest = Magnitudes(rank.largest(largest.keys, model.device), rank.largest(largest.values, model.device))
    spec = dataclasses.replace(model.spec, max_key_abs=largest.keys, max_value_abs=largest.values)
    return dataclasses.replace(model, spec=spec)


def _compiled(
    weight: torch.Tensor, bias: torch.Tensor | None, *, otherwise: Callable[..., FrozenLinear]
) -> FrozenLinear:
    make = CompiledLinear if can_compile(weight.dtype, weight.shape[1]) else otherwise
    return make(weight, bias)


@contextlib.contextmanager
def _refusing(architecture: str) -> Iterator[None]:
    """Say in our words what a model cannot do that answers in its own."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        raise ModelRefusedError(
            f"layer 0: {architecture} does not take positions and a registered attention function ({error})"
        ) from error


def model_folder(path_or_id: str | Path) -> Path:
    """Return where a model's files are, from the hub's cache for an id; raises `ModelRefusedError`."""
    path = Path(path_or_id).expanduser()
    try:
        if path.is_dir():
            for one in path.iterdir():
                if one.suffix in (".json", ".safetensors") and not os.access(one, os.R_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(one))
            return path
    except PermissionError as error:  # in a container it runs as another user than whose the files are
        raise ModelRefusedError(f"{error.filename}: this server's user may not read it") from error
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=_WEIGHT_PATTERNS))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelRefusedError(f"{path_or_id}: not a folder, and not to be had from the hub ({error})") from error


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads; a folder may hold the same weights once more under other names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise ModelRefusedError(f"{folder}: no model.safetensors, whole or sharded; pickled weights are never read")
    return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bar on stderr from transformers while this lasts."""
    before = logging.set_tqdm_hook(lambda make, args, kwargs: make(*args, **{**kwargs, "disable": True}))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _length(asked: int | None, sizes: Sizes) -> int:
    longest = asked or sizes.max_positions
    return min(longest, sizes.max_positions) if sizes.has_position_table else longest


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelRefusedError(f"dtype {name!r} is not one of auto, float32, bfloat16, float16")
    return dtype  # type: ignore[no-any-return]


def _frozen(
    folder: Path, choice: Choice, device: torch.device, dtype: torch.dtype | str, divided: Mapping[str, Any]
) -> PreTrainedModel:
    try:
        with _without_bars():
            hf, report = choice.auto_class.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation="sdpa",
                output_loading_info=True,
                **divided,
            )
    except ValueError as error:  # a class that bypasses AttentionInterface has no sdpa either
        raise ModelRefusedError(f"layer 0: transformers cannot load {folder.name} for us: {error}") from error
    missing = choice.drop_missing(hf, set(report["missing_keys"]))
    if missing:  # transformers would make them up
        raise ModelRefusedError(f"{folder.name} lacks {len(missing)} tensors of its model, {min(missing)} first")
    return (hf if divided else hf.to(device)).eval().requires_grad_(False)  # type: ignore[no-any-return]


@torch.no_grad()
def _max_embedding(hf: PreTrainedModel) -> float:
    embedding = hf.get_input_embeddings()
    ids = torch.arange(hf.config.vocab_size, device=hf.device)
    return max(float(embedding(chunk).abs().max()) for chunk in ids.split(4096))
