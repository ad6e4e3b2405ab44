"""One name, uploaded again and again while two servers answer under it: every answer is of exactly one version."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest
import torch
from promptd_store import PromptArtifact, encode

from tests.cluster.load import Ended, Load
from tests.engine.harness import frozen
from tests.haproxy import running_haproxy
from tests.replicas import Replica

NUM_VERSIONS = 6


def artifacts(folder: Path) -> list[PromptArtifact]:
    """Prompts whose answers differ from one another."""
    model = frozen(folder)
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(NUM_VERSIONS):
        ids = torch.randint(0, model.spec.vocab_size, (6,), generator=generator)
        made.append(encode("soft", model.embed(ids), base_fingerprint=model.spec.fingerprint))
    return made


def mixed(ended: list[Ended], texts: dict[str, str]) -> list[Ended]:
    """The answers that are not the text of the version that they name."""
    return [one for one in ended if one.fault is None and texts.get(_named(one)) != one.text]


def stale(ended: list[Ended], uploads: list[tuple[float, str]], seconds: float) -> list[Ended]:
    """The answers of requests that began so long after an upload was answered, and name a version before it."""
    late = []
    for one in ended:
        done = [number for number, (at, _) in enumerate(uploads) if at + seconds <= one.started]
        if done and one.fault is None and _named(one) not in [version for _, version in uploads[done[-1] :]]:
            late.append(one)
    return late


def _named(one: Ended) -> str:
    assert one.version is not None
    return one.version.strip("[]'")


def reupload(replicas: list[Replica], folder: Path, model: Path, num_uploads: int) -> None:
    """Upload to one server in turn, ask both through HAProxy, hold every answer against the versions' own texts."""
    made = artifacts(model)

    async def run(url: str) -> tuple[Load, list[tuple[float, str]], dict[str, str]]:
        async with httpx.AsyncClient(base_url=url, timeout=30) as http:
            texts = {}
            for artifact in made:
                assert (await http.put("/v1/prompts/tone", content=artifact.content)).is_success
                fault, version, text = await Load(url, 1, "tone", 8)._one(http)
                assert fault is None and version is not None
                texts[version.strip("[]'")] = text
            assert len(set(texts.values())) == NUM_VERSIONS, "the control: versions can be told apart"
            load, uploads = Load(url, 6, "tone", 8), []
            running = asyncio.create_task(load.run())
            for number in range(num_uploads):
                artifact = made[number % NUM_VERSIONS]
                target = replicas[number % len(replicas)].url
                assert (await http.put(f"{target}/v1/prompts/tone", content=artifact.content)).is_success
                uploads.append((time.monotonic(), artifact.version))
                await load.until_more()
            load.is_stopping = True
            await running
        return load, uploads, texts

    with running_haproxy(folder, [replica.port for replica in replicas]) as proxy:
        load, uploads, texts = asyncio.run(run(proxy.url))
    old = stale(load.ended, uploads, 0.0)
    print(f"{num_uploads} uploads: {len(load.ended)} answers, {len(mixed(load.ended, texts))} mixed, {len(old)} of a "
          f"version before the last upload that was answered")  # fmt: skip
    assert load.faults == [] and mixed(load.ended, texts) == [] and stale(load.ended, uploads, 1.0) == []
    assert len({_named(one) for one in load.ended}) >= min(NUM_VERSIONS, num_uploads) - 1
    # The control: an answer of one version under another's name, and an old one, are found.
    first, *others = load.ended
    wrong = next(version for version in texts if version != _named(first))
    forged = Ended(first.started, first.ended, None, wrong, first.text)
    assert mixed([forged, *others], texts) == [forged]
    late = Ended(uploads[-1][0] + 2, uploads[-1][0] + 3, None, uploads[-2][1], "")
    assert stale([late], uploads, 1.0) == [late]


def test_no_answer_is_of_two_versions(replicas: list[Replica], tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """16 uploads under load."""
    reupload(replicas, tmp_path / "proxy", tiny_models["llama"], 16)


@pytest.mark.long
def test_a_hundred_uploads(replicas: list[Replica], tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """100 uploads under load."""
    reupload(replicas, tmp_path / "proxy", tiny_models["llama"], 100)
