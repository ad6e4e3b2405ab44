"""Identity is content: what changes what is served changes the version, nothing else does."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch
from promptd_store import Manifest, PromptKind, TensorInfo, decode, encode, to_native
from promptd_store.peft_config import flatten_prefix

from tests.store.files import SPEC, bare_file, prefix, soft


def test_version_is_the_documented_digest() -> None:
    """The version is the sha256 of the canonical JSON of the documented fields, computed here by hand."""
    artifact = encode(
        "soft", soft(), base_fingerprint=SPEC.fingerprint, template="{text}!", label_words={"b": "x", "a": "y"}
    )
    identity = {
        "base_fingerprint": SPEC.fingerprint,
        "kind": "soft",
        "label_words": [["b", "x"], ["a", "y"]],
        "position_convention": "shifted",
        "template": "{text}!",
        "tensors": [
            {
                "dtype": "F32",
                "name": "prompt_embeddings",
                "sha256": hashlib.sha256(soft().numpy().tobytes()).hexdigest(),
                "shape": [5, 48],
            }
        ],
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    assert artifact.version == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"template": "{text} "},
        {"base_fingerprint": SPEC.fingerprint},
        {"label_words": {"a": " x", "b": " y"}},
        {"label_words": {"b": " y", "a": " x"}},
        {"position_convention": "unshifted"},
        {"add_special_tokens": True},
        {"prompt_after_bos": True},
        {"truncation_side": "left"},
        {"default_sampling": {"temperature": 0.5}},
        {"stop": ("\n",)},
    ],
)
def test_what_changes_the_answer_changes_the_version(change: dict[str, Any]) -> None:
    """Every field that can change a served text is part of the identity."""
    changed = encode("soft", soft(), **change)
    assert changed.version != encode("soft", soft()).version
    assert changed.version == encode("soft", soft(), **change).version


def test_all_variants_differ() -> None:
    """Other bits, dtype, shape, kind or text give another version; label words count in their order."""
    versions = {
        encode("soft", soft(seed=1)).version,
        encode("soft", soft(seed=2)).version,
        encode("soft", soft(seed=1).bfloat16()).version,
        encode("soft", soft(seed=1)[:4]).version,
        encode("prefix", prefix()).version,
        encode("text", text="a").version,
        encode("text", text="b").version,
        encode("soft", soft(), label_words={"a": "x", "b": "y"}).version,
        encode("soft", soft(), label_words={"b": "y", "a": "x"}).version,
    }
    assert len(versions) == 9


def test_signed_zero_is_another_prompt() -> None:
    """Identity is of bytes, not of values: -0.0 and 0.0 differ."""
    plus, minus = soft(), soft()
    plus[0, 0], minus[0, 0] = 0.0, -0.0
    assert torch.equal(plus, minus)
    assert encode("soft", plus).version != encode("soft", minus).version


def test_container_does_not_count() -> None:
    """A native file, a bare one, PEFT's flat layout and other metadata of the same tensors are one version."""
    native = encode("prefix", prefix())
    for content in (
        native.content,
        bare_file(prefix(), name="prefix"),
        bare_file(flatten_prefix(prefix())),
        bare_file(flatten_prefix(prefix()), {"note": "saved yesterday by eve"}),
    ):
        read = decode(content, SPEC)
        assert read.version == native.version
        assert to_native(read) == native.content


def test_architecture_is_a_remark() -> None:
    """base_architecture explains the fingerprint; it is not part of the identity."""
    assert encode("soft", soft(), base_architecture="LlamaForCausalLM").version == encode("soft", soft()).version


def test_manifest_json_round_trip() -> None:
    """A manifest survives its own JSON, with label words in their order."""
    manifest = Manifest(
        kind=PromptKind.SOFT,
        num_virtual_tokens=3,
        tensors=(TensorInfo("prompt_embeddings", "F16", (3, 48), "0" * 64),),
        stop=("a",),
        label_words={"z": "1", "a": "2"},
        default_sampling={"temperature": 0.5, "seed": 3},
    )
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest and again.version() == manifest.version()
    assert list(again.label_words or {}) == ["z", "a"]
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest


def test_encode_is_deterministic() -> None:
    """The same input gives the same bytes."""
    assert (
        encode("prefix", prefix(), template="{a}{b}").content == encode("prefix", prefix(), template="{a}{b}").content
    )
