"""One person with a browser: opens pages, drops files, and notes what the console complains about."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

AXE = Path(__file__).parent / "vendor" / "axe.min.js"
PATIENCE_MILLISECONDS = 45_000
# A drop as the operating system makes it, but for the folder: its files come one by one.
DROP = """([target, files]) => {
  const transfer = new DataTransfer();
  for (const [name, bytes] of files) transfer.items.add(new File([new Uint8Array(bytes)], name));
  for (const type of ["dragenter", "dragover", "drop"]) {
    target.dispatchEvent(new DragEvent(type, { bubbles: true, cancelable: true, dataTransfer: transfer }));
  }
}"""
# https://web.dev/articles/cls: up to 0.1 is good.
SHIFT = """() => new Promise((resolve) => {
  let sum = 0;
  new PerformanceObserver((list) => {
    for (const one of list.getEntries()) if (!one.hadRecentInput) sum += one.value;
  }).observe({ type: "layout-shift", buffered: true });
  requestAnimationFrame(() => setTimeout(() => resolve(sum)));
})"""


class Visitor:
    """A window of its own: nothing is kept from one to the next."""

    def __init__(self, browser: Any, url: str) -> None:
        self.url = url
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.expected: tuple[str, ...] = ()
        self.context = browser.new_context(viewport={"width": 1280, "height": 860}, color_scheme="light")
        self.context.set_default_timeout(PATIENCE_MILLISECONDS)
        self.page = self.context.new_page()
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning") and not any(part in message.text for part in self.expected):
            self.errors.append(f"{message.type}: {message.text}")

    def open(self, page: str, *, at: str = "/ui/") -> Any:
        """Go to a page of the console and wait for its title."""
        self.page.goto(f"{self.url}{at}#/{page}")
        self.page.wait_for_selector("h1")
        return self.page

    def enter(self, page: str, key: str) -> Any:
        """Go to a page of a server that wants a key, and give it one."""
        self.page.goto(f"{self.url}/ui/#/{page}")
        self.page.locator("#api-key").fill(key)
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("dialog", state="detached")
        return self.page

    def layout_shift(self) -> float:
        """How far what was shown has moved without the reader's doing, as browsers measure it."""
        shift: float = self.page.evaluate(SHIFT)
        return shift

    def drop(self, selector: str, files: Mapping[str, bytes]) -> None:
        """Drop files on a place."""
        target = self.page.wait_for_selector(selector)
        self.page.evaluate(DROP, [target, [[name, list(content)] for name, content in files.items()]])

    def violations(self, *rules: str) -> list[str]:
        """What axe-core finds on the page as it is now, serious and critical; by these rules, or by all."""
        if not self.page.evaluate("'axe' in window"):
            self.page.evaluate(AXE.read_text())
        options: dict[str, Any] = {"resultTypes": ["violations"], **({"runOnly": list(rules)} if rules else {})}
        found = self.page.evaluate("(options) => axe.run(document, options)", options)
        return [
            f"{one['id']} ({one['impact']}): {node['target']} {node['failureSummary']}"
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]

    def close(self) -> None:
        """Close the window."""
        self.context.close()
