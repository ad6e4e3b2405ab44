"""The gate behind the header: shapes, base model, numbers, manifests; every refusal with its own code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from promptd_store import Bounds, decode, encode

from tests.store.files import SPEC, bare_file, entry, native_file, prefix, raw_file, refusal, soft

OTHER = "sha256:" + "b" * 64
MINIMAL = {"schema_version": 1, "kind": "soft", "num_virtual_tokens": 5}


def with_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """The tensor with one element changed."""
    changed = tensor.clone()
    changed.view(-1)[7] = value
    return changed


def manifest(**changes: Any) -> dict[str, Any]:
    """A hand-written manifest."""
    return {**MINIMAL, **changes}


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "wrong width": (lambda: bare_file(torch.randn(5, 47)), "shape_mismatch"),
    "one dimension": (lambda: bare_file(torch.randn(48)), "shape_mismatch"),
    "old PEFT width without grouped heads": (lambda: bare_file(torch.randn(5, 3 * 2 * 4 * 16)), "shape_mismatch"),
    "prefix of another depth": (lambda: bare_file(torch.randn(4, 2, 2, 4, 16), name="prefix"), "shape_mismatch"),
    "prefix of rank 2": (lambda: bare_file(torch.randn(4, 192), name="prefix"), "shape_mismatch"),
    "native prefix of another head_dim": (
        lambda: native_file(manifest(kind="prefix", num_virtual_tokens=4), torch.randn(3, 2, 2, 4, 8), name="prefix"),
        "shape_mismatch",
    ),
    "native with another count": (lambda: native_file(manifest(num_virtual_tokens=6), soft()), "shape_mismatch"),
    "native soft named prefix": (lambda: native_file(manifest(), soft(), name="prefix"), "tensor_name_not_allowed"),
    "two tensors without a manifest": (
        lambda: raw_file({"prompt_embeddings": entry([1, 48], 192), "prefix": entry([1], 4, begin=192)}, bytes(196)),
        "tensor_count_mismatch",
    ),
    "no tensor": (lambda: raw_file({}), "tensor_count_mismatch"),
    "too long": (lambda: bare_file(soft(128)), "num_virtual_tokens_out_of_range"),
    "wrong base": (lambda: encode("soft", soft(), base_fingerprint=OTHER).content, "base_mismatch"),
    "wrong architecture": (
        lambda: encode("soft", soft(), base_architecture="GPT2LMHeadModel").content,
        "base_mismatch",
    ),
    "NaN": (lambda: bare_file(with_value(soft(), float("nan"))), "non_finite"),
    "infinity": (lambda: bare_file(with_value(soft(), float("-inf"))), "non_finite"),
    "NaN in half precision": (lambda: bare_file(with_value(soft().bfloat16(), float("nan"))), "non_finite"),
    "NaN in a prefix": (lambda: bare_file(with_value(prefix(), float("nan")), name="prefix"), "non_finite"),
    "1e20": (lambda: bare_file(with_value(soft(), 1e20)), "magnitude_exceeded"),
    "-1e20": (lambda: bare_file(with_value(soft(), -1e20)), "magnitude_exceeded"),
    "201": (lambda: bare_file(with_value(soft(), 201.0)), "magnitude_exceeded"),
    "all zero": (lambda: bare_file(torch.zeros(5, 48)), "all_zero"),
    "manifest not JSON": (lambda: native_file("{", soft()), "manifest_invalid_json"),
    "manifest a list": (lambda: native_file("[]", soft()), "manifest_not_object"),
    "manifest key twice": (lambda: native_file('{"kind":"soft","kind":"prefix"}', soft()), "manifest_duplicate_key"),
    "manifest of the future": (lambda: native_file(manifest(schema_version=2), soft()), "manifest_invalid"),
    "manifest field unknown": (lambda: native_file(manifest(owner="eve"), soft()), "manifest_unknown_field"),
    "manifest without kind": (
        lambda: native_file({"schema_version": 1, "num_virtual_tokens": 5}, soft()),
        "manifest_invalid",
    ),
    "kind unknown": (lambda: native_file(manifest(kind="lora"), soft()), "manifest_invalid"),
    "kind unhashable": (lambda: native_file(manifest(kind=["soft"]), soft()), "manifest_invalid"),
    "count a float": (lambda: native_file(manifest(num_virtual_tokens=5.0), soft()), "manifest_invalid"),
    "count zero": (lambda: native_file(manifest(num_virtual_tokens=0), soft()), "num_virtual_tokens_out_of_range"),
    "fingerprint no digest": (lambda: native_file(manifest(base_fingerprint="mine"), soft()), "manifest_invalid"),
    "template with an attribute": (
        lambda: native_file(manifest(template="{text.__class__}"), soft()),
        "template_invalid",
    ),
    "template too large": (lambda: native_file(manifest(template="x" * 40_000), soft()), "template_too_large"),
    "sampling unknown": (lambda: native_file(manifest(default_sampling={"evil": 1}), soft()), "manifest_invalid"),
    "sampling out of range": (lambda: native_file(manifest(default_sampling={"top_p": 2}), soft()), "manifest_invalid"),
    "sampling not a number": (
        lambda: native_file(manifest(default_sampling={"seed": True}), soft()),
        "manifest_invalid",
    ),
    "stop empty": (lambda: native_file(manifest(stop=[""]), soft()), "manifest_invalid"),
    "five stops": (lambda: native_file(manifest(stop=list("abcde")), soft()), "manifest_invalid"),
    "label twice": (
        lambda: native_file(manifest(label_words=[["a", "x"], ["a", "y"]]), soft()),
        "manifest_duplicate_key",
    ),
    "labels empty": (lambda: native_file(manifest(label_words={}), soft()), "manifest_invalid"),
    "digests of other tensors": (
        lambda: native_file(json.loads(encode("soft", soft(seed=1)).manifest.to_json()), soft(seed=2)),
        "manifest_tensor_mismatch",
    ),
    "text with a tensor": (
        lambda: native_file(manifest(kind="text", text="hi", num_virtual_tokens=0), soft()),
        "tensor_name_not_allowed",
    ),
    "text in a soft prompt": (lambda: native_file(manifest(text="hi"), soft()), "manifest_invalid"),
    "text without a text": (
        lambda: native_file(manifest(kind="text", num_virtual_tokens=0), soft()),
        "manifest_invalid",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_code(name: str) -> None:
    """Each file that this base model cannot serve is refused with its own 4xx code and a readable message."""
    make, code = REFUSED[name]
    error = refusal(make())
    assert error.code == code
    assert error.status == (409 if code == "base_mismatch" else 422)
    assert 10 < len(error.message) < 600


def test_refusals_name_field_and_value() -> None:
    """The message and `param` say which field is wrong, what it is and what it should be."""
    error = refusal(bare_file(torch.randn(5, 47)))
    assert error.param == "prompt_embeddings"
    assert all(part in error.message for part in ("[5, 47]", "48", "192", "LlamaForCausalLM"))
    error = refusal(encode("soft", soft(), base_fingerprint=OTHER).content)
    assert error.param == "base_fingerprint" and OTHER in error.message and SPEC.fingerprint in error.message
    error = refusal(bare_file(with_value(soft(), 1e20)))
    assert "1e+20" in error.message and "200" in error.message


@pytest.mark.parametrize("value", [65_520.0, -1e30])
def test_overflow_after_the_cast(value: float) -> None:
    """A number that is finite on disk but not in the serving dtype is refused, though the bounds would allow it."""
    half = replace(SPEC, serving_dtype="float16", max_embedding_abs=1e35)
    assert refusal(bare_file(with_value(soft(), value)), half).code == "overflow_in_serving_dtype"
    decode(bare_file(with_value(soft(), 65_519.0)), half)
    decode(bare_file(with_value(soft(), value)), replace(half, serving_dtype="bfloat16"))


def test_prefix_bounds_are_per_layer() -> None:
    """Keys and values of each layer are held against that layer's own magnitudes."""
    for layer in range(3):
        for kv, largest in enumerate((SPEC.max_key_abs[layer], SPEC.max_value_abs[layer])):
            tensor = prefix()
            tensor[layer, kv, 1, 2, 3] = -19.9 * largest
            decode(bare_file(tensor, name="prefix"), SPEC)
            tensor[layer, kv, 1, 2, 3] = -20.1 * largest
            error = refusal(bare_file(tensor, name="prefix"))
            assert error.code == "magnitude_exceeded"
            assert f"layer {layer} {'values' if kv else 'keys'}" in error.message


def test_bounds_are_configurable() -> None:
    """Factors, size and the all-zero rule follow the Bounds given."""
    big = bare_file(with_value(soft(), 1e20))
    decode(big, SPEC, bounds=Bounds(soft_factor=1e20))
    decode(bare_file(torch.zeros(5, 48)), SPEC, bounds=Bounds(allow_all_zero=True))
    error = refusal(big, bounds=Bounds(max_bytes=100))
    assert (error.code, error.status) == ("artifact_too_large", 413)


@pytest.mark.parametrize("count", [1, 127])
def test_length_limits_are_inclusive(count: int) -> None:
    """1 to max_model_len - 1 virtual tokens are accepted."""
    assert decode(bare_file(soft(count)), SPEC).num_virtual_tokens == count
