"""The main job on real input: the demo server as a process, its prompts in concurrent requests."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from promptd_store import decode, render_template

from promptd.demo import DEMO_DATA_PATH, DEMO_MODEL_NAME, DEMO_MODEL_PATH, DEMO_PROMPTS_PATH
from tests.engine.harness import Case, assert_matches_oracle, frozen, greedy

CARDS = {path.stem: json.loads(path.read_text()) for path in sorted(DEMO_PROMPTS_PATH.glob("*.json"))}
CLASSIFIERS = [name for name, card in CARDS.items() if card["label_words"]]


def rows_of(name: str) -> list[dict[str, Any]]:
    """The held-out rows that are shipped for one prompt."""
    return [json.loads(line) for line in (DEMO_DATA_PATH / f"{name}.jsonl").read_text().splitlines()]


def test_the_demo_has_what_it_promises(demo_url: str) -> None:
    """At least six prompts of two kinds, two of them classifiers, all usable by name."""
    listed = {model["id"] for model in httpx.get(f"{demo_url}/v1/models").json()["data"]}
    assert DEMO_MODEL_NAME in listed
    assert len(CARDS) >= 6
    assert all(name in listed or f"demo/{name}" in listed for name in CARDS)
    assert {card["kind"] for card in CARDS.values()} == {"soft", "prefix"}
    assert len(CLASSIFIERS) >= 2


def test_concurrent_requests_under_every_prompt_are_exact(demo_url: str) -> None:
    """Real held-out inputs under all prompts and none, at once: every answer is transformers' own, token for token."""
    jobs = [(name, row["text"]) for name in CARDS for row in rows_of(name)[:3]]
    jobs += [(DEMO_MODEL_NAME, text) for _, text in jobs[:3]]

    def ask(job: tuple[str, str]) -> dict[str, Any]:
        body = {"model": job[0], "prompt": job[1], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{demo_url}/v1/completions", json={**body, "return_token_ids": True}, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(ask, jobs))
    model = frozen(DEMO_MODEL_PATH)
    for (name, text), answer in zip(jobs, answers, strict=True):
        chain = ()
        if name in CARDS:
            artifact = decode((DEMO_PROMPTS_PATH / f"{name}.safetensors").read_bytes(), model.spec)
            assert answer["prompt_versions"] == [artifact.version] == [CARDS[name]["version"]]
            text = render_template(artifact.manifest.template or "{text}", {"text": text})
            chain = (artifact,)
        choice = answer["choices"][0]
        assert choice["prompt_token_ids"] == model.encode(text)
        case = Case(chain, tuple(choice["prompt_token_ids"]), greedy(12))
        case.outputs = [_Made(tuple(choice["token_ids"]))]  # type: ignore[list-item]
        assert_matches_oracle(DEMO_MODEL_PATH, case)


class _Made:
    def __init__(self, token_ids: tuple[int, ...]) -> None:
        self.token_ids = token_ids


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classification_scores_are_those_of_the_cards(demo_url: str, name: str) -> None:
    """Accuracy over HTTP on the shipped held-out rows is the card's within two points, and beats the bare model's."""
    rows = rows_of(name)
    labels: list[str] = []
    for start in range(0, len(rows), 50):
        batch = [row["text"] for row in rows[start : start + 50]]
        answer = httpx.post(f"{demo_url}/v1/classify", json={"model": name, "input": batch}, timeout=120)
        assert answer.status_code == 200, answer.text
        labels += [data["label"] for data in answer.json()["data"]]
    accuracy = sum(row["label"] == label for row, label in zip(rows, labels, strict=True)) / len(rows)
    measured = CARDS[name]["held_out"]["shipped_slice"]
    assert accuracy == pytest.approx(measured["prompt"]["accuracy"], abs=0.02)
    assert accuracy > measured["bare_model"]["accuracy"]
