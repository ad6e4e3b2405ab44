// A prompt's record in the words of the pages: scores, template fields, where it came from.

import { get } from "./api.js";
import { h } from "./dom.js";
import { number, percent } from "./format.js";
import { tableBox } from "./widgets.js";

const SHARES = new Set(["accuracy", "macro_f1", "matthews", "exact_match", "token_f1", "f1a", "grouped_em", "rouge_l"]);
const FALLING = new Set(["loss", "validation_loss"]);

/** The training behind a record, however deep its provenance keeps it. */
export function training(record) {
  const provenance = record.provenance ?? {};
  return provenance.scores ? provenance : (provenance.provenance ?? provenance);
}

/** Scores on rows that nothing was chosen by, where there are some, else those by which its training chose it. */
export function scoresOf(record) {
  const heldOut = record.provenance?.held_out?.test;
  return heldOut ? { before: heldOut.bare_model, after: heldOut.prompt } : (training(record).scores ?? {});
}

/** `[{ name, before, after, isBetter }]`, the telling one first. */
export function scoreRows(before = {}, after = {}) {
  const names = [...new Set([...Object.keys(after ?? {}), ...Object.keys(before ?? {})])].filter((name) => name !== "num_rows");
  const order = (name) => (SHARES.has(name) ? 0 : FALLING.has(name) ? 2 : 1);
  return names
    .filter((name) => typeof (after?.[name] ?? before?.[name]) === "number")
    .sort((a, b) => order(a) - order(b))
    .map((name) => {
      const was = before?.[name] ?? null;
      const is = after?.[name] ?? null;
      const change = was === null || is === null ? null : is - was;
      return { name, before: was, after: is, change, isBetter: change === null || change === 0 ? null : FALLING.has(name) ? change < 0 : change > 0 };
    });
}

/** A score as people read it. */
export function score(name, value) {
  return SHARES.has(name) ? percent(value) : number(value, 3);
}

/** A change of a score, in its unit, with its sign. */
export function scoreChange(row) {
  if (row.change === null) return "–";
  const sign = row.change > 0 ? "+" : row.change < 0 ? "−" : "±";
  const size = Math.abs(row.change);
  return SHARES.has(row.name) ? `${sign}${(size * 100).toFixed(1)} pp` : `${sign}${number(size, 3)}`;
}

/** Before, after and change of every score, as a table. */
export function scoreTable(before, after, names = ["Bare model", "With the prompt"]) {
  const rows = scoreRows(before, after);
  if (!rows.length) return h("p", { class: "muted" }, "No scores were recorded.");
  return tableBox(
    "Scores",
    h(
      "table",
      { class: "list" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Score"), names.map((name) => h("th", { scope: "col", class: "num" }, name)), h("th", { scope: "col", class: "num" }, "Change"))),
      h(
        "tbody",
        {},
        rows.map((row) =>
          h(
            "tr",
            {},
            h("th", { scope: "row" }, row.name.replaceAll("_", " ")),
            h("td", { class: "num" }, score(row.name, row.before)),
            h("td", { class: "num" }, h("strong", {}, score(row.name, row.after))),
            h("td", { class: `num ${row.isBetter === null ? "muted" : row.isBetter ? "good" : "bad"}` }, scoreChange(row)),
          ),
        ),
      ),
    ),
  );
}

/** The names that a template uses, as the server reads it; null is the identity `{text}`. */
export function templateFields(template) {
  if (template === null || template === undefined) return ["text"];
  const names = [...template.matchAll(/\{\{|\}\}|\{([^{}]*)\}/g)].map((match) => match[1]).filter((name) => name !== undefined);
  return [...new Set(names)];
}

/** Put fields into a template. Values go in as they are. */
export function render(template, fields) {
  if (template === null || template === undefined) return fields.text ?? "";
  return template.replace(/\{\{|\}\}|\{([^{}]*)\}/g, (token, name) => (name === undefined ? token[0] : (fields[name] ?? token)));
}

/** Label -> word of a record, or null. */
export function labelWords(record) {
  const given = record?.manifest?.label_words;
  return given && Object.keys(given).length ? given : null;
}

/** The labels that a record can be asked for: those with words, or the classes of its head; null where it has none. */
export function labelsOf(record) {
  const words = labelWords(record);
  const classes = record?.manifest?.labels;
  return words ? Object.keys(words) : Array.isArray(classes) && classes.length ? classes : null;
}

/** Inputs that the record's card shows, for a first try. */
export function samples(record) {
  const found = record?.provenance?.samples;
  return Array.isArray(found) ? found.filter((one) => typeof one.input === "string") : [];
}

/** The part of a name behind its owner. */
export function bareName(id) {
  return id.slice(id.lastIndexOf("/") + 1);
}

/** Find prompts by name. */
export async function findPrompts(search, { limit = 100, after = null, signal } = {}) {
  return get("/v1/prompts", { search, limit, after }, signal);
}
