// One prompt: what it is and scores, its versions, the words that its vectors are nearest to, its manifest.

import { call, get, promptPath, send } from "./api.js";
import { add, fill, h, icon, iconButton } from "./dom.js";
import { ago, bytes, count, moment, number, plain, shortVersion, spaced, words } from "./format.js";
import { bareName, labelsOf, labelWords, samples, scoresOf, scoreTable, training } from "./records.js";
import { versionsPanel } from "./versions.js";
import { confirmed, errorNotice, facts, menu, tableBox, tabs, toast } from "./widgets.js";

const NUM_NEIGHBORS = 5;

/** Show the page of one prompt. */
export async function showPrompt(root, id, query, signal) {
  const [record, versions] = await Promise.all([get(promptPath(id), {}, signal), get(promptPath(id, "/versions"), {}, signal)]);
  const isOwn = !record.id.includes("/");
  const reload = () => {
    root.replaceChildren();
    return showPrompt(root, id, new URLSearchParams("tab=versions"), signal);
  };
  const write = async () => {
    const changed = await (await import("./textprompt.js")).openTextPrompt(record);
    if (!changed) return;
    toast(`${changed.id} is published as version ${changed.number}`);
    reload();
  };
  const downloadButton = h("button", { type: "button", class: "button" }, icon("download"), "Download", icon("chevron"));
  add(
    root,
    h("a", { class: "crumb", href: "#/prompts" }, icon("back"), "Prompts"),
    h(
      "div",
      { class: "page-head" },
      h("div", { class: "grow" }, h("h1", { class: "mono-title" }, record.id), h("div", { class: "row badges" }, h("span", { class: "badge" }, record.kind), h("span", { class: "badge" }, `version ${record.number}`), record.visibility === "public" && h("span", { class: "badge info" }, "public"), h("span", { class: `badge ${record.verified ? "good" : "warn"}` }, record.verified ? "base model verified" : "base model not named in the file"))),
      h(
        "div",
        { class: "actions" },
        h("a", { class: "button primary", href: `#/playground?prompt=${encodeURIComponent(record.id)}` }, icon("playground"), "Try it"),
        menu(downloadButton, [
          { label: "As it was uploaded", onclick: () => download(record, "native") },
          { label: "PEFT adapter (zip)", onclick: () => download(record, "peft") },
        ]),
        h("a", { class: "button", href: `#/jobs/new?base=${encodeURIComponent(record.id)}&name=${encodeURIComponent(bareName(record.id))}` }, icon("jobs"), "Train on"),
        isOwn && record.kind === "text" && iconButton("write", "New text", write, { text: true }),
        isOwn && iconButton("trash", "Delete", () => remove(record, versions.data.length), { text: true, kind: "danger" }),
      ),
    ),
    record.provenance?.title && h("p", { class: "lead" }, record.provenance.title),
    tabs(
      `About ${record.id}`,
      [
        { id: "overview", label: "Overview", build: () => overview(record, signal) },
        { id: "versions", label: `Versions (${versions.data.length})`, build: () => versionsPanel(versions.data, { base: record.base_fingerprint, isOwn, onrolledback: reload }) },
        ...(record.kind === "soft" ? [{ id: "neighbors", label: "Nearest words", build: () => neighbors(record, signal) }] : []),
        { id: "manifest", label: "Manifest", build: () => h("div", { class: "card pad" }, h("pre", {}, JSON.stringify({ manifest: record.manifest, provenance: record.provenance }, null, 2))) },
      ],
      query.get("tab") ?? "overview",
    ).element,
  );
}

