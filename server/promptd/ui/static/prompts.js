// Prompts: a searchable list that is paged by the server, and the way to one prompt.

import { add, debounced, fill, h, icon, iconButton } from "./dom.js";
import { ago, bytes, count, moment } from "./format.js";
import { findPrompts, score, scoreChange, scoreRows, scoresOf } from "./records.js";
import { tableBox, toast } from "./widgets.js";

const PAGE_SIZE = 100;

/** Show the list, or one prompt. */
export async function show(root, { parts, query, signal }) {
  if (parts.length) return (await import("./prompt.js")).showPrompt(root, parts.join("/"), query, signal);
  let after = null;
  const body = h("tbody", {});
  const foot = h("div", { class: "list-foot" });
  const search = h("input", { type: "search", "aria-label": "Search prompts by name", placeholder: "Search by name", autocomplete: "off", spellcheck: "false", oninput: debounced(200, () => load(true)) });
  const table = h("div", { class: "card" }, tableBox("Prompts", h("table", { class: "list prompts" }, h("thead", {}, h("tr", {}, columns())), body)), foot);
  const none = h("div", { class: "card", hidden: true });
  let asked = 0;

  async function load(isNew) {
    const mine = ++asked;
    if (isNew) after = null;
    const page = await findPrompts(search.value.trim(), { limit: PAGE_SIZE, after, signal });
    if (mine !== asked) return;
    if (isNew) fill(body);
    add(body, page.data.map(row));
    after = page.data.at(-1)?.id ?? null;
    const shown = body.children.length;
    table.hidden = shown === 0;
    none.hidden = shown > 0;
    if (!shown) fill(none, search.value ? nothingFound() : empty(upload, write));
    fill(foot, h("span", { class: "muted" }, `${count(shown)} ${shown === 1 ? "prompt" : "prompts"}${page.has_more ? " so far" : ""}`), page.has_more && h("button", { type: "button", class: "button slim", onclick: () => load(false) }, "Show more"));
  }

  async function upload(files = []) {
    published(await (await import("./upload.js")).openUpload(files));
  }

  function published(record) {
    if (!record) return;
    toast(`${record.id} is published as version ${record.number}`);
    location.hash = `#/prompts/${record.id}`;
  }

  async function write() {
    published(await (await import("./textprompt.js")).openTextPrompt());
  }

  add(
    root,
    h(
      "div",
      { class: "page-head" },
      h("div", { class: "grow" }, h("h1", {}, "Prompts"), h("p", {}, "Learned prompts of this base model: yours, and those that are public.")),
      h("div", { class: "actions" }, h("a", { class: "button", href: "#/jobs/new" }, icon("jobs"), "Train a prompt"), iconButton("write", "Write a text", write, { text: true }), iconButton("upload", "Upload a prompt", () => upload(), { text: true, kind: "primary" })),
    ),
    h("div", { class: "toolbar" }, h("div", { class: "search grow" }, icon("search"), search)),
    table,
    none,
  );
  root.addEventListener("dragover", (event) => event.preventDefault());
  root.addEventListener("drop", (event) => {
    event.preventDefault();
    upload([...event.dataTransfer.files].map((file) => ({ path: file.name, file })));
  });
  await load(true);
  return undefined;
}

function columns() {
  return [["Prompt"], ["Kind", "wide"], ["Tokens", "num wide"], ["Score", "num"], ["Change", "num"], ["Version", "num wide"], ["Size", "num wide"], ["Published", "wide"]].map(([text, kind = ""]) => h("th", { scope: "col", class: kind }, text));
}

function row(record) {
  const { before, after } = scoresOf(record);
  const [main] = scoreRows(before, after);
  const href = `#/prompts/${record.id}`;
  return h(
    "tr",
    { class: "link", onclick: (event) => { if (!event.target.closest("a")) location.hash = href; } },
    h("td", {}, h("div", { class: "row" }, h("a", { class: "name mono", href }, record.id), record.visibility === "public" && h("span", { class: "badge info" }, "public")), record.provenance?.title && h("div", { class: "small muted" }, record.provenance.title)),
    h("td", { class: "wide" }, h("span", { class: "badge" }, record.kind)),
    h("td", { class: "num wide" }, record.kind === "text" ? "–" : count(record.num_virtual_tokens)),
    h("td", { class: "num" }, main ? [score(main.name, main.after), h("div", { class: "small muted" }, main.name.replaceAll("_", " "))] : "–"),
    h("td", { class: `num ${main?.isBetter ? "good" : main?.isBetter === false ? "bad" : ""}` }, main ? scoreChange(main) : "–"),
    h("td", { class: "num wide" }, `v${record.number}`),
    h("td", { class: "num wide" }, bytes(record.num_bytes)),
    h("td", { class: "when wide", title: moment(record.created) }, ago(record.created)),
  );
}

function empty(upload, write) {
  return h(
    "div",
    { class: "empty" },
    h("h2", {}, "No prompts yet"),
    h("p", {}, "A prompt is a few kilobytes that teach the base model one task or one user's style. Train one from rows of your own, or bring one that PEFT has trained."),
    h("div", { class: "row" }, h("a", { class: "button primary", href: "#/jobs/new" }, icon("jobs"), "Train a prompt"), iconButton("upload", "Upload from PEFT", () => upload(), { text: true }), iconButton("write", "Write a text", write, { text: true })),
    h("p", { class: "small" }, "Or drop a PEFT folder anywhere on this page. From a shell: ", h("code", {}, "promptd prompts push adapters/")),
  );
}

function nothingFound() {
  return h("div", { class: "empty" }, h("h2", {}, "Nothing found"), h("p", {}, "No prompt that you may see has these letters in its name."));
}
