"""Which method a job uses and from where it starts; turned into trainable parameters by `build_method`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from promptd.errors import InvalidRequestError
from promptd.modeling import FrozenModel
from promptd.training.forward import prompt_key_values
from promptd.training.methods.base import PromptMethod
from promptd.training.methods.inits import class_labels, embedding_std, from_text, random_uniform, sampled_vocabulary
from promptd.training.methods.prefix import NETWORK_SIZE, DirectPrefix, NetworkPrefix
from promptd.training.methods.prompt_tuning import PromptTuning
from promptd.training.methods.residual import ResidualPromptTuning

METHODS = ("residual", "prompt_tuning", "prefix")
INITS = ("sampled_vocabulary", "random_uniform", "class_labels", "text")
MAX_VIRTUAL_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class MethodConfig:
    """A method's name and shape. Checked on creation."""

    name: str = "residual"
    num_virtual_tokens: int = 10
    init: str = "sampled_vocabulary"
    init_text: str | None = None
    bottleneck_size: int | None = None
    """Width inside the residual network (None: min(800, hidden_size)) or the prefix network (None: 512)."""
    prefix_network: bool = False
    """True: prefix-tuning's tanh network; False: keys and values are the parameters."""

    def __post_init__(self) -> None:
        _require(self.name in METHODS, "method", self.name, f"one of {', '.join(METHODS)}")
        _require(self.init in INITS, "init", self.init, f"one of {', '.join(INITS)}")
        count = self.num_virtual_tokens
        _require(1 <= count <= MAX_VIRTUAL_TOKENS, "num_virtual_tokens", count, f"1 to {MAX_VIRTUAL_TOKENS}")
        size = self.bottleneck_size
        _require(size is None or size >= 1, "bottleneck_size", size, "a positive number")
        _require(bool(self.init_text) or self.init != "text", "init_text", self.init_text, "a text for init 'text'")


def build_method(
    config: MethodConfig, model: FrozenModel, *, seed: int, label_words: Mapping[str, str] | None = None
) -> PromptMethod:
    """Return trainable parameters that depend on nothing but the config, the model, the label words and the seed."""
    generator = torch.Generator().manual_seed(seed)
    initial = _initial(config, model, generator, label_words)
    std = embedding_std(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        method = _method(config, model, initial, std)
    return method.to(model.device)


def _method(config: MethodConfig, model: FrozenModel, initial: torch.Tensor, std: float) -> PromptMethod:
    if config.name == "prompt_tuning":
        return PromptTuning(initial, std)
    if config.name == "residual":
        return ResidualPromptTuning(initial, std, config.bottleneck_size)
    with torch.no_grad():
        key_values = prompt_key_values(model, initial)
    if config.prefix_network:
        return NetworkPrefix(key_values, model.spec.hidden_size, std, config.bottleneck_size or NETWORK_SIZE)
    return DirectPrefix(key_values, std)


def _initial(
    config: MethodConfig, model: FrozenModel, generator: torch.Generator, label_words: Mapping[str, str] | None
) -> torch.Tensor:
    count = config.num_virtual_tokens
    if config.init == "random_uniform":
        return random_uniform(model, count, generator)
    if config.init == "text":
        return from_text(model, config.init_text or "", count)
    if config.init == "class_labels":
        _require(bool(label_words), "init", config.init, "used with label words only")
        return class_labels(model, list((label_words or {}).values()), count, generator)
    return sampled_vocabulary(model, count, generator)


def _require(holds: bool, field: str, value: object, expected: str) -> None:
    if not holds:
        raise InvalidRequestError(f"{field} must be {expected}, got {value!r}", param=field)
