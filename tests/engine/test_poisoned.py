"""Prompts that break the model's numbers, slipped past every check: they end their own rows and touch nobody else's.

The same engine goes on through all batches, under eight tenants; what it says beside poisoned rows is compared with an
engine that never saw one.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from promptd_store import PromptArtifact, encode

from promptd.engine import admission
from promptd.engine.engine import Engine
from promptd.engine.request import GenerateRequest, RequestOutput
from promptd.engine.share import Share
from promptd.errors import NumericalError, PromptdError
from tests.engine.harness import frozen, greedy, library, make_engine

NUM_TENANTS = 8
Said = tuple[list[int], PromptdError | None]
"""The tokens of a row, and how it failed."""


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate is open: shapes are not looked at."""
    monkeypatch.setattr(admission, "_check_artifact", lambda artifact, model: None)


def poisons(folder: Path) -> dict[str, PromptArtifact]:
    """What no upload would get past the gate."""
    spec = frozen(folder).spec
    soft, prefix = library(folder)[2], library(folder)[6]

    def with_tensor(artifact: PromptArtifact, version: str, tensor: torch.Tensor) -> PromptArtifact:
        (name,) = artifact.tensors
        return replace(artifact, tensors={name: tensor}, version=f"sha256:{version}")

    def spoilt(artifact: PromptArtifact, version: str, value: float) -> PromptArtifact:
        (tensor,) = artifact.tensors.values()
        changed = tensor.clone()
        changed.view(-1)[:: max(1, changed.numel() // 7)] = value
        return with_tensor(artifact, version, changed)

    return {
        "NaN": spoilt(soft, "1", torch.nan),
        "infinity": spoilt(soft, "2", torch.inf),
        "1e20": with_tensor(soft, "3", torch.full((8, spec.hidden_size), 1e20) * torch.randn(8, spec.hidden_size)),
        "NaN in a prefix": spoilt(prefix, "4", torch.nan),
        "infinity in a prefix": spoilt(prefix, "5", torch.inf),
        "wrong width": with_tensor(soft, "6", torch.ones(8, spec.hidden_size - 1)),
        "wrong rank": with_tensor(encode("soft", torch.ones(8, spec.hidden_size)), "7", torch.ones(8)),
    }


class Runs:
    """One engine, and what it said to each request."""

    def __init__(self, folder: Path) -> None:
        self.engine: Engine = make_engine(folder, strict=True, num_blocks=256, prompt_tokens=1024, max_num_seqs=32)

    def run(
        self, requests: list[GenerateRequest], steps_apart: int
    ) -> dict[str, tuple[list[int], PromptdError | None]]:
        """Add the requests, some steps apart, and step to the end; every pool is checked after every step."""
        said: dict[str, Said] = {}
        waiting: Iterator[GenerateRequest] = iter(requests)
        at, is_more = 0, True
        while is_more or self.engine.has_work:
            for _ in range(1 if steps_apart and at else 4):
                request = next(waiting, None)
                is_more = request is not None
                if request is None:
                    break
                said[request.request_id] = ([], None)
                try:
                    self.engine.add_request(request)
                except PromptdError as error:  # told at once
                    said[request.request_id] = ([], error)
            for output in self.engine.step():
                assert isinstance(output, RequestOutput)
                tokens, error = said[output.request_id]
                assert error is None, "one reply"
                said[output.request_id] = ([*tokens, *output.token_ids], output.error)
            self.engine.check_integrity()
            at += 1
            assert at < 4000
        return said


def poisoned_batches(folder: Path, count: int, max_rows: int) -> None:
    """So many random batches of two rows or more, one to three of them poisoned."""
    dice, good, bad = random.Random(5), library(folder), poisons(folder)
    poisoned, clean = Runs(folder), Runs(folder)
    found, kinds = Counter[str](), itertools.cycle(sorted(bad))
    for number in range(count):
        rows: list[tuple[GenerateRequest, str | None]] = []
        for row in range(dice.randint(2, max_rows)):
            kind = next(kinds) if row < dice.randint(1, 3) else None
            tenant = f"t{dice.randrange(NUM_TENANTS)}"
            text = tuple(dice.randrange(1, 300) for _ in range(dice.randint(1, 40)))
            chain = tuple(dice.sample(good, dice.randint(0, 2)))
            if kind is not None:
                chain = dice.choice([(bad[kind],), (*chain, bad[kind]), (bad[kind], *chain)])
            request = GenerateRequest(
                f"b{number}-{row}", text, greedy(dice.randint(1, 8)), chain, salt=tenant, share=Share(tenant, 1.0)
            )
            rows.append((request, kind))
        dice.shuffle(rows)
        apart = dice.randint(0, 1)
        told = poisoned.run([request for request, _ in rows], apart)
        expected = clean.run([request for request, kind in rows if kind is None], apart)
        for request, kind in rows:
            tokens, error = told[request.request_id]
            if kind is None:
                assert (tokens, error) == expected[request.request_id], request.request_id
                assert len(tokens) == request.params.max_tokens
                found["good rows"] += 1
            else:
                assert isinstance(error, PromptdError), kind
                assert tokens == [], kind  # it failed before its first token
                found[f"{kind}: {'not finite' if isinstance(error, NumericalError) else 'raised'}"] += 1
    print(json.dumps({"batches": count, **dict(sorted(found.items()))}))
    assert {name.partition(":")[0] for name in found} == {*bad, "good rows"}  # control: each kind was there, and failed


def test_poison_stays_in_its_row(tiny_models: dict[str, Path]) -> None:
    """Bitwise the tokens of an engine that never saw a poisoned prompt."""
    poisoned_batches(tiny_models["gpt2"], 8, 12)


@pytest.mark.long
def test_a_thousand_poisoned_batches(tiny_models: dict[str, Path]) -> None:
    """1,000 batches."""
    poisoned_batches(tiny_models["gpt2"], 1000, 32)
