"""An ensemble of N prompts in one batch is N single calls."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

from tests.api.conftest import LiveServer
from tests.patience import PATIENCE_SECONDS

MEMBERS = ["p0", "p2", "p3", "p5"]
INPUTS = ["the quick", "brown fox jumps", "the lazy dog and the restaurant", "near the river", "is cheap"]
LABELS = {"fox": " fox", "dog": " lazy dog", "river": " river near"}


def post(server: LiveServer, path: str, **body: Any) -> dict[str, Any]:
    """POST and return the answer."""
    with server.http() as http:
        answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def test_classification(server: LiveServer) -> None:
    """The mean of the single calls' probabilities for every input, and all versions in order. As a control, a mean
    that leaves one member out, or gives one input another's row, is far away."""

    def classify(**names: Any) -> list[list[float]]:
        data = post(server, "/v1/classify", input=INPUTS, labels=LABELS, **names)["data"]
        assert [row["label"] for row in data] == [list(LABELS)[row["probs"].index(max(row["probs"]))] for row in data]
        return [row["probs"] for row in data]

    single = [classify(model=name) for name in MEMBERS]
    together = classify(ensemble=MEMBERS)

    def distance(members: list[list[list[float]]], order: list[int]) -> float:
        means = [
            [sum(column) / len(members) for column in zip(*rows, strict=True)] for rows in zip(*members, strict=True)
        ]
        return max(
            abs(a - b) for at, row in zip(order, together, strict=True) for a, b in zip(means[at], row, strict=True)
        )

    straight = list(range(len(INPUTS)))
    assert distance(single, straight) < 1e-5
    assert min(distance(single[:at] + single[at + 1 :], straight) for at in range(len(MEMBERS))) > 1e-3
    assert distance(single, [*straight[1:], 0]) > 1e-3


def test_texts(server: LiveServer) -> None:
    """The majority of the single calls' greedy texts, with every vote; ties go to the first. As a control, the members
    disagree."""
    settings = {"max_tokens": 3, "temperature": 0}
    for text in INPUTS:
        texts = [
            post(server, "/v1/completions", prompt=text, model=name, **settings)["choices"][0]["text"].strip()
            for name in MEMBERS
        ]
        (choice,) = post(server, "/v1/completions", prompt=text, ensemble=MEMBERS, **settings)["choices"]
        votes = Counter(texts)
        assert choice["votes"] == votes
        assert choice["text"].strip() == max(texts, key=votes.__getitem__)
        assert len(votes) > 1
        doubled = post(server, "/v1/completions", prompt=text, ensemble=[*MEMBERS, MEMBERS[-1]], **settings)
        votes[texts[-1]] += 1
        assert doubled["choices"][0]["text"].strip() == max(texts, key=votes.__getitem__)


@pytest.mark.parametrize(
    ("path", "body", "num_steps"),
    [
        ("/v1/classify", {"input": INPUTS[0], "labels": LABELS}, 2),
        ("/v1/completions", {"prompt": INPUTS[0], "max_tokens": 3, "temperature": 0, "ignore_eos": True}, 4),
    ],
)
def test_members_share_steps(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], num_steps: int
) -> None:
    """All members are handed to the engine before one of them is waited for, and it answers them in the same steps."""
    post(server, path, ensemble=MEMBERS, **body)  # the prompts are resident from now on
    engine = server.app.state.services.engine
    enter, step, before = engine._enter, engine.engine.step, engine.engine.counters.steps
    num_entered = 0

    def entering(request: Any) -> Any:
        nonlocal num_entered
        num_entered += 1
        return enter(request)

    def waiting() -> Any:
        until = time.monotonic() + PATIENCE_SECONDS
        while num_entered < len(MEMBERS) and time.monotonic() < until:
            time.sleep(0.005)
        return step()

    monkeypatch.setattr(engine, "_enter", entering)
    monkeypatch.setattr(engine.engine, "step", waiting)
    post(server, path, ensemble=MEMBERS, **body)
    assert num_entered == len(MEMBERS)
    assert engine.engine.counters.steps - before <= num_steps  # one after another: four times as many


def test_members_must_agree_on_the_question(server: LiveServer) -> None:
    """An ensemble names its prompts itself."""
    with server.http() as http:
        answer = http.post("/v1/classify", json={"input": "x", "labels": LABELS, "ensemble": ["p0"], "prompt_id": "p1"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "ensemble"
    with pytest.raises(AssertionError, match="model_not_found"):
        post(server, "/v1/classify", input="x", labels=LABELS, ensemble=["p0", "absent"])
