// The API's own description as a page: every route with its fields and a request to copy. Reads `/openapi.json`, offline.

import { get } from "./api.js";
import { add, fill, h, icon, iconButton } from "./dom.js";
import { plain } from "./format.js";
import { curl } from "./snippets.js";
import { copy, tableBox } from "./widgets.js";

const MAX_DEPTH = 3;
const BOUNDS = [["minimum", "≥"], ["exclusiveMinimum", ">"], ["maximum", "≤"], ["minLength", "length ≥"], ["maxLength", "length ≤"], ["minItems", "items ≥"], ["maxItems", "items ≤"], ["pattern", "like"]];

/** Show every route, or open the one that the address names: `#/reference/POST/v1/completions`. */
export async function show(root, { parts, signal }) {
  const document = await get("/openapi.json", {}, signal);
  const operations = Object.entries(document.paths).flatMap(([path, item]) => Object.entries(item).map(([method, operation]) => ({ method: method.toUpperCase(), path, operation, tag: operation.tags?.[0] ?? "other" })));
  const list = h("div", { class: "stack" });
  const wanted = parts.length ? `${parts[0]} /${parts.slice(1).join("/")}` : null;
  const search = h("input", { type: "search", "aria-label": "Search routes", placeholder: "Search routes and fields", autocomplete: "off", spellcheck: "false", oninput: () => draw() });
  const texts = new Map(operations.map((one) => [one, `${one.method} ${one.path} ${JSON.stringify(one.operation)}`.toLowerCase()]));

  function draw() {
    const text = search.value.trim().toLowerCase();
    const found = operations.filter((one) => texts.get(one).includes(text));
    const tags = [...new Set(found.map((one) => one.tag))];
    fill(list, tags.map((tag) => h("section", { class: "card" }, h("header", {}, h("h2", {}, tag.charAt(0).toUpperCase() + tag.slice(1))), found.filter((one) => one.tag === tag).map((one) => operationView(document, one, wanted)))));
    if (!found.length) fill(list, h("div", { class: "card empty" }, h("h2", {}, "Nothing found"), h("p", {}, "No route and no field has these letters.")));
  }

  draw();
  add(
    root,
    h("div", { class: "page-head" }, h("div", { class: "grow" }, h("h1", {}, "API reference"), h("p", {}, `promptd ${document.info.version}. OpenAI's wire format wherever it has one: their SDKs work with the address of this server.`)), h("div", { class: "actions" }, h("a", { class: "button", href: "../openapi.json" }, icon("download"), "openapi.json"))),
    h("div", { class: "toolbar" }, h("div", { class: "search grow" }, icon("search"), search)),
    list,
  );
  list.querySelector("details[open]")?.scrollIntoView({ block: "start" });
}

function operationView(document, one, wanted) {
  const { method, path, operation } = one;
  const content = h("div", { class: "operation stack" });
  const view = h(
    "details",
    { class: "route", open: `${method} ${path}` === wanted },
    h("summary", {}, h("span", { class: `badge verb ${method.toLowerCase()}` }, method), h("code", {}, path), h("span", { class: "small muted wide" }, firstLine(operation.description).replaceAll("`", ""))),
    content,
  );
  const build = () => content.children.length || add(content, details(document, one));
  view.addEventListener("toggle", build);
  if (view.open) build();
  return view;
}

function details(document, { method, path, operation }) {
  const rest = operation.description?.trim() ?? "";
  const body = operation.requestBody?.content ?? {};
  const json = body["application/json"]?.schema;
  const parameters = (operation.parameters ?? []).map((one) => ({ name: one.name, place: one.in, required: one.required, schema: one.schema ?? {}, text: one.description }));
  const fields = json ? fieldsOf(document, json) : [];
  const others = Object.keys(body).filter((type) => type !== "application/json");
  const answers = Object.entries(operation.responses ?? {}).map(([status, one]) => `${status}: ${one.description}${one.content ? ` (${Object.keys(one.content).join(", ")})` : ""}`);
  return [
    h("p", { class: "text" }, marked(rest)),
    parameters.length > 0 && fieldTable("Parameters", parameters.map((one) => ({ ...one, name: one.name, note: one.place }))),
    fields.length > 0 && fieldTable("Body", fields),
    others.length > 0 && h("p", { class: "small muted" }, `Body: ${others.join(" or ")}`),
    h("ul", { class: "small muted" }, answers.map((one) => h("li", {}, one))),
    json && h("div", {}, iconButton("copy", "Copy as curl", () => copy(curl(path, example(document, json)), "curl command"), { text: true, kind: "slim" }), h("span", { class: "visually-hidden" }, `${method} ${path}`)),
  ];
}

