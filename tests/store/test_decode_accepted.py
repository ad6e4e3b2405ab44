"""What the gate lets through and how it is read: native, bare and PEFT files, and who decides when several fit."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from promptd_store import ArtifactError, PromptKind, decode, encode
from promptd_store.peft_config import flatten_prefix

from tests.store.files import SPEC, bare_file, prefix, refusal, soft

AMBIGUOUS = replace(SPEC, hidden_size=SPEC.prefix_width)


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
