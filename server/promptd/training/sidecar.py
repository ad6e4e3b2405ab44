"""The parameters before folding, kept beside the artifact: a folded prompt alone cannot be trained on."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from promptd.errors import InvalidRequestError
from promptd.modeling import FrozenModel
from promptd.training.methods import MethodConfig, PromptMethod, build_method

METADATA_KEY = "promptd_method"


def sidecar_bytes(method: PromptMethod, config: MethodConfig) -> bytes:
    """Return a method's parameters as safetensors with its config in the metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in method.state_dict().items()}
    return save(tensors, {METADATA_KEY: json.dumps(asdict(config), sort_keys=True)})


def method_from_sidecar(content: bytes, config: MethodConfig, model: FrozenModel) -> PromptMethod:
    """Rebuild the live parameters; they must be those of this method and shape."""
    method = build_method(config, model, seed=0)
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise InvalidRequestError(f"not a safetensors file ({error})", param="resume_from") from None
    expected = {name: tuple(tensor.shape) for name, tensor in method.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        raise InvalidRequestError(
            f"holds the tensors {found}, but method {config.name!r} needs {expected}", param="resume_from"
        )
    with torch.no_grad():
        method.load_state_dict(tensors)
    return method
