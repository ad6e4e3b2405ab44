"""What a person does in the first minutes, in a real browser before the demo's own server."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from promptd_store import encode
from safetensors.torch import save

from promptd.demo import DEMO_DATA_PATH, DEMO_MODEL_NAME, DEMO_MODEL_PATH
from promptd.training.data import TrainingDataError, parse_examples
from tests.console.visitor import Visitor

STYLES = ("demo/bible-american-standard", "demo/bible-basic-english")
HOSTILE = '<img src=x onerror="window.hacked = 1"><script>window.hacked = 1</script>'
MAX_BYTES = 300_000


def hidden_size() -> int:
    """Of the demo's model."""
    return int(json.loads((DEMO_MODEL_PATH / "config.json").read_text())["hidden_size"])


def adapter(seed: int, width: int | None = None) -> dict[str, bytes]:
    """A PEFT folder's two files."""
    weights = torch.randn(8, width or hidden_size(), generator=torch.Generator().manual_seed(seed)) * 0.02
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 8}
    return {
        "adapter_model.safetensors": save({"prompt_embeddings": weights}),
        "adapter_config.json": json.dumps(config).encode(),
    }


def test_first_visit(visit: Visitor) -> None:
    """A small page from this server alone; nothing is followed or asked again and again on the first two pages."""
    sizes: list[int] = []
    visit.page.on("response", lambda reply: sizes.append(int(reply.headers.get("content-length", "0"))))
    page = visit.open("playground")
    page.wait_for_selector(".answer")
    page.click("nav a[href='#/prompts']")
    page.wait_for_selector("table.prompts tbody tr")
    page.wait_for_timeout(2500)
    assert 10_000 < sum(sizes) <= MAX_BYTES
    assert all(url.startswith(visit.url) for url in visit.requests)
    paths = [url.removeprefix(visit.url) for url in visit.requests]
    assert not [path for path in paths if "events" in path or "metrics" in path or "jobs" in path]
    assert not [path for path in paths if "uPlot" in path], "charts are fetched when one is drawn"


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
    """A prompt with label words is asked for them, and the bare model beside it too; what is copied is the request."""
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = visit.open("playground?prompt=demo/snips-intent")
    page.fill("textarea", "play some jazz from the nineties")
    page.click("button.run")
    card = page.locator(".answer", has_text="demo/snips-intent").last
    card.locator(".label-bars").wait_for()
    body = {"model": "demo/snips-intent", "input": "play some jazz from the nineties"}
    expected = api.post("/v1/classify", json=body).json()["data"][0]
    best = card.locator(".label-bars .best").inner_text()
    assert best.split("\n") == [expected["label"], f"{100 * max(expected['probs']):.1f} %"]
    page.locator(".answer").first.locator(".label-bars").wait_for()
    card.get_by_role("button", name="Copy").click()
    page.get_by_role("menuitem", name="Copy as curl").click()
    page.wait_for_selector(".toast")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert f"{visit.url}/v1/classify" in copied
    assert json.loads(copied.split("-d '")[1].rsplit("'", 1)[0]) == body


def test_upload_compare_roll_back_delete(visit: Visitor, api: httpx.Client, screenshots: Path) -> None:
    """A dropped PEFT folder is checked field by field, published, replaced, compared, rolled back, deleted."""
    visit.expected = ("status of 422",)  # the browser itself reports the refusal below
    page = visit.open("prompts")
    page.get_by_role("button", name="Upload a prompt").click()
    visit.drop("dialog .drop", adapter(0, width=hidden_size() + 1))
    page.wait_for_selector("dialog .notice.bad")
    assert "prompt_embeddings" in page.locator("tr.failed").inner_text()
    assert page.get_by_role("button", name="Publish").is_disabled()
    page.get_by_role("button", name="Cancel").click()
    for seed in (1, 2):
        page.get_by_role("button", name="Upload a prompt").click()
        visit.drop("dialog .drop", adapter(seed))
        page.fill("#upload-name", "from-peft")
        page.wait_for_selector("dialog .notice.good")
        assert page.locator("dialog .badge.good").count() >= 4
        if seed == 1:
            page.screenshot(path=screenshots / "upload.png")
        page.get_by_role("button", name="Publish").click()
        page.wait_for_selector("h1:has-text('from-peft')")
        assert api.get("/v1/prompts/from-peft").json()["number"] == seed
        if seed == 1:
            page.click("nav a[href='#/prompts']")
    page.get_by_role("tab", name="Versions (2)").click()
    assert "tensors.0.sha256" in page.locator("table.diff").inner_text()
    page.screenshot(path=screenshots / "versions.png")
    page.get_by_role("button", name="Roll back to v1").click()
    page.locator("dialog").get_by_role("button", name="Roll back").click()
    page.wait_for_selector("tr:has-text('v1') .badge.good")
    assert api.get("/v1/prompts/from-peft").json()["number"] == 1
    page.get_by_role("tab", name="Nearest words").click()
    assert page.locator(".neighbors tbody tr").nth(7).inner_text()
    page.get_by_role("button", name="Delete").click()
    button = page.locator("dialog").get_by_role("button", name="Delete")
    assert button.is_disabled()
    page.locator("dialog input").fill("from-peft")
    button.click()
    page.wait_for_selector("table.prompts tbody tr")
    assert api.get("/v1/prompts/from-peft").status_code == 404


