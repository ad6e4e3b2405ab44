"""Frozen tiny models and a few rows, loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest

from promptd.modeling import FrozenModel, load_model
from promptd.training import Example, TaskFormat, example_of
from tests.tiny_models import FAMILIES

WORDS = {"weather": " weather", "music": " music please"}


@pytest.fixture(scope="session")
def frozen_models(tiny_models: dict[str, Path]) -> dict[str, FrozenModel]:
    """Family name -> tiny frozen model."""
    return {family: load_model(tiny_models[family]) for family in FAMILIES}


@pytest.fixture(scope="session")
def llama(frozen_models: dict[str, FrozenModel]) -> FrozenModel:
    """The tiny Llama with grouped-query attention."""
    return frozen_models["llama"]


@pytest.fixture(scope="session")
def label_task() -> TaskFormat:
    """Two labels: one word is a single piece of text, the other has several tokens."""
    return TaskFormat("{text}\nIntent:", WORDS)


@pytest.fixture(scope="session")
def label_rows() -> list[Example]:
    """A few labelled rows of different length."""
    texts = [("will it rain", "weather"), ("play a song by anyone at all", "music"), ("snow", "weather")]
    return [example_of(line, {"text": text, "label": label}) for line, (text, label) in enumerate(texts, 1)]


@pytest.fixture(scope="session")
def text_rows() -> list[Example]:
    """A few rows with completions of different length."""
    pairs = [("the quick", " brown fox"), ("book a table", " for two people"), ("a", " b")] * 3
    return [example_of(line, {"prompt": f"{text} {line}", "completion": end}) for line, (text, end) in enumerate(pairs)]
