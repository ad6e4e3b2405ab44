"""What a learned prompt says about itself: the JSON under the safetensors metadata key `promptd`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Literal, cast

from promptd_store.errors import ArtifactError, TemplateError
from promptd_store.strict_json import canonical_json, parse_object, shown
from promptd_store.template import template_fields

SCHEMA_VERSION = 1
MAX_STOP_STRINGS = 4

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SAMPLING: Mapping[str, tuple[type, float, float]] = {
    "max_tokens": (int, 0, 1 << 20),
    "min_tokens": (int, 0, 1 << 20),
    "temperature": (float, 0.0, 100.0),
    "top_p": (float, 1e-9, 1.0),
    "top_k": (int, 0, 1 << 31),
    "min_p": (float, 0.0, 1.0),
    "presence_penalty": (float, -2.0, 2.0),
    "frequency_penalty": (float, -2.0, 2.0),
    "repetition_penalty": (float, 0.01, 100.0),
    "seed": (int, -(1 << 63), (1 << 63) - 1),
}
"""The sampling parameters that a prompt may preset, and their ranges (those of the engine's SamplingParams)."""


class PromptKind(StrEnum):
    """What was learned: input embeddings, K/V of every layer, or just a text."""

    SOFT = "soft"
    PREFIX = "prefix"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor in its canonical layout; `dtype` in safetensors' words (F32, F16, BF16)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about a prompt that is not a tensor. Checked on creation; unknown fields are refused."""

    kind: PromptKind
    num_virtual_tokens: int
    base_fingerprint: str | None = None
    base_architecture: str | None = None
    tensors: tuple[TensorInfo, ...] = ()
    position_convention: Literal["shifted", "unshifted"] = "shifted"
    """shifted: the text starts at position num_virtual_tokens; unshifted: at 0."""
    template: str | None = None
    add_special_tokens: bool | None = None
    prompt_after_bos: bool = False
    truncation_side: Literal["left", "right"] = "right"
    default_sampling: Mapping[str, float | int] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    label_words: Mapping[str, str] | None = None
    """label -> the continuation that is scored for it; the order is kept and part of the identity."""
    labels: tuple[str, ...] | None = None
    """Names of the classes of the head that comes with the prompt, in the order of its rows."""
    text: str | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name, ok, wanted in _RULES:
            value = getattr(self, name)
            if not ok(value):
                raise ArtifactError(
                    "manifest_invalid", f"manifest field {name} must be {wanted}, got {shown(value)}", name
                )
        is_text = self.kind is PromptKind.TEXT
        if is_text != (self.text is not None) or (is_text and self.num_virtual_tokens != 0):
            raise ArtifactError(
                "manifest_invalid",
                f"kind {self.kind} with num_virtual_tokens {self.num_virtual_tokens} and text {shown(self.text)}: "
                "a text prompt has a text and 0 virtual tokens, the others have no text and at least 1",
                "text",
            )
        if not is_text and self.num_virtual_tokens < 1:
            raise ArtifactError(
                "num_virtual_tokens_out_of_range",
                f"num_virtual_tokens must be at least 1, got {self.num_virtual_tokens}",
                "num_virtual_tokens",
            )
        if self.template is not None:
            try:
                template_fields(self.template)
            except TemplateError as error:
                raise ArtifactError(error.code, error.message, "template") from None

    def to_json(self) -> str:
        """Return the manifest as one JSON text with sorted fields; label words keep their order."""
        plain = asdict(self)
        plain["tensors"] = [asdict(info) for info in self.tensors]
        if self.label_words is not None:
            plain["label_words"] = [[label, words] for label, words in self.label_words.items()]
        return canonical_json(plain)

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as plain JSON values, as the API shows it (label words as an object)."""
        plain = asdict(self)
        plain["kind"] = str(self.kind)
        plain["tensors"] = [{**asdict(info), "shape": list(info.shape)} for info in self.tensors]
        plain["stop"] = list(self.stop)
        plain["default_sampling"] = dict(self.default_sampling)
        plain["label_words"] = None if self.label_words is None else dict(self.label_words)
        plain["labels"] = None if self.labels is None else list(self.labels)
        return plain

    @classmethod
    def from_json(cls, data: str | bytes) -> Manifest:
        """Read a manifest from an untrusted text."""
        return cls.from_dict(parse_object(data.encode() if isinstance(data, str) else data, "manifest"))

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Manifest:
        """Read a manifest from plain JSON values."""
        known = {entry.name for entry in fields(cls)}
        for name in plain:
            if name not in known:
                raise ArtifactError(
                    "manifest_unknown_field", f"manifest has the unknown field {shown(name)}", "promptd"
                )
        for name in ("kind", "num_virtual_tokens", "schema_version"):
            if name not in plain:
                raise ArtifactError("manifest_invalid", f"manifest lacks the field {name}", name)
        values = dict(plain)
        if values["kind"] not in tuple(PromptKind):
            raise ArtifactError(
                "manifest_invalid", f"kind must be soft, prefix or text, got {shown(values['kind'])}", "kind"
            )
        values["kind"] = PromptKind(values["kind"])
        values["tensors"] = tuple(_tensor_info(entry) for entry in _listed(values, "tensors"))
        values["stop"] = tuple(_listed(values, "stop"))
        if values.get("labels") is not None:
            values["labels"] = tuple(_listed(values, "labels"))
        if isinstance(values.get("label_words"), list):
            values["label_words"] = _pairs(values["label_words"])
        return cls(**values)

    def version(self) -> str:
        """Return `sha256:…`: the identity of what is served, whoever owns it and whenever it was made.

        Fields that shape the served text beyond the basic list join the identity only where they are not the
        default, so that a plain prompt's version depends on the basic list alone.
        """
        identity: dict[str, Any] = {
            "kind": str(self.kind),
            "tensors": [asdict(info) for info in sorted(self.tensors, key=lambda info: info.name)],
            "position_convention": self.position_convention,
            "template": self.template,
            "label_words": None if self.label_words is None else [list(pair) for pair in self.label_words.items()],
            "base_fingerprint": self.base_fingerprint,
        }
        for name, default in _IDENTITY_DEFAULTS.items():
            value = getattr(self, name)
            if value != default:
                identity[name] = value
        return "sha256:" + hashlib.sha256(canonical_json(identity).encode()).hexdigest()


_IDENTITY_DEFAULTS: Mapping[str, Any] = {
    "add_special_tokens": None,
    "prompt_after_bos": False,
    "truncation_side": "right",
    "default_sampling": {},
    "stop": (),
    "labels": None,
    "text": None,
}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_sampling(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    for name, number in value.items():
        if name not in _SAMPLING:
            return False
        kind, low, high = _SAMPLING[name]
        if type(number) not in ((int,) if kind is int else (int, float)) or not low <= number <= high:
            return False
    return True


def _is_label_words(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, Mapping) and len(value) > 0 and all(_is_text(x) for pair in value.items() for x in pair)


def _is_labels(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, tuple) and len(value) > 1 and all(map(_is_text, value)) and len(set(value)) == len(value)


def _is_stop(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= MAX_STOP_STRINGS and all(_is_text(text) for text in value)


_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("schema_version", lambda v: type(v) is int and v == SCHEMA_VERSION, f"{SCHEMA_VERSION}"),
    ("kind", lambda v: isinstance(v, PromptKind), "soft, prefix or text"),
    ("num_virtual_tokens", _is_count, "a non-negative integer"),
    ("base_fingerprint", lambda v: v is None or (isinstance(v, str) and bool(_DIGEST.fullmatch(v))), "sha256:<hex>"),
    ("base_architecture", lambda v: v is None or _is_text(v), "a class name or null"),
    ("tensors", lambda v: isinstance(v, tuple) and all(isinstance(x, TensorInfo) for x in v), "a list of tensors"),
    ("position_convention", lambda v: v in ("shifted", "unshifted"), "shifted or unshifted"),
    ("template", lambda v: v is None or isinstance(v, str), "a string or null"),
    ("add_special_tokens", lambda v: v is None or isinstance(v, bool), "true, false or null"),
    ("prompt_after_bos", lambda v: isinstance(v, bool), "true or false"),
    ("truncation_side", lambda v: v in ("left", "right"), "left or right"),
    ("default_sampling", _is_sampling, f"an object of numbers in range, of {sorted(_SAMPLING)}"),
    ("stop", _is_stop, f"at most {MAX_STOP_STRINGS} non-empty strings"),
    ("label_words", _is_label_words, "a non-empty object of label -> non-empty text, or null"),
    ("labels", _is_labels, "at least two different non-empty strings, or null"),
    ("text", lambda v: v is None or _is_text(v), "a non-empty string or null"),
)


def _listed(values: Mapping[str, Any], name: str) -> list[Any]:
    value = values.get(name, [])
    if not isinstance(value, list):
        raise ArtifactError("manifest_invalid", f"manifest field {name} must be a list, got {shown(value)}", name)
    return value


def _pairs(entries: list[Any]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) == 2 and all(_is_text(text) for text in entry)):
            raise ArtifactError("manifest_invalid", f"label_words has the entry {shown(entry)}", "label_words")
        if entry[0] in pairs:
            raise ArtifactError("manifest_duplicate_key", f"label_words has {shown(entry[0])} twice", "label_words")
        pairs[entry[0]] = entry[1]
    return pairs


def _tensor_info(entry: Any) -> TensorInfo:
    if isinstance(entry, dict) and entry.keys() == {"name", "dtype", "shape", "sha256"}:
        shape, texts = entry["shape"], (entry["name"], entry["dtype"], entry["sha256"])
        if isinstance(shape, list) and all(_is_count(n) for n in shape) and all(_is_text(text) for text in texts):
            return TensorInfo(*cast(tuple[str, str], texts[:2]), tuple(shape), texts[2])
    raise ArtifactError("manifest_invalid", f"manifest field tensors has the entry {shown(entry)}", "tensors")
