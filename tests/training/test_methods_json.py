"""A method's settings: checked on creation, read from OpenAI's `method`, written back; refusals name their field."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from promptd.errors import InvalidRequestError
from promptd.training import METHODS, method_json, parse_method
from promptd.training.methods import LowRankConfig, MethodConfig, ResidualConfig, SuperPosConfig, UlptConfig

CONFIGS: tuple[MethodConfig, ...] = (
    *(method.config_class() for method in METHODS.values()),
    ResidualConfig(7, bottleneck_size=3, separate_networks=True, layer_norm=False, nonlinearity="gelu", dropout=0.1),
    UlptConfig(3, init="text", init_text="ein Text, ü", init_vocabulary=None, projection_seed=2**62),
)


def residual(**hyperparameters: object) -> dict[str, Any]:
    """A request's `method`."""
    return {"type": "residual", "residual": {"hyperparameters": hyperparameters}}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_json_and_back(config: MethodConfig) -> None:
    """Settings survive the way through JSON text, every field written out."""
    wire = json.loads(json.dumps(method_json(config), allow_nan=False))
    assert parse_method(wire) == config and type(parse_method(wire)) is type(config)
    assert wire[config.name]["hyperparameters"].keys() == {field.name for field in dataclasses.fields(config)}


def test_names_are_the_methods_own() -> None:
    """The registry's names, the configs' names and the JSON's agree; what is shared by two methods has one class."""
    assert list(METHODS) == [method.config_class.name for method in METHODS.values()]
    assert len({method.config_class for method in METHODS.values()}) == len(METHODS) == 7


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"type": "residual"},
        {"type": "residual", "residual": None},
        {"type": "residual", "residual": {}},
        {"type": "residual", "residual": {"hyperparameters": None}},
        residual(),
    ],
)
def test_nothing_said_is_residual_with_defaults(value: object) -> None:
    """A job that names no method, or no settings, gets residual prompt tuning as it comes."""
    assert parse_method(value) == ResidualConfig()


def test_whole_numbers_are_numbers() -> None:
    """JSON writes 1.0 as 1."""
    assert parse_method(residual(learning_rate=1)) == ResidualConfig(learning_rate=1.0)


@pytest.mark.parametrize(
    ("value", "param", "said"),
    [
        ({"type": "lora"}, "method.type", ["'lora'", "residual, prompt_tuning"]),
        ({"type": ["residual"]}, "method.type", ["['residual']"]),
        ({}, "method.type", ["None"]),
        ("residual", "method", ["an object", "'residual'"]),
        ({"type": "residual", "ulpt": {}}, "method.ulpt", ["{}", "type, residual"]),
        ({"type": "residual", "residual": 3}, "method.residual", ["an object", "3"]),
        (
            {"type": "residual", "residual": {"bottleneck_size": 3}},
            "method.residual.bottleneck_size",
            ["hyperparameters"],
        ),
        ({"type": "residual", "residual": {"hyperparameters": []}}, "method.residual.hyperparameters", ["an object"]),
        (residual(rank=3), "rank", ["3", "known: num_virtual_tokens", "bottleneck_size"]),
        (residual(name="ulpt"), "name", ["known"]),
        (residual(bottleneck_size=0), "bottleneck_size", ["1 to 16384", "0"]),
        (residual(bottleneck_size=10**9), "bottleneck_size", ["1 to 16384", "1000000000"]),
        (residual(bottleneck_size=8.0), "bottleneck_size", ["8.0"]),
        (residual(bottleneck_size="8"), "bottleneck_size", ["'8'"]),
        (residual(num_virtual_tokens=True), "num_virtual_tokens", ["1 to 4096", "True"]),
        (residual(num_virtual_tokens=None), "num_virtual_tokens", ["None"]),
        (residual(num_virtual_tokens=4097), "num_virtual_tokens", ["4097"]),
        (residual(separate_networks=1), "separate_networks", ["true or false", "1"]),
        (residual(nonlinearity="swish"), "nonlinearity", ["relu, tanh, gelu, sigmoid", "'swish'"]),
        (residual(nonlinearity=["relu"]), "nonlinearity", ["['relu']"]),
        (residual(dropout=1), "dropout", ["at least 0 and below 1", "1"]),
        (residual(dropout=-0.1), "dropout", ["-0.1"]),
        (residual(learning_rate=0), "learning_rate", ["a positive number", "0"]),
        (residual(learning_rate=math.inf), "learning_rate", ["a positive number", "inf"]),
        (residual(learning_rate=math.nan), "learning_rate", ["a positive number", "nan"]),
        (residual(learning_rate=10**400), "learning_rate", ["a positive number"]),
        (residual(learning_rate="auto"), "learning_rate", ["'auto'"]),
        (residual(network_learning_rate=-1.0), "network_learning_rate", ["-1.0"]),
        (residual(init="zeros"), "init", ["sampled_vocabulary, random_uniform, class_labels, text", "'zeros'"]),
        (residual(init="text"), "init_text", ["None"]),
        (residual(init="text", init_text=""), "init_text", ["''"]),
        (residual(init="text", init_text=3), "init_text", ["a string", "3"]),
        (residual(init_text="words"), "init_text", ["'words'", "'sampled_vocabulary'"]),
        (residual(init_vocabulary=0), "init_vocabulary", ["at least 1", "0"]),
    ],
)
def test_refusals_name_the_field_and_the_value(value: object, param: str, said: list[str]) -> None:
    """`param` is the field's whole path, the message has it, the value, and what is known or allowed."""
    with pytest.raises(InvalidRequestError) as caught:
        parse_method(value)
    path = param if param.startswith("method") else f"method.residual.hyperparameters.{param}"
    assert caught.value.param == path and caught.value.message.startswith(path)
    assert all(part in caught.value.message for part in said), caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("config_class", "settings", "param"),
    [
        (LowRankConfig, {"num_virtual_tokens": 5, "rank": 6}, "rank"),
        (SuperPosConfig, {"num_virtual_tokens": 5, "num_rows": 4}, "num_rows"),
        (UlptConfig, {"projection_seed": -1}, "projection_seed"),
        (UlptConfig, {"projection_seed": 2**63}, "projection_seed"),
        (UlptConfig, {"num_dims": 0}, "num_dims"),
    ],
)
def test_settings_must_fit_each_other(config_class: type[MethodConfig], settings: dict[str, Any], param: str) -> None:
    """A rank above the number of virtual tokens is none; created in Python, the path is the field alone."""
    with pytest.raises(InvalidRequestError) as caught:
        config_class(**settings)
    assert caught.value.param == param and caught.value.message.startswith(param)
    assert str(settings[param]) in caught.value.message


def test_settings_do_not_change() -> None:
    """A config that was checked stays what it is."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        ResidualConfig().dropout = 0.5  # type: ignore[misc]
