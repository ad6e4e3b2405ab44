"""Training from a dropped file until the prompt is served, and rows judged as the server does."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from promptd.demo import DEMO_DATA_PATH, DEMO_MODEL_NAME
from promptd.training.data import TrainingDataError, parse_examples
from tests.console.visitor import Visitor


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


@pytest.mark.long
def test_pause_resume_cancel_compare(visit: Visitor, api: httpx.Client) -> None:
    """What the buttons of a job do is what the API then says of it; the curves of two jobs lie on one chart."""
    rows = "\n".join((DEMO_DATA_PATH / "snips-intent.jsonl").read_text().splitlines()[:40])
    file = api.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", rows)}).json()["id"]
    jobs = {}
    for name, num_steps in (("short-one", 6), ("long-one", 100_000)):
        settings = {"num_steps": num_steps, "num_evaluations": 3, "batch_size": 4}
        method = {"type": "prompt_tuning", "prompt_tuning": {"hyperparameters": settings}}
        body = {"model": DEMO_MODEL_NAME, "training_file": file, "suffix": name, "method": method}
        jobs[name] = api.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    job = f"/v1/fine_tuning/jobs/{jobs['long-one']}"
    page = visit.open(f"jobs/{jobs['long-one']}")

    def becomes(state: str) -> None:
        page.wait_for_selector(f".badges .badge:has-text('{state.capitalize()}')")
        assert api.get(job).json()["status"] == state

    becomes("running")
    page.get_by_role("button", name="Pause").click()
    becomes("paused")
    page.get_by_role("button", name="Resume").click()
    becomes("running")
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.locator("dialog").get_by_role("button", name="Cancel the job").click()
    becomes("cancelled")
    page.click("nav a[href='#/jobs']")
    for name in jobs:
        page.locator(".u-legend", has_text=name).wait_for()
    page.get_by_role("checkbox", name="Compare short-one").uncheck()
    page.locator(".chart-none").wait_for()  # the other was never validated
