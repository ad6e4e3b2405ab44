// Elements from plain data. Text goes in as text nodes only: nothing here, or anywhere in the console, parses HTML.

const SVG = "http://www.w3.org/2000/svg";
const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "selected", "open", "indeterminate", "readOnly", "multiple"]);

/** Make an element: `h("button", { class: "primary", onclick }, "Run")`. `vars` sets custom CSS properties. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) {
      if (PROPERTIES.has(name) && value === false) element[name] = false;
    } else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "vars") for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (PROPERTIES.has(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  add(element, ...children);
  return element;
}

/** Append elements, texts and lists of them; null and false are nothing. */
export function add(element, ...children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

/** Replace what an element holds. */
export function fill(element, ...children) {
  element.replaceChildren();
  return add(element, ...children);
}

const ICONS = {
  play: "M7 4.5v15l12-7.5z",
  stop: "M6 6h12v12H6z",
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  copy: "M9 9h10v11H9zM5 15V4h10",
  check: "M5 12.5l4.5 4.5L19 7.5",
  cross: "M7 7l10 10M17 7L7 17",
  chevron: "M7 10l5 5 5-5",
  back: "M14 6l-6 6 6 6",
  upload: "M12 16V4M7 9l5-5 5 5M4 16v4h16v-4",
  download: "M12 4v12M7 11l5 5 5-5M4 16v4h16v-4",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  pause: "M8 5v14M16 5v14",
  key: "M8 8a4.5 4.5 0 1 0 0 9 4.5 4.5 0 0 0 0-9zM11.2 9.3L20 4M16.5 6.2l2 3.2M14 7.7l1.5 2.4",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v3M12 19v3M2 12h3M19 12h3M5 5l2 2M17 17l2 2M19 5l-2 2M7 17l-2 2",
  moon: "M20 14.5A8 8 0 0 1 9.5 4 8 8 0 1 0 20 14.5z",
  playground: "M4 5h16v10H10l-4 4v-4H4z",
  prompts: "M4 6h16M4 12h10M4 18h13",
  jobs: "M4 19c5 0 5-13 9-13s3 7 7 7",
  fleet: "M4 20V10M10 20V4M16 20v-7M22 20H2",
  search: "M10.5 4a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13zM15.5 15.5L21 21",
  tune: "M4 7h10M18 7h2M4 17h2M10 17h10M14 5v4M8 15v4",
  access: "M12 3l7 3v6c0 5-3.5 7.5-7 9-3.5-1.5-7-4-7-9V6zM9 12l2 2 4-4",
  write: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  book: "M5 4h12a2 2 0 0 1 2 2v14H7a2 2 0 0 1-2-2zM5 18a2 2 0 0 1 2-2h12",
  external: "M14 4h6v6M20 4l-9 9M18 14v6H4V6h6",
  history: "M4 5v5h5M4.5 10A8 8 0 1 1 4 13M12 8v5l3 2",
};

/** An icon; it means nothing to a screen reader, the text beside it does. */
export function icon(name, extra = "") {
  const svg = document.createElementNS(SVG, "svg");
  for (const [key, value] of Object.entries({ viewBox: "0 0 24 24", class: `icon ${extra}`.trim(), "aria-hidden": "true" })) {
    svg.setAttribute(key, value);
  }
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button with an icon; without `text` the label is for screen readers and the tooltip. */
export function iconButton(name, label, onclick, { text = false, kind = "", ...attributes } = {}) {
  const own = text ? {} : { "aria-label": label, title: label };
  return h("button", { type: "button", class: `button ${kind} ${text ? "" : "square"}`.trim(), onclick, ...own, ...attributes }, icon(name), text && h("span", {}, label));
}

let lastId = 0;

/** An id that no other element has. */
export function newId(prefix) {
  lastId += 1;
  return `${prefix}-${lastId}`;
}

/** Wait until nothing has come for a while, then call once. */
export function debounced(milliseconds, call) {
  let timer = null;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...given), milliseconds);
  };
}
