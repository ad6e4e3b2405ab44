"""Soft prompts for the source and the target of a sequence-to-sequence model: read back, told apart, refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from promptd_store import ArtifactError, Bounds, decode, encode, to_peft
from safetensors.torch import save

from tests.store.files import SPEC, bare_file, soft

PAIR = replace(SPEC, architecture="T5ForConditionalGeneration", num_encoder_layers=3, max_key_abs=(), max_value_abs=())
BOTH = {"prompt_embeddings": soft(5), "target_embeddings": soft(3, seed=1)}


def refusal(content: bytes, spec: object = PAIR) -> ArtifactError:
    """The error that a file gets."""
    with pytest.raises(ArtifactError) as caught:
        decode(content, spec)  # type: ignore[arg-type]
    return caught.value


def test_both_sides_are_read_back_and_identify() -> None:
    """The virtual tokens counted are the source's; other numbers for the target are another version."""
    artifact = encode("soft", BOTH)
    found = decode(artifact.content, PAIR)
    assert found.version == artifact.version and found.num_virtual_tokens == 5
    assert found.target_embeddings is not None
    assert torch.equal(found.target_embeddings, BOTH["target_embeddings"])
    assert torch.equal(found.learned, BOTH["prompt_embeddings"])
    alone = encode("soft", BOTH["prompt_embeddings"])
    other = encode("soft", {**BOTH, "target_embeddings": soft(3, seed=2)})
    assert len({artifact.version, alone.version, other.version}) == 3
    assert alone.target_embeddings is None
    with pytest.raises(ArtifactError, match="in front of the decoder's input") as caught:
        to_peft(artifact, spec=PAIR)
    assert caught.value.code == "not_exportable"


def test_what_cannot_be_served_is_refused() -> None:
    """Without a target, of another width, too long, too large, not finite, without a source's part or a manifest, and
    beside a prefix: a typed error that names the tensor."""
    content = encode("soft", BOTH).content
    assert refusal(content, SPEC).code == "tensor_name_not_allowed"
    for target, code in (
        (torch.randn(3, 47), "shape_mismatch"),
        (soft(128), "num_virtual_tokens_out_of_range"),
        (soft(3) * 1e4, "magnitude_exceeded"),
        (soft(3) / 0, "non_finite"),
    ):
        error = refusal(encode("soft", {**BOTH, "target_embeddings": target}).content)
        assert (error.code, "target_embeddings" in error.message) == (code, True)
    decode(encode("soft", {**BOTH, "target_embeddings": soft(3) * 1e4}).content, PAIR, bounds=Bounds(soft_factor=1e9))
    assert refusal(bare_file(soft(3), name="target_embeddings")).code == "tensor_name_not_allowed"
    assert refusal(save(BOTH)).code == "tensor_count_mismatch"
    with pytest.raises(ArtifactError, match="kind prefix has the tensors"):
        encode("prefix", {"prefix": torch.randn(3, 2, 2, 4, 16), "target_embeddings": soft(3)})
