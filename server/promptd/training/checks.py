"""Settings that check themselves: types and ranges stand in the annotations of a frozen dataclass.

@dataclass(frozen=True, slots=True)
class Config:
    num_steps: Count = 300
    dropout: Share = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from promptd_store.strict_json import shown

from promptd.errors import InvalidRequestError

MAX_SIZE = 16_384


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """What a number must be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Rule("a whole number of at least 1", lambda value: value >= 1)]
Size = Annotated[int, Rule(f"a whole number from 1 to {MAX_SIZE}", lambda value: 1 <= value <= MAX_SIZE)]
Natural = Annotated[int, Rule("a whole number from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)]
Positive = Annotated[float, Rule("a positive number", lambda value: value > 0)]
NonNegative = Annotated[float, Rule("a number of at least 0", lambda value: value >= 0)]
Share = Annotated[float, Rule("at least 0 and below 1", lambda value: 0 <= value < 1)]

_JSON_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}
_PLAIN = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a string"}

Config = TypeVar("Config")


def check_fields(config: Any) -> None:
    """Check every field of a dataclass against its annotation.

    Raises `InvalidRequestError` that names the field, what it must be, and its value; `param` is the field.
    """
    for field, hint in _hints(type(config)).items():
        value = getattr(config, field)
        expected = _unmet(value, hint)
        if expected is not None:
            raise InvalidRequestError(f"{field} must be {expected}, got {shown(value)}", param=field)


def from_json(config_class: type[Config], values: Mapping[str, Any], path: str) -> Config:
    """Create a self-checking config from JSON values.

    Raises `InvalidRequestError` whose `param` is `path.field`: for a name that the class does not have (the message
    lists those that it has) and for whatever the class refuses.
    """
    known = _hints(config_class)
    for field, value in values.items():
        if field not in known:
            message = f"{path}.{field} is not known (got {shown(value)}); known: {', '.join(known)}"
            raise InvalidRequestError(message, param=f"{path}.{field}")
    try:
        return config_class(**values)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{path}.{error.message}", param=f"{path}.{error.param}") from None


def describe_fields(config_class: type[Any], names: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return the fields of a self-checking dataclass by name: type, default and what is allowed, as plain JSON."""
    described = {}
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    for field, hint in _hints(config_class).items():
        if names is None or field in names:
            described[field] = {"default": defaults[field], **_described(hint)}
    return described


def _described(hint: Any) -> dict[str, Any]:
    if get_origin(hint) in (Union, UnionType):  # here always: something or None
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
        return {**_described(hint), "nullable": True}
    if get_origin(hint) is Literal:
        return {"type": "string", "choices": list(get_args(hint))}
    if get_origin(hint) is Annotated:
        hint, rule = get_args(hint)
        return {**_described(hint), "expected": rule.expected}
    return {"type": _JSON_TYPES[hint]}


def _hints(config_class: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(config_class, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def _unmet(value: object, hint: Any) -> str | None:
    """Return what the annotation asks for if the value is something else."""
    if get_origin(hint) in (Union, UnionType):  # here always: something or None
        if value is None:
            return None
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is Literal:
        return None if value in get_args(hint) else f"one of {', '.join(get_args(hint))}"
    rule = None
    if get_origin(hint) is Annotated:
        hint, rule = get_args(hint)
    if not _is_a(value, hint):
        return rule.expected if rule else _PLAIN.get(hint, f"a {hint.__name__}")
    return rule.expected if rule and not rule.holds(value) else None


def _is_a(value: object, wanted: type) -> bool:
    if wanted in (int, float) and isinstance(value, bool):
        return False
    if wanted is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max  # false for NaN, too
    return isinstance(value, wanted)
