// What was used: tokens by day, and by tenant and prompt, out of the ledger that counts every answer once.

import { get } from "./api.js";
import { add, fill, h } from "./dom.js";
import { count } from "./format.js";
import { segments, tableBox } from "./widgets.js";

const SPANS = [[1, "Today"], [7, "7 days"], [30, "30 days"]];
const MAX_ROWS = 100;

/** A card that reads the ledger of everybody (`/admin/usage`) or of the caller (`/v1/usage`). */
export class UsagePanel {
  constructor(signal) {
    this.signal = signal;
    this.days = 7;
    this.content = h("div", {});
    this.element = h("section", { class: "card" }, h("header", {}, h("h2", {}, "Usage"), segments("Days", SPANS, this.days, (days) => { this.days = days; this.load(this.path); })), this.content);
  }

  async load(path) {
    this.path = path;
    const from = new Date(Date.now() - (this.days - 1) * 86_400_000).toISOString().slice(0, 10);
    this.draw(await get(path, { from }, this.signal));
  }

  draw({ data, total }) {
    const rows = grouped(data);
    if (!rows.length && !total.training_tokens) {
      fill(this.content, h("div", { class: "empty" }, h("h2", {}, "Nothing used yet"), h("p", {}, "Every answer is counted here once, by tenant, key and prompt, with the numbers of its own ", h("code", {}, "usage"), ".")));
      return;
    }
    const most = Math.max(1, ...rows.map((row) => tokens(row.counts)));
    fill(
      this.content,
      h("dl", { class: "tiles pad-in" }, [["Requests", total.requests], ["Tokens read", total.prompt_tokens], ["Tokens written", total.completion_tokens], ["Virtual tokens", total.virtual_tokens], ["Read from the cache", total.cached_tokens], ["Tokens trained", total.training_tokens]].map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { class: "tabular" }, count(value))))),
      rows.length > 0 && tableBox("Usage by tenant and prompt", h("table", { class: "list" }, h("thead", {}, h("tr", {}, [["Tenant"], ["Prompt"], ["Requests", "num"], ["Read", "num wide"], ["Written", "num wide"], ["Tokens", "num"], ["Share", "share wide"]].map(([text, kind = ""]) => h("th", { scope: "col", class: kind }, text)))), h("tbody", {}, rows.slice(0, MAX_ROWS).map(({ tenant, prompt, counts }) => h(
        "tr",
        {},
        h("td", {}, h("strong", {}, tenant)),
        h("td", { class: prompt ? "mono" : "muted" }, prompt || "bare model"),
        h("td", { class: "num" }, count(counts.requests)),
        h("td", { class: "num wide" }, count(counts.prompt_tokens)),
        h("td", { class: "num wide" }, count(counts.completion_tokens)),
        h("td", { class: "num" }, count(tokens(counts))),
        h("td", { class: "share wide" }, h("div", { class: "bar", "aria-hidden": "true" }, h("i", { vars: { "--share": tokens(counts) / most } }))),
      ))))),
    );
    if (rows.length > MAX_ROWS) add(this.content, h("div", { class: "list-foot" }, h("span", { class: "muted" }, `The ${MAX_ROWS} largest of ${count(rows.length)}`)));
  }
}

function tokens(counts) {
  return counts.prompt_tokens + counts.completion_tokens;
}

/** Days and keys added up; the largest first. */
function grouped(data) {
  const found = new Map();
  for (const { tenant, prompt, day, key_id, ...counts } of data) {
    const id = JSON.stringify([tenant, prompt]);
    const row = found.get(id) ?? { tenant, prompt, counts: {} };
    for (const [name, value] of Object.entries(counts)) row.counts[name] = (row.counts[name] ?? 0) + value;
    found.set(id, row);
  }
  return [...found.values()].filter((row) => row.counts.requests > 0).sort((a, b) => tokens(b.counts) - tokens(a.counts));
}
