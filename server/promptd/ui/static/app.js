// The frame: navigation, the state of the server, the key, the theme; and which page is shown.

import { ApiError, baseModel, get, hasKey, onKeyNeeded, setKey } from "./api.js";
import { fill, h, icon, iconButton } from "./dom.js";
import { dialog, errorNotice, toast } from "./widgets.js";

// A page is fetched when it is first shown: `show(main, { parts, query, signal })`.
const PAGES = {
  playground: { title: "Playground", load: () => import("./playground.js") },
  prompts: { title: "Prompts", load: () => import("./prompts.js") },
  jobs: { title: "Jobs", load: () => import("./jobs.js") },
  fleet: { title: "Fleet", load: () => import("./fleet.js") },
  access: { title: "Access", load: () => import("./access.js") },
  reference: { title: "API reference", load: () => import("./reference.js"), isTool: true },
};
const FIRST = "playground";

const main = document.getElementById("main");
const links = new Map();
const serverState = h("div", { class: "server-state" });
let leaving = new AbortController();
let isFirst = true;

function frame() {
  for (const [id, page] of Object.entries(PAGES)) {
    const own = page.isTool ? { class: "button quiet square", "aria-label": page.title, title: page.title } : {};
    links.set(id, h("a", { href: `#/${id}`, ...own }, icon(page.isTool ? "book" : id), !page.isTool && page.title));
  }
  const inNavigation = [...links].filter(([id]) => !PAGES[id].isTool).map(([, link]) => h("li", {}, link));
  const theme = iconButton("moon", "Dark or light", () => window.promptdTheme.toggle(), { kind: "quiet" });
  const showTheme = () => {
    const isDark = window.promptdTheme.isDark();
    fill(theme, icon(isDark ? "sun" : "moon"));
    theme.setAttribute("aria-label", isDark ? "Use the light theme" : "Use the dark theme");
    theme.title = theme.getAttribute("aria-label");
  };
  document.documentElement.addEventListener("themechange", showTheme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.documentElement.dispatchEvent(new CustomEvent("themechange")));
  showTheme();
  fill(
    document.getElementById("side"),
    h("a", { class: "brand", href: `#/${FIRST}` }, h("img", { src: "icon.svg", alt: "" }), "promptd"),
    h("nav", { "aria-label": "Pages" }, h("ul", {}, inNavigation)),
    h(
      "div",
      { class: "side-foot" },
      serverState,
      h("div", { class: "side-tools" }, theme, iconButton("key", "API key", () => chooseKey(), { kind: "quiet keep" }), links.get("reference")),
    ),
  );
}

async function chooseKey() {
  const given = await askKey(null, true);
  if (given === null) return;
  setKey(given);
  toast(given ? "Key in use until this page is closed" : "Key forgotten", "key");
  route();
}

function askKey(problem, isOwnWish = false) {
  return dialog((close) => {
    const input = h("input", { type: "password", id: "api-key", autocomplete: "off", spellcheck: "false", "aria-describedby": "api-key-hint" });
    return h(
      "form",
      { onsubmit: (event) => { event.preventDefault(); close(input.value.trim()); } },
      h("h2", {}, isOwnWish ? "API key" : "This server asks for a key"),
      problem && h("div", { class: "notice bad" }, icon("cross"), problem),
      h("div", { class: "field" }, h("label", { for: "api-key" }, "Key"), input, h("span", { class: "hint", id: "api-key-hint" }, "Kept in this page's memory only: it is gone when the page is closed or reloaded.")),
      h("footer", {}, h("button", { type: "button", class: "button", onclick: () => close() }, "Cancel"), hasKey() && h("button", { type: "button", class: "button", onclick: () => close("") }, "Forget the key"), h("button", { type: "submit", class: "button primary" }, "Use this key")),
    );
  }, { small: true });
}

async function showServer() {
  let model = "promptd";
  let text;
  let kind = "good";
  try {
    model = await baseModel();
    text = `promptd ${(await get("/version")).version} is ready`;
  } catch (error) {
    kind = "bad";
    text = error instanceof ApiError ? error.message : "not reachable";
  }
  fill(serverState, h("span", { class: `dot ${kind}` }), h("div", {}, h("strong", {}, model), h("span", { class: "muted" }, text)));
}

/** Show the page that the address names: `#/prompts/owner/name?version=2`. */
async function route() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [id, ...parts] = path.split("/").map(decodeURIComponent);
  const page = PAGES[id] ?? PAGES[FIRST];
  for (const [name, link] of links) {
    if (PAGES[name] === page) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${page.title} · promptd`;
  try {
    const { show } = await page.load();
    if (signal.aborted) return;
    const root = h("div", {});
    fill(main, root);
    if (!isFirst) {
      scrollTo(0, 0);
      main.focus({ preventScroll: true });
    }
    isFirst = false;
    await show(root, { parts, query: new URLSearchParams(query), signal });
  } catch (error) {
    if (error.name === "AbortError" || signal.aborted) return;
    fill(main, h("div", { class: "page-head" }, h("h1", {}, page.title)), errorNotice(error));
    if (!(error instanceof ApiError)) throw error;
  }
}

onKeyNeeded(askKey);
frame();
addEventListener("hashchange", route);
showServer();
route();
