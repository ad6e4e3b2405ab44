"""The parameters before folding, kept beside the artifact: a folded prompt alone cannot be trained on.

One safetensors file: the method's tensors, the state of its random generator, and its settings in the metadata.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from promptd.errors import InvalidRequestError
from promptd.modeling import FrozenModel
from promptd.training.methods import MethodConfig, PromptMethod, build_method, method_json, parse_method

METADATA_KEY = "promptd_method"
RNG_STATE = "rng_state"

FREE_SETTINGS = frozenset({"init", "init_text", "init_vocabulary", "learning_rate", "network_learning_rate", "dropout"})
"""Settings that may differ between the training that wrote a sidecar and the one that goes on from it."""


def sidecar_bytes(method: PromptMethod) -> bytes:
    """Return a method's parameters, random state and settings."""
    state = {**method.state_dict(), RNG_STATE: method.rng_state()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    return save(tensors, {METADATA_KEY: json.dumps(method_json(method.config), sort_keys=True)})


def method_from_sidecar(content: bytes, config: MethodConfig, model: FrozenModel) -> PromptMethod:
    """Rebuild the live parameters under `config`, which may change rates and dropout but not what is computed.

    Raises `InvalidRequestError` (`param` is `resume_from`) for bytes that are no sidecar, for one of another method
    or shape, and for one of another base model.
    """
    tensors, written = _read(content)
    if _fixed(written) != _fixed(config):
        raise _refusal(f"was written by a method of other settings: it has {_fixed(written)}, needed {_fixed(config)}")
    num_classes = len(tensors["head"]) if "head" in tensors else 0
    start = replace(config, init="sampled_vocabulary", init_text=None)
    method = build_method(start, model, seed=0, num_classes=num_classes)
    method.config = config
    rng_state = tensors.pop(RNG_STATE, None)
    expected = {name: tuple(tensor.shape) for name, tensor in method.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found or rng_state is None:
        raise _refusal(f"holds the tensors {found}, needed {expected} and {RNG_STATE}")
    method.load_state_dict(tensors)
    try:
        method.set_rng_state(rng_state)
    except (RuntimeError, TypeError) as error:
        raise _refusal(f"has an unusable {RNG_STATE} ({error})") from None
    return method


def _read(content: bytes) -> tuple[dict[str, torch.Tensor], MethodConfig]:
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise _refusal(f"is not a safetensors file ({error})") from None
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    try:
        return tensors, parse_method(json.loads(header["__metadata__"][METADATA_KEY]))
    except (KeyError, ValueError, RecursionError, InvalidRequestError) as error:
        raise _refusal(f"has no usable {METADATA_KEY} in its metadata ({error})") from None


def _fixed(config: MethodConfig) -> dict[str, object]:
    """Return the settings that decide what the parameters mean."""
    settings = {"method": config.name, **asdict(config)}
    return {name: value for name, value in settings.items() if name not in FREE_SETTINGS}


def _refusal(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"resume_from {reason}", param="resume_from")
