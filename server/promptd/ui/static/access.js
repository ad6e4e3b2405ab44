// Access: who may use this server. Keys (shown once, rotated, revoked), what tenants may use, what they have used.

import { ApiError, call, get } from "./api.js";
import { UsagePanel } from "./usage.js";
import { add, fill, h, icon, iconButton } from "./dom.js";
import { ago, count, moment, plain } from "./format.js";
import { copy, confirmed, dialog, errorNotice, menu, tableBox, tabs, toast } from "./widgets.js";

const SCOPES = [
  ["infer", "Ask: completions, chat, labels, embeddings"],
  ["prompts:read", "See and download prompts"],
  ["prompts:write", "Publish, roll back and delete prompts"],
  ["train", "Upload rows and train prompts"],
  ["admin", "Everything on this page, for every tenant"],
];
const LIFETIMES = [[null, "Never"], [30, "In 30 days"], [90, "In 90 days"], [365, "In a year"]];
const GRACES = [[86400, "A day"], [3600, "An hour"], [7 * 86400, "A week"], [0, "Not at all"]];
const LIMITS = [
  ["weight", "Weight", "Part of the batch beside others: 2 gets twice as much as 1"],
  ["requests_per_minute", "Requests a minute", "Empty: no limit"],
  ["tokens_per_minute", "Tokens a minute", "In and out, over all servers. Empty: no limit"],
  ["max_concurrent_requests", "Requests at a time", "Empty: no limit"],
  ["max_prompts", "Prompts", "Names; their versions do not count"],
  ["max_stored_bytes", "Stored bytes", "Prompts, training files, and what open jobs keep"],
  ["max_training_jobs", "Open training jobs", "That wait or run"],
  ["training_steps_per_day", "Training steps a day", "Of jobs made on that day, in UTC"],
];
const STATES = { active: "good", expired: "", revoked: "bad" };

/** Show the page. */
export async function show(root, { query, signal }) {
  const page = new AccessPage(signal);
  const create = iconButton("plus", "New key", () => page.create(), { text: true, kind: "primary" });
  add(root, h("div", { class: "page-head" }, h("div", { class: "grow" }, h("h1", {}, "Access"), h("p", {}, "Keys of tenants, what each tenant may use, and what it has used.")), h("div", { class: "actions" }, create)), page.element);
  create.hidden = true;
  create.hidden = !(await page.load(query.get("tab") ?? "keys"));
}

class AccessPage {
  constructor(signal) {
    this.signal = signal;
    this.element = h("div", { class: "stack" });
    this.keys = h("div", { class: "card" });
    this.tenants = h("div", { class: "card" });
  }

  /** Load everything that this caller may see. Returns whether keys can be made here. */
  async load(tab) {
    const usage = new UsagePanel(this.signal);
    const views = [
      { id: "keys", label: "Keys", build: () => this.keys },
      { id: "tenants", label: "Tenants", build: () => this.tenants },
      { id: "usage", label: "Usage", build: () => usage.element },
    ];
    try {
      await this.reload();
    } catch (error) {
      if (!(error instanceof ApiError) || ![403, 409].includes(error.status)) throw error;
      const isOpen = error.code === "server_is_open";
      await usage.load(isOpen ? "/admin/usage" : "/v1/usage");
      fill(this.element, isOpen ? openServer() : h("div", { class: "notice" }, icon("key"), "Keys and tenants need an admin key. This is what your own tenant has used."), usage.element);
      return false;
    }
    await usage.load("/admin/usage");
    fill(this.element, tabs("Access", views, tab).element);
    return true;
  }

  async reload() {
    const [keys, tenants] = await Promise.all([get("/admin/keys", {}, this.signal), get("/admin/tenants", {}, this.signal)]);
    this.drawKeys(keys.data);
    this.drawTenants(tenants.data);
  }

  drawKeys(keys) {
    if (!keys.length) {
      fill(this.keys, h("div", { class: "empty" }, h("h2", {}, "No keys yet"), h("p", {}, "A key belongs to a tenant and says what its holder may do. Prompts, rates and usage are kept apart by tenant."), h("div", { class: "row" }, iconButton("plus", "Make the first key", () => this.create(), { text: true, kind: "primary" })), h("p", { class: "small" }, "From a shell: ", h("code", {}, "promptd keys create acme"))));
      return;
    }
    const order = { active: 0, expired: 1, revoked: 1 };
    const sorted = keys.toSorted((a, b) => order[a.state] - order[b.state] || a.tenant.localeCompare(b.tenant) || b.created - a.created);
    fill(
      this.keys,
      tableBox("Keys", h("table", { class: "list keys" }, head([["Tenant"], ["Key"], ["State"], ["May", "wide"], ["Made", "wide"], ["Ends", "wide"], [h("span", { class: "visually-hidden" }, "Actions")]]), h("tbody", {}, sorted.map((key) => this.keyRow(key))))),
    );
  }

