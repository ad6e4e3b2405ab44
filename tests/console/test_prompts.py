"""Prompts: a PEFT folder dropped in, a text written here, versions compared and rolled back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from promptd_store import encode
from safetensors.torch import save

from promptd.demo import DEMO_MODEL_PATH, DEMO_PROMPTS_PATH
from tests.api.conftest import LiveServer
from tests.console.conftest import ADMIN_KEY
from tests.console.visitor import Visitor

HOSTILE = '<img src=x onerror="window.hacked = 1"><script>window.hacked = 1</script>'


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
        kept = api.get("/v1/prompts/from-peft/residency").json()["num_bytes"]
        page.locator("dl.facts > div", has_text="K/V in memory").get_by_text(f"{kept / 1024:.1f} KiB").wait_for()
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


def test_write_a_text(visit: Visitor, api: httpx.Client, screenshots: Path) -> None:
    """A text is checked while it is written, published, shown, and replaced by a next version."""
    page = visit.open("prompts")
    page.get_by_role("button", name="Write a text").click()
    assert page.get_by_role("button", name="Publish").is_disabled()
    page.fill("#text-name", "concierge")
    page.fill("#text-text", "Answer as the concierge of a small hotel.")
    page.wait_for_selector("dialog .notice.good")
    tokens = api.post("/tokenize", json={"prompt": "Answer as the concierge of a small hotel."}).json()["count"]
    assert f"{tokens} tokens" in page.locator("dialog .notice.good").inner_text()
    page.screenshot(path=screenshots / "text.png")
    page.get_by_role("button", name="Publish").click()
    page.wait_for_selector("h1:has-text('concierge')")
    assert "small hotel" in page.locator(".template").first.inner_text()
    record = api.get("/v1/prompts/concierge").json()
    assert (record["kind"], record["manifest"]["text"]) == ("text", "Answer as the concierge of a small hotel.")
    page.get_by_role("button", name="New text").click()
    page.fill("#text-text", "Answer as the concierge of a large hotel.")
    page.get_by_role("button", name="Publish").click()
    page.wait_for_selector("table.diff")
    assert "large hotel" in page.locator("table.diff .come").first.inner_text()
    assert api.delete("/v1/prompts/concierge").status_code == 200


def test_the_list_and_the_page_show_one_score(visit: Visitor) -> None:
    """A demo prompt's is that on rows by which nothing was chosen, as on its card."""
    card = json.loads((DEMO_PROMPTS_PATH / "snips-intent.json").read_text())
    shown = f"{100 * card['held_out']['test']['prompt']['accuracy']:.1f} %"
    page = visit.open("prompts")
    row = page.locator("table.prompts tr", has_text="demo/snips-intent")
    row.get_by_text(shown).wait_for()
    row.locator("a").click()
    page.locator("section", has_text="Scores").get_by_text(shown).wait_for()


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


@pytest.mark.long
def test_ten_thousand_prompts(tiny: LiveServer, browser: Any) -> None:
    """The list is paged by the server and searched there: the page never holds more than was asked for."""
    with tiny.http(Authorization=f"Bearer {ADMIN_KEY}") as http:
        for number in range(10_000):
            reply = http.put(f"/v1/prompts/user-{number:05}", json={"text": f"Write as user {number} does."})
            assert reply.status_code == 201
    visitor = Visitor(browser, tiny.url)
    visitor.expected = ("status of 401",)
    visitor.enter("prompts", ADMIN_KEY)
    page = visitor.page
    rows = page.locator("table.prompts tbody tr")
    page.wait_for_selector("table.prompts tbody tr")
    assert rows.count() == 100
    page.get_by_role("button", name="Show more").click()
    page.wait_for_function("document.querySelectorAll('table.prompts tbody tr').length === 200")
    page.get_by_role("searchbox").fill("user-09876")
    page.wait_for_selector("table.prompts tbody tr:only-child:has-text('user-09876')")
    page.get_by_role("searchbox").fill("")
    page.wait_for_function("document.querySelectorAll('table.prompts tbody tr').length === 100")
    visitor.close()
    assert visitor.errors == []
