// A new job in three steps on one page: the rows, the prompt, the method. The rows are checked before anything is sent.

import { call, get } from "./api.js";
import { DataStep } from "./jobdata.js";
import { MethodStep } from "./jobmethod.js";
import { add, debounced, fill, h, icon, iconButton } from "./dom.js";
import { asRead, LABEL_TEMPLATE } from "./rows.js";
import { findPrompts } from "./records.js";
import { combobox, errorNotice } from "./widgets.js";

/** Show the form. `?base=` names a prompt to start from, `?name=` the one to publish, `?again=` a job to repeat. */
export async function showNewJob(root, query, signal) {
  const [methods, model, again] = await Promise.all([
    get("/v1/fine_tuning/methods", {}, signal),
    get("/startupz", {}, signal).then((state) => state.model),
    query.get("again") ? get(`/v1/fine_tuning/jobs/${encodeURIComponent(query.get("again"))}`, {}, signal) : null,
  ]);
  const wish = { base: query.get("base") ?? again?.base_prompt ?? null, words: null };
  const method = new MethodStep(methods.data, again?.method ?? null);
  const problem = h("div", { "aria-live": "polite" });
  const reading = h("div", { class: "reading" });
  const base = h("div", {});
  const wordRows = h("div", {});
  const name = h("input", { type: "text", id: "job-name", maxlength: "96", autocomplete: "off", spellcheck: "false", placeholder: "my-intents", value: query.get("name") ?? again?.prompt ?? "" });
  const template = h("textarea", { id: "job-template", class: "mono", rows: "2", spellcheck: "false", value: again?.template ?? "", oninput: debounced(250, () => { data.check(); drawPrompt(); }) });
  const publishWorse = h("input", { type: "checkbox" });
  const start = h("button", { type: "submit", class: "button primary", disabled: true }, icon("play", "solid"), "Start training");
  const data = new DataStep({ template: () => template.value || null, again, onchange: () => { wish.words = null; drawPrompt(); } });

  function drawBase() {
    const find = async (text) => (await findPrompts(text, { limit: 30 })).data.map((record) => ({ id: record.id, content: [h("span", { class: "grow mono" }, record.id), h("span", { class: "small muted" }, `v${record.number}`)] }));
    const set = (id) => {
      wish.base = id;
      drawBase();
    };
    fill(base, wish.base ? h("span", { class: "chip", vars: { "--c": "var(--accent)" } }, h("span", { class: "dot" }), h("span", {}, wish.base.split("@")[0]), iconButton("close", "Start from nothing", () => set(null), { kind: "quiet" })) : combobox("Start from a prompt", "Nothing: a fresh prompt", find, set));
  }

  function drawPrompt() {
    const { checked } = data;
    start.disabled = !checked || checked.problems.length > 0;
    template.placeholder = checked?.kind === "label" ? LABEL_TEMPLATE : "{text}";
    const [row] = checked?.rows ?? [];
    const words = wish.words ?? again?.label_words;
    if (!row) fill(reading, h("p", { class: "muted small" }, "With rows, this shows what the model reads."));
    else {
      const { input, target } = asRead(row, { template: template.value || null, words });
      fill(reading, h("span", { class: "label" }, `What the model reads of line ${row.line}`), h("pre", { class: "template" }, input, h("mark", {}, target)));
    }
    drawWords();
  }

  function drawWords() {
    const labels = data.checked?.kind === "label" ? [...data.checked.labels.keys()].sort() : [];
    if (!labels.length || labels.length > 50) return fill(wordRows);
    const given = { ...Object.fromEntries(labels.map((label) => [label, again?.label_words?.[label] ?? ` ${label}`])), ...wish.words };
    const set = debounced(200, (label, word) => {
      wish.words = { ...given, ...wish.words, [label]: word };
    });
    return fill(wordRows, h("details", { class: "more" }, h("summary", {}, `Label words (${labels.length})`), h("p", { class: "hint small muted" }, "The text that is scored for each label. Short common words work best; most start with a space."), h("div", { class: "word-grid" }, labels.map((label) => {
      const id = `word-${label}`;
      const input = h("input", { type: "text", id, class: "mono", value: given[label], oninput: () => set(label, input.value) });
      return h("div", { class: "field" }, h("label", { for: id }, label), input);
    }))));
  }

  async function submit(event) {
    event.preventDefault();
    start.disabled = true;
    fill(problem, h("p", { class: "muted" }, "Sending the rows …"));
    try {
      const body = { training_file: await data.fileId(), method: method.value(), ...(name.value.trim() && { suffix: name.value.trim() }), ...(template.value && { template: template.value }), ...(wish.base && { base_prompt: wish.base }), ...(publishWorse.checked && { publish_worse: true }) };
      const words = wish.words ?? again?.label_words;
      if (words && data.checked.kind === "label") body.label_words = words;
      const job = await call("POST", "/v1/fine_tuning/jobs", { json: { model, ...body } });
      location.hash = `#/jobs/${job.id}`;
    } catch (error) {
      start.disabled = false;
      fill(problem, errorNotice(error));
    }
  }

  add(
    root,
    h("a", { class: "crumb", href: "#/jobs" }, icon("back"), "Jobs"),
    h("div", { class: "page-head" }, h("div", { class: "grow" }, h("h1", {}, "New job"), h("p", {}, "Rows in, a prompt out. It is served under its name the moment it is better than what it replaces."))),
    h(
      "form",
      { class: "stack", onsubmit: submit },
      step(1, "Rows", data.element),
      step(
        2,
        "Prompt",
        h(
          "div",
          { class: "stack" },
          h("div", { class: "two" }, h("div", { class: "field" }, h("label", { for: "job-name" }, "Name"), name, h("span", { class: "hint" }, "Empty: named after the job. A name that exists gets a new version.")), h("div", { class: "field" }, h("span", { class: "label" }, "Start from"), base, h("span", { class: "hint" }, "An earlier prompt, to go on with more rows."))),
          h("div", { class: "field" }, h("label", { for: "job-template" }, "Template"), template, h("span", { class: "hint" }, "Named fields in braces; the answer follows. It is stored with the prompt and used whenever it is asked.")),
          reading,
          wordRows,
        ),
      ),
      step(3, "Method", method.element),
      h("div", { class: "card pad stack tight" }, h("label", { class: "check" }, publishWorse, h("span", {}, "Publish even if it scores below the bare model or the prompt that it replaces")), problem, h("div", { class: "row" }, start)),
    ),
  );
  drawBase();
  drawPrompt();
  if (again?.training_file) await data.reuse(again.training_file, signal);
}

function step(number, title, content) {
  return h("section", { class: "card" }, h("header", {}, h("span", { class: "step" }, number), h("h2", {}, title)), h("div", { class: "pad-in" }, content));
}