function overview(record, signal) {
  const trained = training(record);
  const settings = trained.hyperparameters ?? {};
  const { before, after } = scoresOf(record);
  const isHeldOut = Boolean(record.provenance?.held_out?.test);
  const examples = samples(record);
  const labels = labelsOf(record);
  const scored = labelWords(record);
  return h(
    "div",
    { class: "grid-2" },
    h(
      "div",
      { class: "stack" },
      h("section", { class: "card pad" }, facts([
        record.kind !== "text" && ["Virtual tokens", count(record.num_virtual_tokens)],
        ["Size", bytes(record.num_bytes)],
        ["K/V in memory", residency(record, signal), "Keys and values on this server; without them the next request makes them."],
        ["Method", trained.method ? words(plain(trained.method.type ?? trained.method)) : record.kind === "text" ? "written" : "uploaded"],
        ["Published", ago(record.created), moment(record.created)],
        ["Owner", record.owned_by],
        ["Version", shortVersion(record.version), record.version],
        record.behind?.length && ["Stands behind", record.behind.join(", ")],
        trained.best_step !== undefined && ["Best step", count(trained.best_step)],
        trained.seed !== undefined && ["Seed", plain(trained.seed)],
        trained.trainable_params !== undefined && ["Trained parameters", count(trained.trainable_params)],
        trained.parent && ["Started from", plain(trained.parent)],
      ])),
      Object.keys(settings).length > 0 && h("section", { class: "card" }, h("header", {}, h("h2", {}, "Hyper-parameters")), h("div", { class: "pad-in" }, facts(Object.entries(settings).filter(([, value]) => value !== null).map(([name, value]) => [words(name), plain(value)])))),
    ),
    h(
      "div",
      { class: "stack" },
      after && h("section", { class: "card" }, h("header", {}, h("h2", {}, "Scores"), h("span", { class: "small muted" }, rowsOf(after))), scoreTable(before, after, isHeldOut ? undefined : ["Before", "After"])),
      record.manifest.text && h("section", { class: "card" }, h("header", {}, h("h2", {}, "Text"), h("span", { class: "small muted" }, "in front of every input")), h("div", { class: "pad-in" }, h("pre", { class: "template" }, record.manifest.text))),
      h("section", { class: "card" }, h("header", {}, h("h2", {}, "How an input is asked")), h("div", { class: "pad-in stack tight" }, h("pre", { class: "template" }, record.manifest.template ?? "{text}"), labels && h("div", { class: "row" }, labels.map((label) => h("span", { class: "badge", title: scored ? `scored as ${JSON.stringify(scored[label])}` : "a class of the prompt's head" }, label))))),
      examples.length > 0 && h("section", { class: "card" }, h("header", {}, h("h2", {}, "Examples")), h("div", { class: "examples" }, examples.map((one) => h("div", { class: "example" }, h("p", { class: "muted" }, one.input), one.with_prompt && h("p", {}, one.with_prompt), one.bare_model && h("p", { class: "small muted" }, h("span", { class: "badge" }, "bare"), ` ${one.bare_model}`))))),
    ),
  );
}

/** What the server keeps of the prompt now; known a moment after the page. */
function residency(record, signal) {
  const shown = h("span", {}, "…");
  get(promptPath(record.id, "/residency"), {}, signal).then(
    ({ num_bytes: kept }) => fill(shown, kept ? bytes(kept) : "none now"),
    (error) => error.name !== "AbortError" && fill(shown, "–"),
  );
  return shown;
}

function rowsOf(scores) {
  return scores?.num_rows ? `on ${count(scores.num_rows)} held-out rows` : "";
}

function neighbors(record, signal) {
  const panel = h("div", { class: "card" }, h("p", { class: "pad-in muted" }, "Comparing with the whole vocabulary …"));
  get(promptPath(record.id, "/neighbors"), { count: NUM_NEIGHBORS }, signal).then(
    ({ data }) =>
      fill(
        panel,
        h("header", {}, h("h2", {}, "Nearest words"), h("span", { class: "small muted" }, "vocabulary entries by cosine; learned vectors need not be near any")),
        tableBox("Nearest words", h("table", { class: "list neighbors" }, h("thead", {}, h("tr", {}, h("th", { scope: "col", class: "num" }, "Token"), h("th", { scope: "col" }, "Nearest first"))), h("tbody", {}, data.map((one) => h("tr", {}, h("th", { scope: "row", class: "num" }, one.index + 1), h("td", {}, h("div", { class: "row" }, one.neighbors.map((near) => h("span", { class: "word", vars: { "--near": Math.max(0, near.cosine) } }, h("code", {}, spaced(near.token)), h("small", { class: "tabular" }, number(near.cosine, 2)))))))))),
        ),
      ),
    (error) => error.name !== "AbortError" && fill(panel, errorNotice(error)),
  );
  return panel;
}

async function download(record, format) {
  try {
    const response = await send("GET", promptPath(`${record.id}@${record.number}`, "/content"), { query: { format } });
    const link = h("a", { href: URL.createObjectURL(await response.blob()), download: `${bareName(record.id)}.${format === "peft" ? "zip" : "safetensors"}` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  } catch (error) {
    toast(error.message, "cross");
  }
}

async function remove(record, numVersions) {
  const what = numVersions === 1 ? "its only version" : `all its ${numVersions} versions`;
  const isSure = await confirmed(`Delete ${record.id}?`, `The prompt goes with ${what}. Requests that name it will be refused. This cannot be taken back.`, "Delete", { danger: true, typed: record.id });
  if (!isSure) return;
  try {
    await call("DELETE", promptPath(record.id));
    toast(`${record.id} is deleted`, "trash");
    location.hash = "#/prompts";
  } catch (error) {
    toast(error.message, "cross");
  }
}
