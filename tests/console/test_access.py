"""Keys: asked for and forgotten, made, shown once, rotated, revoked; limits and usage of tenants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from tests.api.conftest import LiveServer
from tests.console.conftest import ADMIN_KEY, TENANT_KEY
from tests.console.visitor import Visitor


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


def ask(tiny: LiveServer, key: str) -> httpx.Response:
    """The answer to a question under a key."""
    with tiny.http(Authorization=f"Bearer {key}") as http:
        return http.post("/v1/completions", json={"prompt": "the quick", "max_tokens": 3, "ignore_eos": True})


def asks(tiny: LiveServer, key: str) -> int:
    """Its status."""
    return ask(tiny, key).status_code


def make_key(page: Any, tenant: str) -> str:
    """Make a key in the page and return what it shows once."""
    page.get_by_role("button", name="New key").click()
    page.fill("#key-tenant", tenant)
    page.get_by_role("button", name="Make the key").click()
    text: str = page.locator(".new-key").inner_text()
    return text


def test_a_key_from_its_making_to_its_end(keyed: Visitor, tiny: LiveServer, screenshots: Path) -> None:
    """A key works, is shown once, has a successor, and is refused the moment it is revoked."""
    page = keyed.enter("access", ADMIN_KEY)
    page.wait_for_selector("h2:has-text('No keys yet')")
    key = make_key(page, "acme")
    page.screenshot(path=screenshots / "new-key.png")
    assert asks(tiny, key) == 200
    page.get_by_role("button", name="I have it").click()
    page.wait_for_selector("dialog", state="detached")
    assert key not in page.content(), "shown once"
    page.get_by_role("button", name="Change key").click()
    page.get_by_role("menuitem", name="Rotate").click()
    page.get_by_role("button", name="Make its successor").click()
    successor = page.locator(".new-key").inner_text()
    page.get_by_role("button", name="I have it").click()
    assert (asks(tiny, key), asks(tiny, successor)) == (200, 200), "the old one has a day"
    old = page.locator("table.keys tbody tr", has_text=key.split("_")[1])
    old.get_by_role("button", name="Change key").click()
    page.get_by_role("menuitem", name="Revoke").click()
    page.locator("dialog").get_by_role("button", name="Revoke").click()
    old.locator(".badge:has-text('revoked')").wait_for()
    assert (asks(tiny, key), asks(tiny, successor)) == (401, 200)
    assert page.locator("table.keys tbody tr").count() == 2
    page.screenshot(path=screenshots / "access.png")


def test_limits_and_usage(keyed: Visitor, tiny: LiveServer) -> None:
    """Limits that are set hold; usage is what the answers said, and where nothing was used the page says so."""
    keyed.expected = ("status of 401", "status of 429")
    page = keyed.enter("access", ADMIN_KEY)
    key = make_key(page, "globex")
    page.get_by_role("button", name="I have it").click()
    told = ask(tiny, key).json()["usage"]["total_tokens"]
    page.get_by_role("tab", name="Tenants").click()
    page.get_by_role("button", name="Limits of globex").click()
    page.fill("#limit-requests_per_minute", "0")
    page.get_by_role("button", name="Set the limits").click()
    page.wait_for_selector("tr:has-text('globex') td:nth-child(4):has-text('0')")
    assert asks(tiny, key) == 429
    page.get_by_role("tab", name="Usage").click()
    page.get_by_role("button", name="Today").click()
    row = page.locator("tr", has_text="globex")
    assert row.locator("td").nth(5).inner_text() == str(told)
    nothing = """async () => {
      const { UsagePanel } = await import("/ui/usage.js");
      const panel = new UsagePanel(new AbortController().signal);
      const none = { requests: 0, prompt_tokens: 0, completion_tokens: 0, training_tokens: 0 };
      panel.draw({ data: [{ tenant: "globex", prompt: "p", day: "2026-01-01", key_id: "k", ...none }], total: none });
      return panel.element.textContent;
    }"""
    assert "Nothing used yet" in page.evaluate(nothing)


def test_who_may_not_see_keys(visit: Visitor, keyed: Visitor, tiny: LiveServer) -> None:
    """A server without keys says how to get some; a tenant's own key sees its own usage and no other tenant."""
    visit.expected = ("status of 409",)
    visit.open("access").wait_for_selector("h2:has-text('This server needs no keys')")
    keyed.expected = ("status of 401", "status of 403")
    page = keyed.enter("access", TENANT_KEY)
    page.wait_for_selector(".notice:has-text('admin key')")
    assert asks(tiny, TENANT_KEY) == 200
    page.get_by_role("button", name="Today").click()
    page.wait_for_selector("td:has-text('initech')")
    assert page.get_by_role("button", name="New key").count() == 0
    assert "globex" not in page.content() and "acme" not in page.content()
