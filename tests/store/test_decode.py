"""The gate behind the header: shapes, base model, numbers, manifests; every refusal with its own code."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from promptd_store import ArtifactError, BaseModelSpec, Bounds, PromptKind, decode, encode
from promptd_store.peft_config import flatten_prefix

from tests.store.files import SPEC, bare_file, entry, native_file, prefix, raw_file, soft

OTHER = "sha256:" + "b" * 64
MINIMAL = {"schema_version": 1, "kind": "soft", "num_virtual_tokens": 5}
AMBIGUOUS = replace(SPEC, hidden_size=SPEC.prefix_width)


def with_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """The tensor with one element changed."""
    changed = tensor.clone()
    changed.view(-1)[7] = value
    return changed


def manifest(**changes: Any) -> dict[str, Any]:
    """A hand-written manifest."""
    return {**MINIMAL, **changes}


def refusal(content: bytes, spec: BaseModelSpec = SPEC, **wishes: Any) -> ArtifactError:
    """The error that decoding raises."""
    with pytest.raises(ArtifactError) as caught:
        decode(content, spec, **wishes)
    assert 400 <= caught.value.status < 500
    return caught.value


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_native_round_trip(dtype: torch.dtype) -> None:
    """What encode writes, decode reads: manifest, tensors bit by bit, version, bytes."""
    for kind, tensor in (("soft", soft().to(dtype)), ("prefix", prefix().to(dtype))):
        made = encode(
            kind,
            tensor,
            base_fingerprint=SPEC.fingerprint,
            base_architecture=SPEC.architecture,
            template="Review: {text}\nIt is",
            add_special_tokens=False,
            prompt_after_bos=True,
            truncation_side="left",
            default_sampling={"temperature": 0, "max_tokens": 3},
            stop=("\n", "é"),
            label_words={"pos": " good", "neg": " bad"},
        )
        read = decode(made.content, SPEC)
        assert read.manifest == made.manifest and read.version == made.version and read.content == made.content
        assert list(read.manifest.label_words or {}) == ["pos", "neg"]
        assert read.verified and read.is_native and read.kind is PromptKind(kind)
        (name,) = read.tensors
        assert read.tensors[name].dtype is dtype and torch.equal(read.tensors[name], tensor)


def test_text_prompt_round_trip() -> None:
    """A text prompt has a text, no tensors, and fits every base model."""
    made = encode("text", text="Answer briefly. Ω", template="{text}")
    read = decode(made.content, SPEC)
    assert (read.kind, read.manifest.text, dict(read.tensors)) == (PromptKind.TEXT, "Answer briefly. Ω", {})
    assert read.version == made.version and read.num_virtual_tokens == 0


def test_bare_kinds_follow_from_the_shape() -> None:
    """A bare tensor is soft or prefix by its width; the flat prefix gets PEFT's column order."""
    assert decode(bare_file(soft()), SPEC).kind is PromptKind.SOFT
    canonical = prefix()
    flat = flatten_prefix(canonical)
    for layer, kv, head, row, dim in ((0, 0, 0, 0, 0), (2, 1, 1, 3, 15), (1, 0, 1, 2, 7)):
        assert flat[row, ((2 * layer + kv) * 2 + head) * 16 + dim] == canonical[layer, kv, head, row, dim]
    read = decode(bare_file(flat), SPEC)
    assert read.kind is PromptKind.PREFIX and torch.equal(read.tensors["prefix"], canonical)
    assert not read.verified and not read.is_native
    assert read.version == decode(bare_file(canonical, name="prefix"), SPEC).version


def test_ambiguity_needs_a_decision() -> None:
    """Where the width fits both kinds, nothing is guessed: kind or adapter_config decide, else a typed error."""
    content = bare_file(torch.randn(4, AMBIGUOUS.hidden_size))
    assert refusal(content, AMBIGUOUS).code == "ambiguous_kind"
    assert refusal(content, AMBIGUOUS, num_virtual_tokens=4).code == "ambiguous_kind"
    assert decode(content, AMBIGUOUS, kind="soft").kind is PromptKind.SOFT
    assert decode(content, AMBIGUOUS, kind="prefix").kind is PromptKind.PREFIX
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}
    assert decode(content, AMBIGUOUS, adapter_config=config).kind is PromptKind.PREFIX
    in_metadata = bare_file(torch.randn(4, AMBIGUOUS.hidden_size), {"adapter_config": json.dumps(config)})
    assert decode(in_metadata, AMBIGUOUS).kind is PromptKind.PREFIX


