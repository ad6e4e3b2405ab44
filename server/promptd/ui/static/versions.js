// A prompt's versions: newest first, two of them compared field by field, and back to an earlier one.

import { call, promptPath } from "./api.js";
import { fill, h, iconButton } from "./dom.js";
import { ago, bytes, moment, plain, shortVersion } from "./format.js";
import { bareName, score, scoreRows, scoresOf, scoreTable, training } from "./records.js";
import { confirmed, tableBox, toast } from "./widgets.js";

/** The list and, under it, what two of the versions do not share. */
export function versionsPanel(records, { base, isOwn, onrolledback }) {
  const comparison = h("section", { class: "card", "aria-live": "polite" });
  const fits = (record) => record.base_fingerprint === null || record.base_fingerprint === base;
  const chosen = { old: records[1]?.number ?? null, new: records[0].number };
  const at = (number) => records.find((record) => record.number === number);
  const compare = () => fill(comparison, chosen.old === null || chosen.old === chosen.new ? h("p", { class: "muted pad-in" }, records.length < 2 ? "A second version, by upload or by training, can be compared with this one here." : "Choose two different versions to see what changed.") : difference(at(chosen.old), at(chosen.new)));
  const radio = (side, record) => h("input", { type: "radio", name: `compare-${side}`, checked: chosen[side] === record.number, "aria-label": `Compare version ${record.number} as the ${side} one`, onchange: () => { chosen[side] = record.number; compare(); } });

  const rows = records.map((record) => {
    const { method } = training(record);
    const { before, after } = scoresOf(record);
    const [main] = scoreRows(before, after);
    return h(
      "tr",
      {},
      records.length > 1 && h("td", {}, h("div", { class: "row nowrap" }, radio("old", record), radio("new", record))),
      h("td", {}, h("strong", {}, `v${record.number}`), " ", fits(record) ? record.is_current && h("span", { class: "badge good" }, "current") : h("span", { class: "badge warn" }, "another base model")),
      h("td", {}, h("code", { title: record.version }, shortVersion(record.version))),
      h("td", {}, method ? plain(method.type ?? method).replaceAll("_", " ") : "uploaded"),
      h("td", { class: "num" }, main ? score(main.name, main.after) : "–"),
      h("td", { class: "num" }, bytes(record.num_bytes)),
      h("td", { class: "when", title: moment(record.created) }, ago(record.created)),
      h("td", { class: "num" }, isOwn && !record.is_current && fits(record) && iconButton("history", `Roll back to v${record.number}`, () => rollBack(record, onrolledback), { text: true, kind: "slim" })),
    );
  });
  compare();
  const head = [records.length > 1 && "Old / new", "Version", "Content", "Made by", "Score", "Size", "Published", ""].filter((text) => text !== false);
  return h(
    "div",
    { class: "stack" },
    h("section", { class: "card" }, tableBox("Versions", h("table", { class: "list" }, h("thead", {}, h("tr", {}, head.map((text) => (text ? h("th", { scope: "col", class: ["Score", "Size"].includes(text) ? "num" : "" }, text) : h("td", {}))))), h("tbody", {}, rows)))),
    comparison,
  );
}

async function rollBack(record, done) {
  const name = bareName(record.id);
  if (!(await confirmed(`Roll ${name} back to version ${record.number}?`, "New requests get that version from the next moment on; requests in flight finish on theirs. The newer versions stay.", "Roll back"))) return;
  try {
    await call("POST", promptPath(record.id, "/rollback"), { json: { to: record.number } });
    toast(`${name} is version ${record.number} again`, "history");
    await done();
  } catch (error) {
    toast(error.message, "cross");
  }
}

function difference(old, recent) {
  const was = flatten(described(old));
  const is = flatten(described(recent));
  const names = [...new Set([...was.keys(), ...is.keys()])].sort();
  const changed = names.filter((name) => was.get(name) !== is.get(name));
  const [a, b] = [scoresOf(old).after, scoresOf(recent).after];
  const cell = (values, name, sign) => h("td", { class: values.has(name) ? sign : "muted" }, values.has(name) ? values.get(name) : "–");
  return [
    h("header", {}, h("h2", {}, `v${old.number} → v${recent.number}`), h("span", { class: "small muted" }, `${changed.length} changed, ${names.length - changed.length} equal`)),
    (a || b) && scoreTable(a, b, [`v${old.number}`, `v${recent.number}`]),
    tableBox(
      "What changed",
      h(
        "table",
        { class: "list diff" },
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Field"), h("th", { scope: "col" }, `v${old.number}`), h("th", { scope: "col" }, `v${recent.number}`))),
        h("tbody", {}, changed.map((name) => h("tr", {}, h("th", { scope: "row", class: "mono" }, name), cell(was, name, "gone"), cell(is, name, "come")))),
      ),
    ),
  ];
}

function described(record) {
  const { manifest, provenance, num_bytes: size, verified } = record;
  return { ...manifest, size, verified, provenance };
}

/** Every leaf of a JSON object by its path, as text. */
function flatten(value, path = "", found = new Map()) {
  if (value !== null && typeof value === "object" && Object.keys(value).length) {
    for (const [name, inner] of Object.entries(value)) flatten(inner, path ? `${path}.${name}` : name, found);
  } else if (path && value !== null && value !== undefined) found.set(path, typeof value === "string" ? value : JSON.stringify(value));
  return found;
}