  keyRow(key) {
    const ends = key.revoked ?? key.expires;
    const isActive = key.state === "active";
    const more = h("button", { type: "button", class: "button quiet slim", "aria-label": `Change key ${key.id}` }, "Change", icon("chevron"));
    return h(
      "tr",
      { class: isActive ? "" : "ended" },
      h("td", {}, h("strong", {}, key.tenant), key.label && h("div", { class: "small muted" }, key.label)),
      h("td", { class: "mono" }, key.id),
      h("td", {}, h("span", { class: `badge ${STATES[key.state]}` }, key.state)),
      h("td", { class: "wide" }, h("div", { class: "row" }, key.scopes.map((scope) => h("span", { class: `badge ${scope === "admin" ? "warn" : ""}` }, scope)))),
      h("td", { class: "when wide", title: moment(key.created) }, ago(key.created)),
      h("td", { class: "when wide", title: moment(ends) }, ends ? (isActive ? until(ends) : ago(ends)) : "never"),
      h("td", { class: "num" }, isActive && menu(more, [{ label: "Rotate", icon: "history", onclick: () => this.rotate(key) }, { label: "Revoke", icon: "cross", onclick: () => this.revoke(key) }])),
    );
  }

  drawTenants(tenants) {
    if (!tenants.length) {
      fill(this.tenants, h("div", { class: "empty" }, h("h2", {}, "No tenants yet"), h("p", {}, "A tenant appears with its first key. For many at once: ", h("code", {}, "promptd apply tenants.yaml"))));
      return;
    }
    const limit = (value) => h("td", { class: "num wide" }, value === null ? h("span", { class: "muted" }, "no limit") : count(value));
    fill(
      this.tenants,
      tableBox("Tenants", h("table", { class: "list" }, head([["Tenant"], ["Keys that work", "num"], ["Weight", "num"], ["Requests/min", "num wide"], ["Tokens/min", "num wide"], ["At a time", "num wide"], [h("span", { class: "visually-hidden" }, "Actions")]]), h("tbody", {}, tenants.map((tenant) => h(
        "tr",
        {},
        h("td", {}, h("strong", {}, tenant.id)),
        h("td", { class: "num" }, count(tenant.active_keys.length)),
        h("td", { class: "num" }, plain(tenant.limits.weight)),
        limit(tenant.limits.requests_per_minute),
        limit(tenant.limits.tokens_per_minute),
        limit(tenant.limits.max_concurrent_requests),
        h("td", { class: "num" }, iconButton("tune", `Limits of ${tenant.id}`, () => this.limit(tenant), { kind: "quiet slim" })),
      ))))),
    );
  }

  async create() {
    const issued = await dialog((close) => {
      const tenant = h("input", { type: "text", id: "key-tenant", maxlength: "64", autocomplete: "off", spellcheck: "false", placeholder: "acme", required: true });
      const label = h("input", { type: "text", id: "key-label", maxlength: "128", autocomplete: "off", placeholder: "for example: the nightly job" });
      const boxes = SCOPES.map(([scope]) => h("input", { type: "checkbox", value: scope, checked: scope !== "admin" }));
      const ends = select("key-ends", LIFETIMES);
      const body = () => ({ tenant: tenant.value.trim(), label: label.value.trim(), scopes: boxes.filter((box) => box.checked).map((box) => box.value), expires_in_seconds: ends.value === "null" ? null : Number(ends.value) * 86400 });
      return ask("New key", "Make the key", close, () => call("POST", "/admin/keys", { json: body() }), [
        field("key-tenant", "Tenant", tenant, "Who holds it. A new name makes a new tenant."),
        field("key-label", "Label", label, "To tell keys apart; nobody but admins sees it."),
        h("fieldset", { class: "scopes" }, h("legend", { class: "label" }, "May"), SCOPES.map(([scope, text], index) => h("label", { class: "check" }, boxes[index], h("span", {}, h("code", {}, scope), h("span", { class: "hint muted" }, ` ${text}`))))),
        field("key-ends", "Ends", ends),
      ]);
    });
    await this.handOver(issued, "New key");
  }

