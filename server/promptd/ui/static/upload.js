// Upload: drop a PEFT folder or a safetensors file, see the server's checks field by field, publish.

import { ApiError, call, promptPath } from "./api.js";
import { add, debounced, fill, h, icon } from "./dom.js";
import { bytes, plain, shortVersion } from "./format.js";
import { configHeader, readUploads } from "./safetensors.js";
import { dialog, dropZone, errorNotice, tableBox } from "./widgets.js";

const PEFT_FIELDS = ["peft_type", "task_type", "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "base_model_name_or_path"];

/** Open the dialog, with files that were dropped already or none. Returns the published record, or null. */
export function openUpload(files = []) {
  return dialog((close) => {
    const content = h("div", { class: "stack" });
    const foot = h("footer", {}, h("button", { type: "button", class: "button", onclick: () => close() }, "Close"));
    const look = (upload) => {
      foot.hidden = true;
      fill(content, review(upload, close));
    };
    const take = async (dropped) => {
      const uploads = await readUploads(dropped);
      if (uploads.length === 1) return look(uploads[0]);
      fill(content, zone, uploads.length ? choice(uploads) : h("div", { class: "notice bad", role: "alert" }, icon("cross"), "There is no .safetensors file among these. A PEFT folder has adapter_model.safetensors and adapter_config.json."));
      return undefined;
    };
    const choice = (uploads) => h("div", { class: "stack tight" }, h("p", {}, `${uploads.length} prompts found. Which one first? `, h("span", { class: "muted" }, "For hundreds: "), h("code", {}, "promptd prompts push FOLDER")), uploads.map((upload) => h("button", { type: "button", class: "button", onclick: () => look(upload) }, upload.path)));
    const zone = dropZone({ title: "Drop a PEFT folder or a .safetensors file", hint: "adapter_config.json and adapter_model.safetensors, or one native or bare file", accept: ".safetensors,.json", multiple: true, folders: true }, take);
    add(content, zone);
    if (files.length) take(files);
    return h("div", {}, h("h2", {}, "Upload a prompt"), content, foot);
  });
}

function review(upload, close) {
  const verdict = h("div", { "aria-live": "polite" });
  const rows = h("tbody", {});
  const publish = h("button", { type: "submit", class: "button primary", disabled: true }, icon("upload"), "Publish");
  const name = h("input", { type: "text", id: "upload-name", value: upload.name, spellcheck: "false", autocomplete: "off", maxlength: "96", oninput: () => { publish.disabled = true; checkSoon(); } });
  let asked = 0;

  const send = (dryRun) => {
    const headers = { "Content-Type": "application/octet-stream", ...(upload.config ? { "X-Promptd-Adapter-Config": configHeader(upload.config) } : {}) };
    return call("PUT", promptPath(name.value.trim()), { body: upload.file, headers, query: { dry_run: dryRun || null } });
  };

  async function check() {
    const mine = ++asked;
    fill(verdict, h("p", { class: "muted" }, "The server is checking …"));
    fill(rows, fields(upload, null, null));
    if (!name.value.trim()) return fill(verdict, h("p", { class: "bad" }, "Give it a name."));
    try {
      const found = await send(true);
      if (mine !== asked) return undefined;
      fill(rows, fields(upload, found, null));
      fill(verdict, h("div", { class: "notice good" }, icon("check"), h("div", {}, "Every check passed. ", found.verified ? "The file names this very base model." : "The file does not name its base model: shapes and sizes fit this one.", " Version ", h("code", {}, shortVersion(found.version)), ".")));
      publish.disabled = false;
    } catch (error) {
      if (mine !== asked) return undefined;
      if (!(error instanceof ApiError)) throw error;
      fill(rows, fields(upload, null, error));
      fill(verdict, errorNotice(error));
      rows.querySelector(".failed").scrollIntoView({ block: "nearest" });
    }
    return undefined;
  }
  const checkSoon = debounced(300, check);

  const submit = async (event) => {
    event.preventDefault();
    publish.disabled = true;
    try {
      close(await send(false));
    } catch (error) {
      fill(verdict, errorNotice(error));
    }
  };
  check();
  return h(
    "form",
    { class: "stack", onsubmit: submit },
    h("div", { class: "field" }, h("label", { for: "upload-name" }, "Name"), name, h("span", { class: "hint" }, "A name that exists gets a new version; the old ones stay.")),
    verdict,
    h("div", { class: "checks" }, tableBox("Checks", h("table", { class: "list" }, h("thead", {}, h("tr", {}, ["Field", "In the file", "Check"].map((text) => h("th", { scope: "col" }, text)))), rows))),
    h("footer", {}, h("button", { type: "button", class: "button", onclick: () => close() }, "Cancel"), publish),
  );
}

/** One row a field: what the file says, and what the server made of it. */
function fields(upload, found, error) {
  const given = [["file", `${upload.path} · ${bytes(upload.file.size)}`]];
  for (const { name, dtype, shape } of upload.header?.tensors ?? []) given.push([name, `${dtype} [${shape.join(", ")}]`]);
  for (const field of PEFT_FIELDS) {
    const value = upload.config?.fields?.[field];
    if (value !== undefined && value !== null) given.push([field, plain(value)]);
  }
  const manifest = found?.manifest;
  if (manifest) {
    for (const field of ["kind", "num_virtual_tokens", "base_fingerprint", "template", "label_words", "stop", "default_sampling", "position_convention"]) {
      const value = manifest[field];
      const isEmpty = value === null || (typeof value === "object" && Object.keys(value).length === 0);
      if (!isEmpty && !given.some(([name]) => name === field)) given.push([field, plain(value)]);
    }
  }
  const at = error ? (error.param ?? "file") : null;
  if (at !== null && !given.some(([name]) => name === at)) given.push([at, "–"]);
  return given.map(([name, value]) => {
    const state = found ? h("span", { class: "badge good" }, icon("check"), "good") : name === at ? h("span", { class: "badge bad" }, icon("cross"), error.code) : h("span", { class: "badge" }, error ? "not judged" : "…");
    return h("tr", { class: name === at ? "failed" : "" }, h("th", { scope: "row", class: "mono" }, name), h("td", { class: "value" }, value), h("td", {}, state));
  });
}
