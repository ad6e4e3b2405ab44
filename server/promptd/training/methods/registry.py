"""Every method by name, and a method's settings as JSON: OpenAI's `method` of a fine-tuning job.

{"type": "residual", "residual": {"hyperparameters": {"bottleneck_size": 64}}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from promptd_store.strict_json import shown

from promptd.errors import InvalidRequestError
from promptd.training.checks import from_json
from promptd.training.methods.base import PromptMethod
from promptd.training.methods.config import MethodConfig
from promptd.training.methods.low_rank import LowRankPrompt
from promptd.training.methods.p_tuning_v2 import PTuningV2
from promptd.training.methods.prefix_tuning import PrefixTuning
from promptd.training.methods.prompt_tuning import PromptTuning
from promptd.training.methods.residual import ResidualPromptTuning
from promptd.training.methods.superpos import SuperPosPrompt
from promptd.training.methods.ulpt import UltraLowPromptTuning

METHODS: Mapping[str, type[PromptMethod]] = {
    method.config_class.name: method
    for method in (
        ResidualPromptTuning,
        PromptTuning,
        PrefixTuning,
        PTuningV2,
        LowRankPrompt,
        UltraLowPromptTuning,
        SuperPosPrompt,
    )
}
"""Name -> method; the first is the default."""


def parse_method(value: object) -> MethodConfig:
    """Return the checked settings that a request's `method` asks for; None is residual prompt tuning with defaults.

    Raises `InvalidRequestError` for an unknown method or hyper-parameter, a wrong type or a number out of range:
    `param` is the field's whole path, the message has its value and what is known or allowed.
    """
    name, values = method_values(value)
    return from_json(METHODS[name].config_class, values, f"method.{name}.hyperparameters")


def method_values(value: object) -> tuple[str, dict[str, Any]]:
    """Return a known method's name and its hyper-parameters, not yet checked, from a request's `method`."""
    if value is None:
        return next(iter(METHODS)), {}
    method = _object(value, "method")
    name = method.get("type")
    if not isinstance(name, str) or name not in METHODS:
        raise InvalidRequestError(
            f"method.type must be one of {', '.join(METHODS)}, got {shown(name)}", param="method.type"
        )
    own = _only(method, "method", "type", name).get(name)
    inner = _object({} if own is None else own, f"method.{name}")
    path = f"method.{name}.hyperparameters"
    values = _only(inner, f"method.{name}", "hyperparameters").get("hyperparameters")
    return name, _object({} if values is None else values, path)


def method_json(config: MethodConfig) -> dict[str, Any]:
    """Return the `method` whose `parse_method` is this config, every field written out, as plain JSON values."""
    return {"type": config.name, config.name: {"hyperparameters": asdict(config)}}


def _object(value: object, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{path} must be an object, got {shown(value)}", param=path)
    return value


def _only(value: dict[str, Any], path: str, *known: str) -> dict[str, Any]:
    """Return the object if it has no other fields."""
    for field, given in value.items():
        if field not in known:
            message = f"{path}.{field} is not known (got {shown(given)}); known: {', '.join(known)}"
            raise InvalidRequestError(message, param=f"{path}.{field}")
    return value
