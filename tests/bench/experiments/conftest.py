"""SuperGLUE in small, and a tiny encoder with room for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from tests.family_models import ENCODER_SIZES, make_encoder_tokenizer, write_model

SLICES = Path(__file__).parents[2] / "data"
MADE_UP: Mapping[str, dict[str, Any]] = {
    "cb": {"premise": "It may rain.", "hypothesis": "it rains", "label": "neutral"},
    "rte": {"premise": "It rains.", "hypothesis": "Water falls.", "label": "entailment"},
    "wic": {"word": "bank", "sentence1": "The bank.", "sentence2": "A bank.", "start1": 4, "label": "true"},
    "multirc": {
        "passage": "<b>Sent 1: </b>Ann sang.<br>Bob slept.",
        "questions": [
            {"question": "Who sang?", "answers": [{"text": "Ann", "label": "true"}, {"text": "Bob", "label": "false"}]},
            {"question": "Who slept?", "answers": [{"text": "Bob", "label": "true"}]},
        ],
    },
}


@pytest.fixture(scope="session")
def superglue_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The slices that may be shipped, and made-up rows of the other tasks, six a split."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("boolq", "copa", "wsc"):
        shutil.copytree(SLICES / f"superglue_{name}", folder / f"superglue_{name}")
    for name, row in MADE_UP.items():
        own = folder / f"superglue_{name}"
        own.mkdir()
        for split in ("train", "validation"):
            rows = [_numbered(row, number) for number in range(6)]
            (own / f"{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder


def _numbered(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The row, another text from the second on."""
    name = next(field for field in ("premise", "sentence1", "passage") if field in row)
    return {**row, name: row[name] + (f" {number}" if number else "")}


@pytest.fixture(scope="session")
def long_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with room for rows of real text, a letter or two a token."""
    sizes = {**ENCODER_SIZES, "max_position_embeddings": 1200}
    folder = tmp_path_factory.mktemp("models") / "tiny-bert-long"
    return write_model(lambda: hf.BertModel(hf.BertConfig(**sizes)), make_encoder_tokenizer(), folder)
