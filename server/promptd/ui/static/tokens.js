// Token probabilities: the answer token by token, shaded by how sure the model was, with the alternatives of one token.

import { fill, h } from "./dom.js";
import { percent, spaced, visible } from "./format.js";

/** Show the tokens from `start` on; `scored` is OpenAI's `logprobs` of a completion. */
export function tokenView(scored, start) {
  const tokens = scored.tokens.slice(start).map((text, index) => ({
    text,
    share: Math.exp(scored.token_logprobs[start + index] ?? 0),
    top: Object.entries(scored.top_logprobs[start + index] ?? {}).map(([other, value]) => [other, Math.exp(value)]).sort((a, b) => b[1] - a[1]),
  }));
  const detail = h("div", { class: "token-detail", "aria-live": "polite" });
  const buttons = tokens.map((token, index) =>
    h("span", { role: "button", class: "token", tabindex: index === 0 ? "0" : "-1", "aria-label": `${visible(token.text)}, ${percent(token.share)}`, vars: { "--doubt": 1 - token.share }, onfocus: () => choose(index), onpointerenter: () => choose(index) }, visible(token.text)),
  );
  let at = 0;
  function choose(index) {
    buttons[at].tabIndex = -1;
    buttons[at].classList.remove("chosen");
    at = index;
    buttons[at].tabIndex = 0;
    buttons[at].classList.add("chosen");
    const { text, share, top } = tokens[index];
    fill(
      detail,
      h("div", { class: "token-title" }, h("code", {}, spaced(text)), h("span", { class: "muted tabular" }, `${percent(share)} · token ${index + 1} of ${tokens.length}`)),
      h("ol", { class: "label-bars small" }, top.map(([other, value]) => h("li", { class: other === text ? "best" : "" }, h("code", { class: "grow" }, spaced(other)), h("span", { class: "tabular" }, percent(value)), h("div", { class: "bar", "aria-hidden": "true" }, h("i", { vars: { "--share": value } }))))),
    );
  }
  const line = h("div", { class: "answer-text tokens", role: "group", "aria-label": "Tokens; arrow keys move" }, buttons);
  line.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    buttons[Math.min(buttons.length - 1, Math.max(0, at + step))].focus();
  });
  if (tokens.length) choose(0);
  const sum = tokens.reduce((total, token) => total + Math.log(token.share), 0);
  const mean = tokens.length ? Math.exp(sum / tokens.length) : 1;
  return h("div", { class: "token-view" }, line, h("p", { class: "small muted" }, `Geometric mean ${percent(mean)}. The deeper the colour, the less sure.`), detail);
}