def test_train_from_a_dropped_file(visit: Visitor, api: httpx.Client, screenshots: Path) -> None:
    """Faults are named by line before anything is sent; good rows train live until the prompt is served."""
    lines = (DEMO_DATA_PATH / "snips-intent.jsonl").read_text().splitlines()[:40]
    page = visit.open("jobs")
    page.get_by_role("link", name="Train the first prompt").click()
    visit.drop(".drop", {"bad.jsonl": "\n".join([*lines[:3], '{"text": "no answer"}', *lines[3:9], "{oops"]).encode()})
    page.wait_for_selector(".problems")
    assert [one.inner_text() for one in page.locator(".problems .line").all()] == ["line 4", "line 11"]
    assert page.get_by_role("button", name="Start training").is_disabled()
    assert api.get("/v1/files").json()["data"] == []
    page.get_by_role("button", name="Another file").click()
    visit.drop(".drop", {"intents.jsonl": "\n".join(lines).encode()})
    page.wait_for_selector(".notice.good")
    page.fill("#job-name", "trained-here")
    for name, value in (("num_steps", "6"), ("batch_size", "4")):
        page.fill(f"#set-{name}", value)
    page.locator("details.more summary", has_text="All settings").click()
    page.fill("#set-num_evaluations", "2")
    page.get_by_label("Publish even if").check()
    page.get_by_role("button", name="Start training").click()
    page.wait_for_selector("h1:has-text('trained-here')")
    page.wait_for_selector(".u-legend")
    page.wait_for_selector(".badge:has-text('Succeeded')")
    page.wait_for_selector("section:has-text('Scores') table")
    page.screenshot(path=screenshots / "job.png", full_page=True)
    job = api.get("/v1/fine_tuning/jobs").json()["data"][0]
    assert (job["prompt"], job["hyperparameters"]) == (
        "trained-here",
        {"num_steps": 6, "batch_size": 4, "num_evaluations": 2},
    )
    assert "6 / 6" in page.locator(".tiles").inner_text()
    page.get_by_role("link", name="Try the prompt").click()
    page.fill("textarea", "play some jazz")
    page.click("button.run")
    card = page.locator(".answer", has_text="trained-here").last
    card.locator(".label-bars .best").wait_for()
    expected = api.post("/v1/classify", json={"model": "trained-here", "input": "play some jazz"}).json()["data"][0]
    assert card.locator(".label-bars .best").inner_text().startswith(expected["label"])
    page.click("nav a[href='#/jobs']")
    page.wait_for_selector(".u-legend")
    assert page.locator("table.jobs tbody tr").count() == 1
    page.screenshot(path=screenshots / "jobs.png")


BAD_FILES: dict[str, bytes] = {
    "no target": b'{"text": "a", "label": "x"}\n{"text": "b"}\n',
    "two targets": b'{"text": "a", "label": "x", "completion": "y"}\n',
    "empty target": b'{"text": "a", "completion": ""}\n',
    "number": b'\n\n{"text": "a", "label": 3}\n',
    "a list": b'[1]\n{"text": "a", "label": "x"}\n',
    "not JSON": b'{"text": "a", "completion": "x"}\n{"text": \n',
    "not UTF-8": b'{"text": "a", "completion": "x"}\n{"text": "\xff", "completion": "x"}\n',
    "half a character": b'{"text": "\\ud800", "completion": "x"}\n',
    "prompt and text": b'{"prompt": "a", "text": "b", "completion": "x"}\n',
    "nothing": b"\n \n",
    "unknown role": b'{"messages": [{"role": "king", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    "no answer": b'{"messages": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "a"}]}\n',
    "alone": b'{"messages": [{"role": "assistant", "content": "b"}]}\n',
    "other fields": b'{"messages": [{"role": "assistant", "content": "b"}], "label": "x"}\n',
}
GOOD_FILES: dict[str, bytes] = {
    "labels": b'{"text": "a", "label": "x"}\r\n\n{"prompt": "b", "label": "y"}',
    "completions": '{"prompt": "ä", "completion": "ü\\n"}\n'.encode(),
    "messages": b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
}


def first_fault(content: bytes) -> list[int]:
    """The line at which the server's reader gives up, if it does."""
    try:
        parse_examples(content.split(b"\n"))
    except TrainingDataError as error:
        return [error.line]
    return []


def test_rows_are_judged_as_the_server_does(visit: Visitor) -> None:
    """The page finds the first fault on the line where the server's own reader finds it, and none in good files."""
    page = visit.open("jobs/new")
    read = """async (bytes) => (await import("/ui/rows.js")).readRows(new Uint8Array(bytes)).problems"""
    for name, content in {**BAD_FILES, **GOOD_FILES}.items():
        problems = page.evaluate(read, list(content))
        assert [problem["line"] for problem in problems[:1]] == first_fault(content), name
        assert bool(problems) == (name in BAD_FILES), name