function fieldTable(title, fields) {
  return h("div", {}, h("h3", {}, title), tableBox(title, h("table", { class: "list fields" }, h("thead", {}, h("tr", {}, ["Field", "Type", "Default", ""].map((text, index) => h(index === 3 ? "td" : "th", index === 3 ? {} : { scope: "col" }, text)))), h("tbody", {}, fields.map((one) => h(
    "tr",
    {},
    h("th", { scope: "row", class: "mono" }, one.name, one.required && h("span", { class: "bad", title: "required" }, " *")),
    h("td", {}, h("code", {}, typeOf(one.schema)), one.note && h("span", { class: "small muted" }, ` ${one.note}`)),
    h("td", { class: "mono" }, one.schema.default === undefined || one.schema.default === null ? "" : plain(one.schema.default)),
    h("td", { class: "small muted" }, [bounds(one.schema), one.schema.description ?? one.text].filter(Boolean).join(". ")),
  ))))));
}

/** Follow `$ref`, and take null out of a choice: what is left is what a caller writes. */
function resolved(document, schema) {
  let found = schema;
  while (found?.$ref) found = { ...found.$ref.slice(2).split("/").reduce((at, name) => at[name], document), ...without(found, "$ref") };
  const choice = found?.anyOf?.filter((one) => one.type !== "null");
  if (choice?.length === 1) return { ...without(found, "anyOf"), ...resolved(document, choice[0]) };
  if (choice) return { ...found, anyOf: choice.map((one) => resolved(document, one)) };
  return found ?? {};
}

function without(object, name) {
  return Object.fromEntries(Object.entries(object).filter(([key]) => key !== name));
}

/** Every field of a body, nested ones by their path. */
function fieldsOf(document, schema, path = "", depth = 0) {
  const whole = resolved(document, schema);
  return Object.entries(whole.properties ?? {}).flatMap(([name, given]) => {
    const inner = resolved(document, given);
    const items = inner.items ? resolved(document, inner.items) : null;
    const own = path ? `${path}.${name}` : name;
    const nested = inner.properties ? inner : items?.properties ? items : null;
    const field = { name: own, schema: items ? { ...inner, items } : inner, required: whole.required?.includes(name) };
    return [field, ...(nested && depth < MAX_DEPTH ? fieldsOf(document, nested, nested === items ? `${own}[]` : own, depth + 1) : [])];
  });
}

function typeOf(schema) {
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.anyOf) return [...new Set(schema.anyOf.map(typeOf))].join(" | ");
  if (schema.type === "array") return `${typeOf(schema.items ?? {})}[]`;
  if (schema.type === "object" && schema.additionalProperties?.type) return `{string: ${schema.additionalProperties.type}}`;
  return schema.format === "binary" ? "file" : (schema.type ?? "any");
}

function bounds(schema) {
  return BOUNDS.filter(([name]) => schema[name] !== undefined).map(([name, sign]) => `${sign} ${schema[name]}`).join(", ");
}

/** A body with the fields that must be there. */
function example(document, schema) {
  const whole = resolved(document, schema);
  const names = whole.required ?? [];
  return Object.fromEntries(names.map((name) => [name, sampleOf(document, whole.properties[name])]));
}

function sampleOf(document, given) {
  const schema = resolved(document, given);
  if (schema.anyOf) return sampleOf(document, schema.anyOf[0]);
  if (schema.enum) return schema.enum[0];
  if (schema.properties) return example(document, schema);
  return { string: "…", integer: schema.minimum ?? 1, number: schema.minimum ?? 1, boolean: true, array: schema.items ? [sampleOf(document, schema.items)] : [], object: {} }[schema.type] ?? "…";
}

/** Texts with `code` in them. */
function marked(text) {
  return text.split("`").map((part, index) => (index % 2 ? h("code", {}, part) : part));
}

function firstLine(text) {
  return text?.trim().split("\n")[0] ?? "";
}