@pytest.mark.parametrize(
    ("wishes", "code"),
    [
        ({"kind": "prefix"}, "shape_mismatch"),
        ({"kind": "text"}, "kind_mismatch"),
        ({"kind": "lora"}, "kind_invalid"),
        ({"num_virtual_tokens": 4}, "num_virtual_tokens_mismatch"),
        ({"adapter_config": {"peft_type": "LORA"}}, "peft_type_not_supported"),
        ({"adapter_config": {"peft_type": "MULTITASK_PROMPT_TUNING"}}, "peft_type_not_supported"),
        ({"adapter_config": {}}, "peft_type_not_supported"),
        ({"adapter_config": {"peft_type": ["PROMPT_TUNING"]}}, "peft_type_not_supported"),
        ({"adapter_config": b"{"}, "adapter_config_invalid_json"),
        ({"adapter_config": b'{"a":1,"a":2}'}, "adapter_config_duplicate_key"),
        ({"adapter_config": b"{" + b" " * (16 << 10) + b"}"}, "adapter_config_too_large"),
        ({"adapter_config": {"peft_type": {1, 2}}}, "adapter_config_invalid_json"),
        ({"adapter_config": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 6}}, "num_virtual_tokens_mismatch"),
        ({"adapter_config": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": "5"}}, "adapter_config_invalid"),
        ({"adapter_config": {"peft_type": "PROMPT_TUNING", "token_dim": 64}}, "shape_mismatch"),
        ({"adapter_config": {"peft_type": "PREFIX_TUNING", "num_attention_heads": 4}}, "shape_mismatch"),
        ({"adapter_config": {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_2_SEQ_LM"}}, "peft_layout_not_supported"),
        ({"adapter_config": {"peft_type": "P_TUNING", "num_virtual_tokens": 5}, "kind": "prefix"}, "kind_mismatch"),
        (
            {"adapter_config": {"peft_type": "P_TUNING", "num_virtual_tokens": 5}, "num_virtual_tokens": 4},
            "num_virtual_tokens_mismatch",
        ),
    ],
)
def test_wishes_must_agree_with_the_file(wishes: dict[str, Any], code: str) -> None:
    """kind, num_virtual_tokens and adapter_config are checked against the file and each other."""
    assert refusal(bare_file(soft()), **wishes).code == code


def test_wishes_must_agree_with_a_manifest() -> None:
    """A native file's manifest cannot be overruled."""
    content = encode("soft", soft()).content
    assert refusal(content, kind="prefix").code == "kind_mismatch"
    assert refusal(content, num_virtual_tokens=4).code == "num_virtual_tokens_mismatch"
    assert refusal(bare_file(prefix(), name="prefix"), kind="soft").code == "kind_mismatch"


@pytest.mark.parametrize(
    ("kind", "tensors", "code"),
    [
        ("soft", None, "tensor_name_not_allowed"),
        ("soft", {"prefix": soft()}, "tensor_name_not_allowed"),
        ("text", soft(), "manifest_invalid"),
        ("soft", torch.randn(5, 6, 7), "shape_invalid"),
        ("soft", soft().double(), "shape_invalid"),
        ("nope", soft(), "kind_invalid"),
    ],
)
def test_encode_refuses_what_decode_would(kind: str, tensors: Any, code: str) -> None:
    """An artifact that could not be uploaded cannot be made."""
    with pytest.raises(ArtifactError) as caught:
        encode(kind, tensors)
    assert caught.value.code == code


def test_encode_refuses_an_oversized_manifest() -> None:
    """Label words that do not fit a header are refused when the artifact is made, not when it is uploaded."""
    with pytest.raises(ArtifactError) as caught:
        encode("soft", soft(), label_words={f"label {i}": "w" * 90 for i in range(700)})
    assert caught.value.code == "header_too_large"


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_mutated_files_raise_nothing_else(data: st.DataObject) -> None:
    """A good native file with some bytes replaced, cut or doubled is decoded or refused, never anything else."""
    content = bytearray(encode("soft", soft(2), template="{text}").content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    with contextlib.suppress(ArtifactError):
        assert decode(bytes(content), SPEC).num_virtual_tokens in (1, 2)