@pytest.fixture
def hostile(api: httpx.Client) -> Iterator[str]:
    """A prompt whose every text wants to be HTML."""
    artifact = encode(
        "soft",
        torch.ones(2, hidden_size()) * 0.01,
        template=HOSTILE + "{text}",
        label_words={HOSTILE: " yes", f"{HOSTILE}2": " no"},
        stop=(HOSTILE[:40],),
    )
    assert api.put("/v1/prompts/hostile", content=artifact.content).status_code == 201
    yield "hostile"
    assert api.delete("/v1/prompts/hostile").status_code == 200


def test_texts_stay_texts(visit: Visitor, hostile: str) -> None:
    """What comes from the server or from a file is shown as it is written, wherever it is shown."""
    page = visit.open(f"prompts/{hostile}")
    page.wait_for_selector(".template")
    assert HOSTILE in page.locator(".template").inner_text()
    page.get_by_role("tab", name="Manifest").click()
    page.get_by_role("tab", name="Versions (1)").click()
    visit.open(f"playground?prompt={hostile}")
    page.fill("textarea", HOSTILE)
    page.click("button.run")
    page.wait_for_selector(".label-bars")
    assert HOSTILE in page.locator(".label-bars").last.inner_text()
    visit.open("jobs/new")
    row = json.dumps({"text": HOSTILE, "label": HOSTILE})
    visit.drop(".drop", {f"{HOSTILE[:30].replace('/', '')}.jsonl": f"{row}\n{HOSTILE}\n".encode()})
    page.wait_for_selector(".problems")
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script").count() == 0


PAGES = ("playground", "prompts", "prompts/demo/snips-intent", "jobs", "jobs/new", "fleet")


@pytest.mark.parametrize("name", PAGES)
def test_accessible(visit: Visitor, screenshots: Path, name: str) -> None:
    """axe-core finds nothing serious, in both themes and on a phone, and no page is wider than a phone."""
    page = visit.page
    page.emulate_media(color_scheme="light", reduced_motion="reduce")
    visit.open(name)
    page.wait_for_selector(
        {"fleet": ".u-legend", "prompts": "table.prompts tbody tr", "jobs": "main .card"}.get(
            name, "main form, main dl"
        )
    )
    for look in ("light", "dark", "phone"):
        page.emulate_media(color_scheme="dark" if look == "dark" else "light")
        if look == "phone":
            page.set_viewport_size({"width": 390, "height": 844})
            page.wait_for_timeout(100)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.screenshot(path=screenshots / f"{name.replace('/', '-')}-{look}.png")
        assert visit.violations() == [], look


def test_keyboard_and_theme(visit: Visitor) -> None:
    """The first stop of Tab leads past the navigation; the theme is kept; Escape closes what Enter has opened."""
    page = visit.open("prompts")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Use the dark theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.reload()
    page.wait_for_selector("h1")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.get_by_role("button", name="Upload a prompt").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    page.get_by_role("searchbox").fill("SNIPS")
    page.wait_for_selector("table.prompts tbody tr:only-child:has-text('snips-intent')")


def test_a_key_is_asked_for_and_forgotten(visit: Visitor) -> None:
    """Where the server wants a key the page asks for one, sends it with every request, and loses it on reload."""
    visit.expected = ("status of 401",)
    page = visit.page
    sent: list[str | None] = []

    def guard(route: Any) -> None:
        key = route.request.headers.get("authorization")
        sent.append(key)
        if key == "Bearer right":
            route.continue_()
        else:
            error = {"message": "no", "type": "authentication_error", "param": None, "code": "invalid_api_key"}
            route.fulfill(status=401, json={"error": error})

    page.route("**/v1/**", guard)
    page.goto(f"{visit.url}/ui/#/prompts")
    page.locator("#api-key").fill("wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog .notice.bad")
    page.locator("#api-key").fill("right")
    page.keyboard.press("Enter")
    page.wait_for_selector("table.prompts tbody tr")
    assert sent == [None, "Bearer wrong", "Bearer right"]
    assert page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie])") == '[{},{},""]'
    page.reload()
    page.wait_for_selector("#api-key")
    assert sent[-1] is None


def test_behind_a_path(visit: Visitor) -> None:
    """Under a proxy's path the whole console works, and asks for nothing outside of it."""
    prefix = f"{visit.url}/some/where"
    visit.page.route(
        f"{prefix}/**",
        lambda route: route.fulfill(response=route.fetch(url=route.request.url.replace("/some/where", "", 1))),
    )
    page = visit.open("playground", at="/some/where/ui/")
    page.click("button.run")
    page.locator(".answer").first.locator(".answer-tools").wait_for()
    page.click("nav a[href='#/fleet']")
    page.wait_for_selector(".u-legend")
    assert visit.requests and all(url.startswith(prefix) for url in visit.requests)
