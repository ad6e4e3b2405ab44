// Training rows: JSON lines in, checked rows out, every fault with its line: the server's own rules, before it is asked.

import { render, templateFields } from "./records.js";

const MAX_LABELS = 1024;
const ROLES = ["system", "developer", "user", "assistant", "tool"];
const MESSAGE_FIELDS = ["role", "content", "name"];
export const LABEL_TEMPLATE = "{text}\nLabel:";

/** Read JSON lines. Returns `{ rows, problems, kind, labels, numFaulty }`; a problem is `{ line, message }`. */
export function readRows(bytes, { template = null } = {}) {
  const rows = [];
  const problems = [];
  const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  for (const [line, part] of lines(bytes)) {
    let text;
    try {
      text = decoder.decode(part);
    } catch {
      problems.push({ line, message: "not UTF-8" });
      continue;
    }
    if (!text.trim()) continue;
    const found = readRow(text);
    if (typeof found === "string") problems.push({ line, message: found });
    else rows.push({ line, text, ...found });
  }
  const kind = rows.length ? (rows[0].label === null ? "completion" : "label") : null;
  const labels = new Map();
  for (const row of rows) {
    if ((row.label === null) !== (kind === "completion")) {
      const [has, first] = row.label === null ? ["a completion", "a label"] : ["a label", "a completion"];
      problems.push({ line: row.line, message: `has ${has}, but line ${rows[0].line} has ${first}: use one kind` });
    } else if (row.label !== null) labels.set(row.label, (labels.get(row.label) ?? 0) + 1);
    const used = template ?? (kind === "label" ? LABEL_TEMPLATE : null);
    const missing = row.messages ? undefined : templateFields(used).find((name) => !(name in row.fields));
    if (missing !== undefined) problems.push({ line: row.line, message: `template field '${missing}' was not given; given: ${Object.keys(row.fields).sort().join(", ") || "none"}` });
  }
  if (!rows.length && !problems.length) problems.push({ line: 1, message: "no rows at all" });
  if (!problems.length && kind === "label" && (labels.size < 2 || labels.size > MAX_LABELS)) {
    problems.push({ line: rows[0].line, message: `the rows have ${labels.size} different labels, 2 to ${MAX_LABELS} can be told apart` });
  }
  problems.sort((a, b) => a.line - b.line);
  return { rows, problems, kind, labels };
}

/** What the model reads of a row, and what it has to answer. */
export function asRead(row, { template, words }) {
  if (row.messages) return { input: `${row.messages.map((one) => `${one.role}: ${one.content}`).join("\n")}\nassistant: `, target: row.completion };
  const used = template ?? (row.label === null ? null : LABEL_TEMPLATE);
  return { input: render(used, row.fields), target: row.label === null ? row.completion : (words?.[row.label] ?? ` ${row.label}`) };
}

function* lines(bytes) {
  let start = 0;
  let line = 1;
  for (;;) {
    const end = bytes.indexOf(10, start);
    yield [line, bytes.subarray(start, end === -1 ? bytes.length : end)];
    if (end === -1) return;
    start = end + 1;
    line += 1;
  }
}

/** Read a conversation: its last message is the answer. */
function readConversation(row) {
  const others = Object.keys(row).filter((name) => name !== "messages");
  if (others.length) return `a row of messages has no other fields, got ${shown(others)}`;
  const given = row.messages;
  if (!Array.isArray(given) || !given.length) return `'messages' must be a list of at least one message, got ${shown(given)}`;
  for (const [index, one] of given.entries()) {
    const where = `message ${index + 1}`;
    if (one === null || typeof one !== "object" || Array.isArray(one)) return `${where} must be an object, got ${shown(one)}`;
    for (const [name, value] of Object.entries(one)) {
      if (!MESSAGE_FIELDS.includes(name)) return `${where} has the unknown field ${shown(name)}; known: ${MESSAGE_FIELDS.join(", ")}`;
      if (typeof value !== "string") return `${where}: '${name}' must be a string, got ${shown(value)}`;
    }
    if (!ROLES.includes(one.role)) return `${where}: 'role' must be one of ${ROLES.join(", ")}, got ${shown(one.role)}`;
    if (one.content === undefined) return `${where} has no 'content'`;
  }
  const last = given.at(-1);
  if (last.role !== "assistant" || !last.content) return `the last message must be a non-empty one of the assistant, got ${shown(last)}`;
  if (given.length === 1) return "the assistant's message answers to nothing: it is the only one";
  return { fields: {}, label: null, completion: last.content, messages: given.slice(0, -1) };
}

/** Return `{ fields, label, completion, messages? }`, or what is wrong. */
function readRow(text) {
  let row;
  try {
    row = JSON.parse(text);
  } catch (error) {
    return `not JSON (${error.message.split("\n")[0].slice(0, 80)})`;
  }
  if (row === null || typeof row !== "object" || Array.isArray(row)) return `must be an object, got ${shown(row)}`;
  if (!wellFormed(row)) return "has half a character (a lone surrogate)";
  if (Object.hasOwn(row, "messages")) return readConversation(row);
  const targets = ["completion", "label"].filter((name) => Object.hasOwn(row, name));
  if (targets.length !== 1) return `needs exactly one of 'completion' and 'label', got ${Object.keys(row).sort().map((name) => `'${name}'`).join(", ") || "nothing"}`;
  const [target] = targets;
  if (typeof row[target] !== "string" || !row[target]) return `'${target}' must be a non-empty string, got ${shown(row[target])}`;
  if (Object.hasOwn(row, "prompt") && Object.hasOwn(row, "text")) return "has both 'prompt' and 'text'";
  const fields = {};
  for (const [name, value] of Object.entries(row)) {
    if (typeof value === "string" && name !== target) fields[name === "prompt" ? "text" : name] = value;
  }
  return { fields, label: target === "label" ? row.label : null, completion: target === "completion" ? row.completion : null };
}

function wellFormed(value) {
  if (typeof value === "string") return value.isWellFormed();
  if (value === null || typeof value !== "object") return true;
  return Object.entries(value).every(([name, one]) => name.isWellFormed() && wellFormed(one));
}

function shown(value) {
  const text = JSON.stringify(value) ?? String(value);
  return text.length > 80 ? `${text.slice(0, 80)}…` : text;
}