  async rotate(key) {
    const issued = await dialog((close) => {
      const grace = select("key-grace", GRACES);
      return ask(`Rotate ${key.id}?`, "Make its successor", close, () => call("POST", `/admin/keys/${encodeURIComponent(key.id)}/rotate`, { json: { grace_seconds: Number(grace.value) } }), [
        h("p", { class: "muted" }, `A new key of ${key.tenant} that may do the same. The old one works on for a while, so that nothing stops.`),
        field("key-grace", "The old key works on", grace),
      ]);
    });
    await this.handOver(issued, "The successor");
  }

  async revoke(key) {
    if (!(await confirmed(`Revoke ${key.id}?`, `Whoever uses this key of ${key.tenant} is refused within a second, on every server. This cannot be taken back.`, "Revoke", { danger: true }))) return;
    try {
      await call("DELETE", `/admin/keys/${encodeURIComponent(key.id)}`);
      toast(`${key.id} is revoked`, "key");
      await this.reload();
    } catch (error) {
      toast(error.message, "cross");
    }
  }

  async limit(tenant) {
    const inputs = LIMITS.map(([name]) => h("input", { type: "number", id: `limit-${name}`, min: name === "weight" ? "0.01" : "0", step: name === "weight" ? "any" : "1", value: tenant.limits[name] === null ? "" : String(tenant.limits[name]) }));
    const body = () => Object.fromEntries(LIMITS.map(([name], index) => [name, inputs[index].value === "" ? null : Number(inputs[index].value)]));
    const changed = await dialog((close) => ask(`Limits of ${tenant.id}`, "Set the limits", close, () => call("PATCH", `/admin/tenants/${encodeURIComponent(tenant.id)}`, { json: body() }), [h("div", { class: "two" }, LIMITS.map(([name, label, hint], index) => field(`limit-${name}`, label, inputs[index], hint)))]));
    if (!changed) return;
    toast(`The limits of ${tenant.id} hold on every server within a second`);
    await this.reload();
  }

  /** Show a new key, the only time that anybody can. */
  async handOver(issued, title) {
    if (!issued) return;
    await this.reload();
    await dialog((close) =>
      h(
        "div",
        {},
        h("h2", {}, title),
        h("div", { class: "notice warn" }, icon("key"), h("div", {}, "Copy it now. The server keeps no more than a digest of it, so it is never shown again.")),
        h("pre", { class: "sample new-key" }, issued.key),
        h("p", { class: "small muted" }, `For ${issued.tenant}: ${issued.scopes.join(", ")}.`),
        h("footer", {}, iconButton("copy", "Copy", () => copy(issued.key, "Key"), { text: true }), h("button", { type: "button", class: "button primary", onclick: () => close() }, "I have it")),
      ),
    );
  }
}

/** A form in a dialog that closes with what the server answered, and stays with what it refused. */
function ask(title, action, close, send, content) {
  const problem = h("div", { "aria-live": "polite" });
  const go = h("button", { type: "submit", class: "button primary" }, action);
  const submit = async (event) => {
    event.preventDefault();
    go.disabled = true;
    try {
      close(await send());
    } catch (error) {
      fill(problem, errorNotice(error));
      go.disabled = false;
    }
  };
  return h("form", { onsubmit: submit }, h("h2", {}, title), content, problem, h("footer", {}, h("button", { type: "button", class: "button", onclick: () => close() }, "Cancel"), go));
}

function field(id, label, input, hint) {
  if (hint) input.setAttribute("aria-describedby", `${id}-hint`);
  return h("div", { class: "field" }, h("label", { for: id }, label), input, hint && h("span", { class: "hint", id: `${id}-hint` }, hint));
}

function select(id, options) {
  return h("select", { id }, options.map(([value, text]) => h("option", { value: String(value) }, text)));
}

function head(columns) {
  return h("thead", {}, h("tr", {}, columns.map(([text, kind = ""]) => h("th", { scope: "col", class: kind }, text))));
}

function until(seconds) {
  const days = (seconds - Date.now() / 1000) / 86400;
  return days >= 1.5 ? `in ${count(days)} days` : days > 0 ? `in ${count(Math.max(1, days * 24))} h` : "now";
}

function openServer() {
  return h(
    "section",
    { class: "card empty" },
    h("h2", {}, "This server needs no keys"),
    h("p", {}, "It listens on this machine alone, and everybody here is its one tenant. To serve others, start it with a first key; with that one the keys of tenants are made here."),
    h("pre", { class: "sample" }, "export PROMPTD_ADMIN_KEY=$(openssl rand -hex 32)\npromptd serve --host 0.0.0.0"),
  );
}
