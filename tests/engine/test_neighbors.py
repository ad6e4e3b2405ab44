"""Nearest vocabulary entries of a soft prompt, against numpy over the matrix in the checkpoint's own file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from promptd_store import encode
from safetensors.numpy import load_file

from promptd.engine import neighbors as module
from promptd.engine.neighbors import neighbors
from promptd.errors import InvalidRequestError
from tests.engine.harness import frozen, library
from tests.tiny_models import FAMILIES

MATRIX = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight", "qwen2": "model.embed_tokens.weight"}
COUNT = 7


@pytest.mark.parametrize("chunk_rows", [8192, 33, 3], ids=["whole", "chunks", "chunks smaller than the answer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_numpy_finds_the_same(
    tiny_models: dict[str, Path], family: str, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids and cosines of every virtual token, best first, however the vocabulary is cut."""
    monkeypatch.setattr(module, "_CHUNK_ROWS", chunk_rows)
    model = frozen(tiny_models[family])
    vocabulary = load_file(tiny_models[family] / "model.safetensors")[MATRIX[family]].astype(np.float64)
    for artifact in library(tiny_models[family])[:4]:
        prompt = artifact.tensors["prompt_embeddings"].numpy().astype(np.float64)
        cosines = prompt @ vocabulary.T
        cosines /= np.linalg.norm(prompt, axis=1, keepdims=True) * np.linalg.norm(vocabulary, axis=1)
        found = neighbors(model, artifact, COUNT)
        assert len(found) == len(prompt)
        for row, expected in zip(found, cosines, strict=True):
            assert [one.token_id for one in row] == np.argsort(-expected)[:COUNT].tolist()
            assert [one.cosine for one in row] == pytest.approx(np.sort(expected)[::-1][:COUNT], abs=2e-6)
            assert [one.token for one in row] == [model.tokenizer.decode([one.token_id]) for one in row]


def test_words_find_themselves(tiny_models: dict[str, Path]) -> None:
    """A prompt of vocabulary rows, of any length, is its words: cosine 1 first, and then something else."""
    model = frozen(tiny_models["llama"])
    ids = torch.tensor([5, 319, 0, 77])
    artifact = encode("soft", 3.0 * model.embed(ids), base_fingerprint=model.spec.fingerprint)
    found = neighbors(model, artifact, 2)
    assert [row[0].token_id for row in found] == ids.tolist()
    assert all(row[0].cosine == pytest.approx(1, abs=1e-6) and row[1].cosine < 0.99 for row in found)


def test_other_kinds_have_none(tiny_models: dict[str, Path]) -> None:
    """Prefixes and texts have no vectors among the embeddings."""
    for artifact in library(tiny_models["llama"])[4::4]:
        with pytest.raises(InvalidRequestError, match=f"this is a {artifact.kind.value}"):
            neighbors(frozen(tiny_models["llama"]), artifact, 2)
