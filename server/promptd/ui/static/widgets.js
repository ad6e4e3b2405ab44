// Dialogs, toasts, menus, tabs, a combobox, a place to drop files: each keyboard-driven and named for screen readers.

import { add, debounced, fill, h, icon, iconButton, newId } from "./dom.js";

/** Say something for a moment. */
export function toast(message, kind = "check") {
  const shown = h("div", { class: "toast" }, icon(kind), h("span", {}, message));
  document.getElementById("toasts").append(shown);
  setTimeout(() => shown.remove(), 6000);
}

/** An error as a box that stays. */
export function errorNotice(error) {
  const where = error.param ? ` (${error.param})` : "";
  return h("div", { class: "notice bad", role: "alert" }, icon("cross"), h("div", {}, error.message, error.code && h("code", { class: "reason" }, `${error.code}${where}`)));
}

/** Show a dialog; `build(close)` makes its content. Returns a promise of what `close` was given, null on Escape. */
export function dialog(build, { small = false } = {}) {
  return new Promise((resolve) => {
    let result = null;
    const box = h("dialog", { class: small ? "small" : "" });
    const close = (value = null) => {
      result = value;
      box.close();
    };
    add(box, build(close));
    const heading = box.querySelector("h2");
    if (heading) {
      heading.id ||= newId("title");
      box.setAttribute("aria-labelledby", heading.id);
    }
    box.addEventListener("close", () => {
      box.remove();
      resolve(result);
    });
    document.body.append(box);
    box.showModal();
  });
}

/** A box for a wide table; where it scrolls, the keyboard can scroll it. */
export function tableBox(label, ...children) {
  const box = h("div", { class: "table-wrap" }, children);
  const look = () => {
    const scrolls = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight;
    if (!scrolls) for (const name of ["tabindex", "role", "aria-label"]) box.removeAttribute(name);
    else for (const [name, value] of [["tabindex", "0"], ["role", "region"], ["aria-label", label]]) box.setAttribute(name, value);
  };
  const observer = new ResizeObserver(look);
  observer.observe(box);
  for (const child of box.children) observer.observe(child);
  return box;
}

/** A list of facts: `[[name, value, tooltip]]`. */
export function facts(entries) {
  return h("dl", { class: "facts" }, entries.filter(Boolean).map(([name, value, title]) => h("div", { title }, h("dt", {}, name), h("dd", {}, value))));
}

/** Ask before something that cannot be taken back. Returns a promise of true or false. */
export function confirmed(title, text, action, { danger = false, typed = null } = {}) {
  return dialog((close) => {
    const go = h("button", { type: "submit", class: `button primary ${danger ? "danger" : ""}`, disabled: typed !== null }, action);
    const id = newId("typed");
    const input = typed && h("input", { type: "text", id, autocomplete: "off", spellcheck: "false", oninput: () => (go.disabled = input.value !== typed) });
    const submit = (event) => {
      event.preventDefault();
      close(true);
    };
    return h(
      "form",
      { onsubmit: submit },
      h("h2", {}, title),
      h("p", { class: "muted" }, text),
      typed && h("div", { class: "field" }, h("label", { for: id }, "Type ", h("code", {}, typed), " to confirm"), input),
      h("footer", {}, h("button", { type: "button", class: "button", onclick: () => close() }, "Cancel"), go),
    );
  }, { small: true }).then(Boolean);
}

/** A button that opens a list of actions: `[{ label, icon, onclick | href }]`. */
export function menu(button, items, { up = false } = {}) {
  const list = h("div", { class: `menu-list ${up ? "up" : ""}`, role: "menu", hidden: true });
  for (const item of items) {
    const content = [item.icon && icon(item.icon), item.label];
    const common = { role: "menuitem", tabindex: "-1" };
    list.append(
      item.href
        ? h("a", { ...common, href: item.href, onclick: () => toggle(false) }, content)
        : h("button", { ...common, type: "button", onclick: () => { toggle(false); item.onclick(); } }, content),
    );
  }
  const root = h("div", { class: "menu" }, button, list);
  button.setAttribute("aria-haspopup", "menu");
  button.setAttribute("aria-expanded", "false");
  function toggle(open) {
    list.hidden = !open;
    button.setAttribute("aria-expanded", String(open));
    if (open) list.firstElementChild.focus();
  }
  button.addEventListener("click", () => toggle(list.hidden));
  root.addEventListener("focusout", (event) => {
    if (!root.contains(event.relatedTarget)) toggle(false);
  });
  root.addEventListener("keydown", (event) => {
    const entries = [...list.children];
    const at = entries.indexOf(document.activeElement);
    if (event.key === "Escape" && !list.hidden) {
      toggle(false);
      button.focus();
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (list.hidden) toggle(true);
      else entries[(at + (event.key === "ArrowDown" ? 1 : entries.length - 1)) % entries.length].focus();
    }
  });
  return root;
}

