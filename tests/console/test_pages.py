"""Every page: small, quiet, still, accessible, usable by keyboard, on a phone, and behind a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.console.visitor import Visitor

MAX_BYTES = 300_000
MAX_SHIFT = 0.1
"""What https://web.dev/articles/cls calls good."""


def test_first_visit(visit: Visitor) -> None:
    """A small page from this server alone; nothing is followed or asked again and again on the first two pages."""
    sizes: list[int] = []
    visit.page.on("response", lambda reply: sizes.append(int(reply.headers.get("content-length", "0"))))
    visit.page.clock.install()
    page = visit.open("playground")
    page.wait_for_selector(".answer")
    page.click("nav a[href='#/prompts']")
    page.wait_for_selector("table.prompts tbody tr")
    page.clock.fast_forward("01:00")
    page.evaluate("fetch('/livez').then((reply) => reply.text())")  # whatever was asked for before has been noted
    assert 10_000 < sum(sizes) <= MAX_BYTES
    assert all(url.startswith(visit.url) for url in visit.requests)
    paths = [url.removeprefix(visit.url) for url in visit.requests]
    assert not [path for path in paths if "events" in path or "metrics" in path or "jobs" in path]
    assert not [path for path in paths if "uPlot" in path], "charts are fetched when one is drawn"
    assert not [path for path in paths if "/v1/models" in path], "that list is not paged"
    page.click("nav a[href='#/fleet']")
    wait_for_lines(visit)  # the control: this page asks again and again


PAGES = ("playground", "prompts", "prompts/demo/snips-intent", "jobs", "jobs/new", "fleet", "access", "reference")

RULES = {"light": (), "dark": ("color-contrast",), "phone": ("color-contrast", "target-size")}
MARKS = {
    "fleet": ".stat-tiles strong",
    "prompts": "table.prompts tbody tr",
    "jobs": "main .card",
    "access": "main .card",
    "reference": ".route",
}


def wait_for_lines(visit: Visitor) -> None:
    """The fleet's second reading makes lines of the first; it comes when two seconds are over, here at once."""
    visit.page.wait_for_selector(".stat-tiles strong")
    with visit.page.expect_request("**/metrics"):
        visit.page.clock.fast_forward("00:02")
    visit.page.wait_for_selector(".u-legend")


@pytest.mark.parametrize("name", PAGES)
def test_accessible(visit: Visitor, screenshots: Path, name: str) -> None:
    """axe-core finds nothing serious in both themes and on a phone; nothing moves, and nothing is too wide."""
    page = visit.page
    page.emulate_media(color_scheme="light", reduced_motion="reduce")
    visit.expected = ("status of 409",) if name == "access" else ()  # the browser reports that there are no keys
    page.clock.install()
    visit.open(name)
    page.wait_for_selector(MARKS.get(name, "main form, main dl"))
    if name == "fleet":
        wait_for_lines(visit)
    assert visit.layout_shift() <= MAX_SHIFT
    for look in ("light", "dark", "phone"):
        page.emulate_media(color_scheme="dark" if look == "dark" else "light")
        if look == "phone":
            page.set_viewport_size({"width": 390, "height": 844})
            page.wait_for_timeout(100)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.screenshot(path=screenshots / f"{name.replace('/', '-')}-{look}.png")
        # The theme changes colours and the width sizes; what else there is was looked at in the first place.
        assert visit.violations(*RULES[look]) == [], look


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


COLORS = """() => [...document.querySelectorAll("body, body *")].map((one) => {
  const { color, backgroundColor, borderTopColor } = getComputedStyle(one);
  return [one.tagName, color, backgroundColor, borderTopColor].join(" ");
})"""


def test_a_theme_comes_at_once(visit: Visitor) -> None:
    """Also where motion is not wanted, every colour is the other theme's in the moment in which that is chosen."""
    visit.page.emulate_media(reduced_motion="reduce")
    page = visit.open("prompts")

    def colors(first: str = "") -> list[str]:
        page.wait_for_selector("table.prompts tbody tr")
        page.wait_for_selector(".server-state strong")
        found: list[str] = page.evaluate(f"() => {{ {first}; return ({COLORS})(); }}")
        return found

    before, chosen = colors(), colors("window.promptdTheme.toggle()")
    page.reload()
    assert chosen == colors() != before


def test_behind_a_path(visit: Visitor) -> None:
    """Under a proxy's path the whole console works, and asks for nothing outside of it."""
    prefix = f"{visit.url}/some/where"
    visit.page.route(
        f"{prefix}/**",
        lambda route: route.fulfill(response=route.fetch(url=route.request.url.replace("/some/where", "", 1))),
    )
    visit.page.clock.install()
    page = visit.open("playground", at="/some/where/ui/")
    page.click("button.run")
    page.locator(".answer").first.locator(".answer-tools").wait_for()
    page.click("nav a[href='#/fleet']")
    wait_for_lines(visit)
    assert visit.requests and all(url.startswith(prefix) for url in visit.requests)


def test_the_api_reference_works_offline(visit: Visitor) -> None:
    """`/docs` shows every route and field from this server's own description, and asks nobody else."""
    page = visit.page
    page.goto(f"{visit.url}/docs")
    page.wait_for_selector(".route")
    described = page.evaluate("fetch('/openapi.json').then((reply) => reply.json())")
    assert page.locator(".route").count() == sum(len(item) for item in described["paths"].values())
    page.locator("summary", has_text="/v1/completions").first.click()
    page.wait_for_selector(".route[open] th[scope=row]")
    fields = page.locator(".route[open] th[scope=row]").all_inner_texts()
    body = described["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = described["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]
    assert set(schema["properties"]) <= {field.rstrip(" *") for field in fields}
    page.get_by_role("searchbox").fill("logit_bias")
    page.wait_for_function("document.querySelectorAll('.route').length < 5")
    assert all(url.startswith(visit.url) for url in visit.requests)
