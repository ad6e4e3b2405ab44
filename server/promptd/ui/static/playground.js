// Playground: one input, several prompts side by side, the bare model too.

import { baseModel, get, promptPath } from "./api.js";
import { Answer } from "./answer.js";
import { add, fill, h, icon, iconButton } from "./dom.js";
import { plain } from "./format.js";
import { findPrompts, labelsOf, labelWords, render, samples, templateFields } from "./records.js";
import { combobox, toast } from "./widgets.js";

const NUM_COLORS = 8;
const MAX_SUBJECTS = 6; // a browser opens six connections to a server
const NUM_FIRST = 2;
const NUM_FOUND = 30;

// Kept while the console is open, so that a look at another page loses nothing.
const state = {
  subjects: null,
  fields: { text: "" },
  settings: { max_tokens: 64, temperature: 0, top_p: 1, seed: "", stop: "", apply_template: true },
};

/** Show the page. */
export async function show(root, { query, signal }) {
  const base = await baseModel(signal);
  await chooseSubjects(base, query.get("prompt"), signal);
  const answers = new Map();
  const inputs = h("div", { class: "inputs" });
  const chips = h("div", { class: "row chips" });
  const tries = h("div", { class: "row tries" });
  const columns = h("section", { class: "answers", "aria-label": "Answers" });
  const run = h("button", { type: "submit", class: "button primary run" }, icon("play", "solid"), h("span", {}, "Run"), h("kbd", {}, "Ctrl ⏎"));
  const form = h("form", { class: "card composer", "aria-label": "Input" }, inputs, tries, h("div", { class: "composer-foot" }, chips, h("div", { class: "composer-run" }, run)), settingsForm());
  let isRunning = false;

  const makeRequest = (subject, mode) => (mode === "labels" ? classification(subject) : completion(subject));

  function addPrompt(subject) {
    if (state.subjects.some((one) => one.id === subject.id)) return toast(`${subject.id} is there already`);
    if (state.subjects.length >= MAX_SUBJECTS) return toast(`At most ${MAX_SUBJECTS} side by side`, "cross");
    state.subjects.push(subject);
    return draw();
  }

  function remove(subject) {
    answers.get(subject)?.stop();
    state.subjects = state.subjects.filter((one) => one !== subject);
    draw();
  }

  function draw() {
    const labelled = state.subjects.find((one) => labelWords(one.record));
    for (const subject of answers.keys()) if (!state.subjects.includes(subject)) answers.delete(subject);
    for (const subject of state.subjects) {
      if (!answers.has(subject)) {
        subject.color ??= freeColor();
        answers.set(subject, new Answer(subject, { color: `var(--series-${subject.color})`, onremove: () => remove(subject), makeRequest }));
      }
      if (!subject.record) answers.get(subject).classifyAs(labelled?.record ?? null);
    }
    fill(columns, state.subjects.map((subject) => answers.get(subject).element), !state.subjects.length && h("div", { class: "card empty" }, h("h2", {}, "Nothing to ask yet"), h("p", {}, "Add the bare model or a prompt above. All of them answer in one batch.")));
    drawChips();
    drawInputs();
    drawTries();
    run.disabled = !state.subjects.length;
  }

  function drawChips() {
    const find = async (text) => {
      const { data } = await findPrompts(text, { limit: NUM_FOUND });
      const found = data.filter((record) => !state.subjects.some((one) => one.id === record.id)).map((record) => ({ id: record.id, content: [h("span", { class: "grow mono" }, record.id), h("span", { class: "small muted" }, record.kind)] }));
      const wantsBase = !state.subjects.some((one) => one.id === base) && base.includes(text);
      return wantsBase ? [{ id: base, content: [h("span", { class: "grow mono" }, base), h("span", { class: "small muted" }, "bare model")] }, ...found] : found;
    };
    const pick = async (id) => addPrompt({ id, record: id === base ? null : await get(promptPath(id)) });
    fill(
      chips,
      state.subjects.map((subject) => h("span", { class: "chip", vars: { "--c": `var(--series-${subject.color})` } }, h("span", { class: "dot" }), h("span", {}, subject.record ? subject.id : `${subject.id} (bare)`), iconButton("close", `Remove ${subject.id} from the comparison`, () => remove(subject), { kind: "quiet" }))),
      state.subjects.length < MAX_SUBJECTS && combobox("Add a prompt", "Add a prompt …", find, pick),
    );
  }

  function drawInputs() {
    const wanted = new Set(state.subjects.flatMap((one) => (one.record ? templateFields(one.record.manifest.template) : ["text"])));
    const names = wanted.size ? [...wanted] : ["text"];
    fill(
      inputs,
      names.map((name) => {
        const id = `input-${name}`;
        const area = h("textarea", { id, rows: names.length > 1 ? "2" : "4", placeholder: name === "text" ? "Write or paste an input. Every prompt below gets the same one." : "", value: state.fields[name] ?? "", oninput: () => (state.fields[name] = area.value), onkeydown: submitOnKey });
        return h("div", { class: "field" }, h("label", { for: id, class: names.length > 1 ? "" : "visually-hidden" }, name), area);
      }),
    );
  }

  function drawTries() {
    const known = state.subjects.flatMap((one) => samples(one.record)).map((one) => one.input);
    fill(tries, known.length > 0 && [h("span", { class: "small muted" }, "Try"), [...new Set(known)].slice(0, 3).map((text) => h("button", { type: "button", class: "try", title: text, onclick: () => { state.fields.text = text; drawInputs(); start(); } }, text))]);
  }

  function submitOnKey(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      start();
    }
  }

  async function start() {
    if (isRunning) return answers.forEach((answer) => answer.stop());
    isRunning = true;
    fill(run, icon("stop", "solid"), h("span", {}, "Stop"));
    await Promise.all([...answers.values()].map((answer) => answer.run()));
    isRunning = false;
    fill(run, icon("play", "solid"), h("span", {}, "Run"), h("kbd", {}, "Ctrl ⏎"));
    return undefined;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  signal.addEventListener("abort", () => answers.forEach((answer) => answer.stop()));
  draw();
  add(root, h("div", { class: "page-head" }, h("div", { class: "grow" }, h("h1", {}, "Playground"), h("p", {}, "One input, several prompts side by side, answered in one batch."))), form, columns);
}