/** Tabs: `[{ id, label, build() }]`; a panel is built when it is first shown. */
export function tabs(label, entries, chosen = entries[0].id) {
  const bar = h("div", { class: "tabs", role: "tablist", "aria-label": label });
  const panel = h("div", { role: "tabpanel", tabindex: "0", id: newId("panel") });
  const built = new Map();
  const buttons = entries.map((entry) =>
    h("button", { type: "button", role: "tab", id: newId("tab"), "aria-controls": panel.id, onclick: () => show(entry.id) }, entry.label),
  );
  bar.append(...buttons);
  bar.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = (buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length;
    show(entries[next].id);
    buttons[next].focus();
  });
  function show(id) {
    entries.forEach((entry, index) => {
      const isChosen = entry.id === id;
      buttons[index].setAttribute("aria-selected", String(isChosen));
      buttons[index].tabIndex = isChosen ? 0 : -1;
      if (!isChosen) return;
      panel.setAttribute("aria-labelledby", buttons[index].id);
      if (!built.has(id)) built.set(id, entry.build());
      fill(panel, built.get(id));
    });
  }
  show(chosen);
  return { element: h("div", {}, bar, panel), show };
}

/** One of a few: `[[value, text], …]`. */
export function segments(label, options, value, onchange) {
  const buttons = options.map(([one, text]) =>
    h("button", { type: "button", "aria-pressed": String(one === value), onclick: () => {
      buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(options[index][0] === one)));
      onchange(one);
    } }, text),
  );
  return h("div", { class: "segments", role: "group", "aria-label": label }, buttons);
}

/** A text field that finds things: `find(text)` returns `[{ id, content }]`, `onpick(id)` takes one. */
export function combobox(label, placeholder, find, onpick) {
  const list = h("div", { class: "combo-list", role: "listbox", id: newId("list"), "aria-label": label, hidden: true });
  const input = h("input", { type: "search", role: "combobox", "aria-label": label, "aria-expanded": "false", "aria-controls": list.id, "aria-autocomplete": "list", autocomplete: "off", spellcheck: "false", placeholder });
  let found = [];
  let at = 0;
  let asked = 0;
  const open = (isOpen) => {
    list.hidden = !isOpen;
    input.setAttribute("aria-expanded", String(isOpen));
    if (!isOpen) input.removeAttribute("aria-activedescendant");
  };
  const pick = (index) => {
    const one = found[index];
    if (!one) return;
    input.value = "";
    open(false);
    onpick(one.id);
  };
  const mark = (index) => {
    at = index;
    [...list.children].forEach((option, place) => option.setAttribute("aria-selected", String(place === at)));
    const current = list.children[at];
    if (!found.length) return;
    input.setAttribute("aria-activedescendant", current.id);
    current.scrollIntoView({ block: "nearest" });
  };
  const refresh = async () => {
    const mine = ++asked;
    const now = await find(input.value.trim());
    if (mine !== asked || document.activeElement !== input) return;
    found = now;
    fill(list, found.map((one, index) => h("div", { role: "option", id: newId("option"), onpointerdown: (event) => { event.preventDefault(); pick(index); } }, one.content)));
    if (!found.length) add(list, h("div", { class: "none", role: "option", "aria-disabled": "true" }, "Nothing found"));
    open(true);
    mark(0);
  };
  input.addEventListener("input", debounced(150, refresh));
  input.addEventListener("focus", refresh);
  input.addEventListener("blur", () => open(false));
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (list.hidden) refresh();
      else if (found.length) mark((at + (event.key === "ArrowDown" ? 1 : found.length - 1)) % found.length);
    } else if (event.key === "Enter" && !list.hidden) {
      event.preventDefault();
      pick(at);
    } else if (event.key === "Escape") open(false);
  });
  return h("div", { class: "combo" }, input, list);
}

/** A place for files: dropped (folders too), or chosen with the keyboard. `ontake(files)` gets `[{ path, file }]`. */
export function dropZone({ title, hint, accept = "", multiple = false, folders = false }, ontake) {
  const chosen = (input) => {
    const files = [...input.files].map((file) => ({ path: file.webkitRelativePath || file.name, file }));
    if (files.length) ontake(files);
    input.value = "";
  };
  const picker = h("input", { type: "file", class: "visually-hidden", "aria-label": title, tabindex: "-1", accept, multiple, onchange: () => chosen(picker) });
  const folderPicker = h("input", { type: "file", class: "visually-hidden", "aria-label": `${title}: a folder`, tabindex: "-1", webkitdirectory: true, onchange: () => chosen(folderPicker) });
  const zone = h(
    "div",
    { class: "drop" },
    icon("upload"),
    h("strong", {}, title),
    h("span", { class: "small" }, hint),
    h("div", { class: "row" }, iconButton("plus", multiple ? "Choose files" : "Choose a file", () => picker.click(), { text: true, kind: "slim" }), folders && iconButton("plus", "Choose a folder", () => folderPicker.click(), { text: true, kind: "slim" })),
    picker,
    folders && folderPicker,
  );
  zone.addEventListener("dragover", (event) => {
    event.preventDefault();
    zone.classList.add("over");
  });
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", async (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    ontake(await droppedFiles(event.dataTransfer));
  });
  return zone;
}

async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map((file) => ({ path: file.name, file }));
  return (await Promise.all(entries.map((entry) => filesOf(entry)))).flat();
}

async function filesOf(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [{ path: entry.fullPath.replace(/^\//, ""), file }];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return (await Promise.all(found.map((one) => filesOf(one)))).flat();
    found.push(...some);
  }
}

/** Copy a text and say so. */
export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    toast(`${what} copied`);
  } catch {
    await dialog((close) =>
      h("div", {}, h("h2", {}, what), h("p", { class: "muted" }, "The browser does not let this page use the clipboard. Copy it from here:"), h("textarea", { rows: "10", readOnly: true, "aria-label": what, value: text, class: "mono" }), h("footer", {}, h("button", { type: "button", class: "button", onclick: () => close() }, "Close"))),
    );
  }
}
