// The rows of a new job: dropped or pasted, shown, counted, their faults listed by line.

import { call, send } from "./api.js";
import { fill, h, icon, iconButton } from "./dom.js";
import { bytes, count, percent } from "./format.js";
import { readRows } from "./rows.js";
import { dropZone, tableBox } from "./widgets.js";

const NUM_SHOWN = 30;
const NUM_PROBLEMS = 50;
const NUM_LABELS = 12;

/** The first step of the form. */
export class DataStep {
  constructor({ template, onchange }) {
    this.template = template;
    this.onchange = onchange;
    this.checked = null;
    this.sent = null; // the file as the server has it
    this.element = h("div", { class: "stack" });
    this.clear();
  }

  clear() {
    this.file = null;
    this.checked = null;
    this.sent = null;
    const pasted = h("textarea", { class: "mono", rows: "5", "aria-label": "Rows as JSON lines", placeholder: '{"text": "play some jazz", "label": "PlayMusic"}\n{"prompt": "name[The Vaults]", "completion": "The Vaults is a pub."}', spellcheck: "false" });
    const use = h("button", { type: "button", class: "button", onclick: () => pasted.value.trim() && this.take(new File([pasted.value], "pasted.jsonl")) }, "Use these rows");
    fill(
      this.element,
      dropZone({ title: "Drop a .jsonl file", hint: 'One JSON object a line: {"text", "label"}, {"prompt", "completion"} or {"messages"}', accept: ".jsonl,.json,.txt" }, ([{ file }]) => this.take(file)),
      h("details", { class: "more" }, h("summary", {}, "Or paste rows"), h("div", { class: "stack tight" }, pasted, h("div", { class: "row" }, use))),
    );
  }

  async take(file) {
    this.file = file;
    this.sent = null;
    this.content = new Uint8Array(await file.arrayBuffer());
    this.check();
    this.onchange();
  }

  /** Use a file that the server has already. */
  async reuse(fileId, signal) {
    try {
      const described = await call("GET", `/v1/files/${encodeURIComponent(fileId)}`, { signal });
      const response = await send("GET", `/v1/files/${encodeURIComponent(fileId)}/content`, { signal });
      await this.take(new File([await response.blob()], described.filename));
      this.sent = fileId;
    } catch (error) {
      if (error.name === "AbortError") throw error; // a file that was deleted since: drop another one
    }
  }

  /** Send the file once, however often the job is refused; returns its id. */
  async fileId() {
    if (this.sent === null) {
      const form = new FormData();
      form.append("purpose", "fine-tune");
      form.append("file", this.file, this.file.name);
      this.sent = (await call("POST", "/v1/files", { body: form })).id;
    }
    return this.sent;
  }

  /** Look at the rows again, under the template as it is now. */
  check() {
    if (!this.file) return;
    this.checked = readRows(this.content, { template: this.template() });
    const { rows, problems, kind, labels } = this.checked;
    fill(
      this.element,
      h("div", { class: `row file ${problems.length ? "bad" : ""}` }, icon(problems.length ? "cross" : "check"), h("strong", { class: "mono grow" }, this.file.name), h("span", { class: "muted small" }, `${bytes(this.file.size)} · ${count(rows.length)} rows${kind ? ` · ${kind === "label" ? `${labels.size} labels` : "completions"}` : ""}`), iconButton("close", "Another file", () => { this.clear(); this.onchange(); }, { text: true, kind: "slim" })),
      problems.length > 0 ? this.problemList(problems) : h("div", { class: "notice good", role: "status" }, icon("check"), "Every row can be used."),
      rows.length > 0 && h("div", { class: "data-view" }, this.preview(rows, new Set(problems.map((one) => one.line))), kind === "label" && labelShares(labels, rows.length)),
    );
  }

  problemList(problems) {
    const more = problems.length - NUM_PROBLEMS;
    return h(
      "div",
      { class: "notice bad", role: "alert" },
      icon("cross"),
      h("div", { class: "grow" }, h("strong", {}, `${count(problems.length)} ${problems.length === 1 ? "row cannot" : "rows cannot"} be used. Nothing was sent.`), h("ol", { class: "problems" }, problems.slice(0, NUM_PROBLEMS).map((one) => h("li", {}, h("span", { class: "line tabular" }, `line ${one.line}`), " ", one.message)), more > 0 && h("li", {}, `and ${count(more)} more`))),
    );
  }

  preview(rows, faulty) {
    const names = [...new Set(rows.slice(0, NUM_SHOWN).flatMap((row) => Object.keys(row.fields)))].slice(0, 4);
    const isChat = rows.slice(0, NUM_SHOWN).some((row) => row.messages);
    const target = rows[0].label === null ? "completion" : "label";
    const box = tableBox(
      "The first rows",
      h(
        "table",
        { class: "list" },
        h("thead", {}, h("tr", {}, h("th", { scope: "col", class: "num" }, "Line"), isChat && h("th", { scope: "col" }, "messages"), names.map((name) => h("th", { scope: "col" }, name)), h("th", { scope: "col" }, isChat ? "answer" : target))),
        h("tbody", {}, rows.slice(0, NUM_SHOWN).map((row) => h("tr", { class: faulty.has(row.line) ? "failed" : "" }, h("td", { class: "num muted" }, row.line), isChat && h("td", { class: "lines" }, row.messages?.map((one) => `${one.role}: ${one.content}`).join("\n")), names.map((name) => h("td", {}, row.fields[name] ?? "–")), h("td", {}, row.label === null ? row.completion : h("span", { class: "badge" }, row.label))))),
      ),
      rows.length > NUM_SHOWN && h("p", { class: "small muted pad-in" }, `and ${count(rows.length - NUM_SHOWN)} more rows`),
    );
    box.classList.add("preview");
    return box;
  }
}

function labelShares(labels, numRows) {
  const ranked = [...labels].sort((a, b) => b[1] - a[1]);
  const rest = ranked.length - NUM_LABELS;
  return h(
    "div",
    { class: "label-shares" },
    h("h3", {}, "Labels"),
    h("ol", { class: "label-bars small" }, ranked.slice(0, NUM_LABELS).map(([label, number]) => h("li", {}, h("span", { class: "grow" }, label), h("span", { class: "tabular" }, `${count(number)} · ${percent(number / numRows)}`), h("div", { class: "bar", "aria-hidden": "true" }, h("i", { vars: { "--share": number / ranked[0][1] } })))), rest > 0 && h("li", {}, `and ${rest} more`)),
  );
}