/** Pick what is compared first: the bare model and the first prompts that write text, else any. */
async function chooseSubjects(base, wanted, signal) {
  if (state.subjects === null) {
    const { data } = await findPrompts("", { limit: NUM_FOUND, signal });
    const writers = data.filter((record) => !labelsOf(record));
    const first = (writers.length ? writers : data).slice(0, NUM_FIRST);
    state.subjects = [{ id: base, record: null }, ...(wanted ? [] : first.map((record) => ({ id: record.id, record })))];
    if (!wanted) state.fields.text = first.flatMap((record) => samples(record))[0]?.input ?? "Once upon a time";
    state.subjects.forEach((subject, index) => (subject.color = index + 1));
  }
  if (wanted && !state.subjects.some((one) => one.id === wanted)) {
    const record = await get(promptPath(wanted), {}, signal);
    if (state.subjects.length >= MAX_SUBJECTS) state.subjects.pop();
    state.subjects.push({ id: wanted, record, color: freeColor() });
    const [sample] = samples(record);
    if (sample && !state.fields.text) state.fields.text = sample.input;
  }
}

function freeColor() {
  const used = new Set(state.subjects.map((one) => one.color));
  return Array.from({ length: NUM_COLORS }, (_, index) => index + 1).find((color) => !used.has(color)) ?? 1;
}

function inputOf(record) {
  const names = record ? templateFields(record.manifest.template) : ["text"];
  if (names.length === 1 && names[0] === "text") return state.fields.text ?? "";
  return Object.fromEntries(names.map((name) => [name, state.fields[name] ?? ""]));
}

function completion(subject) {
  const { max_tokens, temperature, top_p, seed, stop, apply_template } = state.settings;
  const shown = { model: subject.id, prompt: inputOf(subject.record), max_tokens, temperature, stream: true };
  if (top_p < 1) shown.top_p = top_p;
  if (seed !== "") shown.seed = Number(seed);
  if (stop !== "") shown.stop = stop.replaceAll("\\n", "\n");
  if (!apply_template) shown.apply_template = false;
  return { path: "/v1/completions", shown, body: { ...shown, return_token_ids: true, stream_options: { include_usage: true } } };
}

function classification(subject) {
  const record = subject.record ?? subject.classifyAs;
  const shown = { model: subject.id, input: inputOf(record) };
  if (!subject.record) {
    // The bare model has neither template nor labels: it is asked as the prompt beside it is.
    const given = typeof shown.input === "string" ? { text: shown.input } : shown.input;
    shown.input = render(record.manifest.template, given);
    shown.labels = labelWords(record);
  }
  return { path: "/v1/classify", shown, body: shown };
}

function settingsForm() {
  const { settings } = state;
  const numeric = (name, label, attributes) => {
    const input = h("input", { type: "number", id: `set-${name}`, value: String(settings[name]), ...attributes, oninput: () => {
      if (input.value === "" && name !== "seed") return;
      settings[name] = input.value === "" ? "" : Number(input.value);
      summarize();
    } });
    return h("div", { class: "field" }, h("label", { for: `set-${name}` }, label), input);
  };
  const stop = h("input", { type: "text", id: "set-stop", value: settings.stop, placeholder: "none; \\n is a line break", oninput: () => (settings.stop = stop.value) });
  const template = h("input", { type: "checkbox", checked: settings.apply_template, onchange: () => (settings.apply_template = template.checked) });
  const summary = h("span", { class: "muted" });
  const summarize = () => fill(summary, `${settings.temperature === 0 ? "greedy" : `temperature ${plain(settings.temperature)}`}, at most ${settings.max_tokens} tokens`);
  summarize();
  return h(
    "details",
    { class: "settings" },
    h("summary", {}, icon("tune"), "Settings", summary),
    h(
      "div",
      { class: "settings-grid" },
      numeric("max_tokens", "Most tokens", { min: "1", max: "4096", step: "1" }),
      numeric("temperature", "Temperature", { min: "0", max: "2", step: "0.1" }),
      numeric("top_p", "Top p", { min: "0.05", max: "1", step: "0.05" }),
      numeric("seed", "Seed", { min: "0", step: "1", placeholder: "random" }),
      h("div", { class: "field" }, h("label", { for: "set-stop" }, "Stop at"), stop),
      h("label", { class: "check" }, template, "Use each prompt's template"),
    ),
  );
}
