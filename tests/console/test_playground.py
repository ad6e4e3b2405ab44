"""The playground: streaming side by side, labels, what is copied."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from promptd.demo import DEMO_MODEL_NAME
from tests.console.visitor import Visitor

STYLES = ("demo/bible-american-standard", "demo/bible-basic-english")


def copied(visit: Visitor, card: Any, what: str) -> str:
    """What a card puts into the clipboard: a `curl command` or a `Python program`."""
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    card.get_by_role("button", name="Copy").click()
    visit.page.get_by_role("menuitem", name=f"Copy as {what.split()[0]}").click()
    visit.page.locator(".toast", has_text=f"{what} copied").wait_for()
    text: str = visit.page.evaluate("navigator.clipboard.readText()")
    return text


def run(*command: str) -> str:
    """What a command of the reader's prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_stream_side_by_side(visit: Visitor, api: httpx.Client, screenshots: Path) -> None:
    """One click streams the bare model and two prompts; each answer is the API's, and its tokens have probabilities."""
    page = visit.open("playground")
    page.fill("textarea", "And the king said to the people of the land")
    page.keyboard.press("Control+Enter")
    cards = page.locator(".answer")
    for index, name in enumerate((DEMO_MODEL_NAME, *STYLES)):
        card = cards.nth(index)
        card.locator(".answer-tools").wait_for()
        body = {
            "model": name,
            "prompt": "And the king said to the people of the land",
            "max_tokens": 64,
            "temperature": 0,
        }
        expected = api.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert card.locator(".answer-text").inner_text().strip() == expected.strip()
        assert re.search(r"First token\n\d+(\.\d+)? m?s", card.locator("dl").inner_text())
        assert re.search(r"\d+ tok/s", card.locator("dl").inner_text())
    assert run(sys.executable, "-c", copied(visit, card, "Python program")) == expected
    card = cards.nth(1)
    card.get_by_role("button", name="Token probabilities").click()
    card.locator(".token").first.wait_for()
    labels = [token.get_attribute("aria-label") for token in card.locator(".token").all()]
    shares = [float((label or "").rsplit(" ", 2)[-2]) for label in labels]
    body["model"] = STYLES[0]
    scored = api.post("/v1/completions", json={**body, "logprobs": 0}).json()["choices"][0]["logprobs"]
    assert shares == pytest.approx([100 * math.exp(value) for value in scored["token_logprobs"]], abs=0.2)
    page.screenshot(path=screenshots / "playground.png")


def test_classify_and_copy(visit: Visitor, api: httpx.Client) -> None:
    """A prompt with label words is asked for them, and the bare model beside it too; what is copied asks the same."""
    page = visit.open("playground?prompt=demo/snips-intent")
    page.fill("textarea", "what's on, it's the nineties")
    page.click("button.run")
    card = page.locator(".answer", has_text="demo/snips-intent").last
    card.locator(".label-bars").wait_for()
    body = {"model": "demo/snips-intent", "input": "what's on, it's the nineties"}
    expected = api.post("/v1/classify", json=body).json()["data"][0]
    best = card.locator(".label-bars .best").inner_text()
    assert best.split("\n") == [expected["label"], f"{100 * max(expected['probs']):.1f} %"]
    page.locator(".answer").first.locator(".label-bars").wait_for()
    (answer,) = json.loads(run("bash", "-c", copied(visit, card, "curl command")))["data"]
    assert (answer["label"], answer["probs"]) == (expected["label"], pytest.approx(expected["probs"]))
    printed = run(sys.executable, "-c", copied(visit, card, "Python program")).split()
    assert (printed[0], float(printed[1])) == (expected["label"], pytest.approx(max(expected["probs"])))
