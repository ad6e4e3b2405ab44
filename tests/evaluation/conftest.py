"""Prompts for classification and for texts on a tiny model, and a server that has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from promptd_store import PromptArtifact, encode

from promptd import LLM
from promptd.settings import Settings
from tests.api.conftest import LiveServer, serve
from tests.engine.harness import frozen

WORDS = {"fox": " fox", "dog": " lazy dog", "river": " river"}


def written(artifacts: Mapping[str, PromptArtifact], folder: Path) -> dict[str, str]:
    """Write prompts as files; return name -> path."""
    for name, artifact in artifacts.items():
        (folder / f"{name}.safetensors").write_bytes(artifact.content)
    return {name: str(folder / f"{name}.safetensors") for name in artifacts}


@pytest.fixture(scope="session")
def llm(tiny_models: dict[str, Path]) -> LLM:
    """An engine in this process."""
    return LLM(frozen(tiny_models["llama"]))


@pytest.fixture(scope="session")
def artifacts(llm: LLM) -> dict[str, PromptArtifact]:
    """Three classifiers with one template, a fourth without template and words, and one for texts."""
    generator = torch.Generator().manual_seed(3)
    made: dict[str, PromptArtifact] = {}
    for number in range(3):
        ids = torch.randint(0, llm.model.spec.vocab_size, (2 + 3 * number,), generator=generator)
        made[f"c{number}"] = encode("soft", llm.model.embed(ids), template="{text} is a", label_words=WORDS)
    noise = llm.model.embed(torch.tensor([9, 8, 7]))
    made["plain"] = encode("soft", noise)
    made["writer"] = encode(
        "soft", -noise, template="{text} then", default_sampling={"max_tokens": 5, "temperature": 1.0}, stop=("zzz",)
    )
    return made


@pytest.fixture(scope="session")
def prompt_files(artifacts: dict[str, PromptArtifact], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same prompts as files."""
    return written(artifacts, tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="session")
def server(
    tiny_models: dict[str, Path], artifacts: dict[str, PromptArtifact], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server with these prompts, under their names."""
    folder = tiny_models["llama"]
    settings = Settings(model=str(folder), store=str(tmp_path_factory.mktemp("store")))
    with serve(settings, folder, prompts={name: one.content for name, one in artifacts.items()}) as live:
        yield live
