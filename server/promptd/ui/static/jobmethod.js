// The method of a new job: the server's list of methods, with its defaults; only what differs from them is sent.

import { fill, h } from "./dom.js";
import { plain, words } from "./format.js";

const TITLES = {
  residual: ["Residual prompt tuning", "A soft prompt behind a small network with a skip, folded away after training. The steady default."],
  prompt_tuning: ["Prompt tuning", "The virtual tokens' embeddings alone. Fewest moving parts; wants a higher rate and more steps."],
  prefix_tuning: ["Prefix-tuning", "Keys and values of every layer, out of a network. More to learn with, more bytes."],
  p_tuning_v2: ["P-tuning v2", "Keys and values of every layer, directly."],
  low_rank: ["Low-rank prompt", "The prompt as a product of two thin matrices."],
  ulpt: ["Ultra-low-dimensional", "A few numbers through a random projection: tiny, for thousands of users."],
  superpos: ["SuperPos", "Each virtual token a mix of words of the vocabulary."],
};
const FIRST_FIELDS = ["num_virtual_tokens", "num_steps", "batch_size", "learning_rate"];

/** The third step of the form. `before` is the `method` of a job that is repeated. */
export class MethodStep {
  constructor(methods, before) {
    this.methods = methods;
    this.chosen = methods.find((one) => one.id === before?.type) ?? methods.find((one) => one.is_default) ?? methods[0];
    this.values = { ...(before?.[this.chosen.id]?.hyperparameters ?? {}) };
    this.fields = h("div", { class: "stack" });
    const cards = methods.map((method) => {
      const [title, text] = TITLES[method.id] ?? [words(method.id), ""];
      const radio = h("input", { type: "radio", name: "method", value: method.id, checked: method === this.chosen, onchange: () => this.choose(method) });
      return h("label", { class: "method" }, radio, h("span", {}, h("strong", {}, title), h("span", { class: "small muted" }, text)));
    });
    this.element = h("div", { class: "stack" }, h("div", { class: "methods", role: "radiogroup", "aria-label": "Method" }, cards), this.fields);
    this.draw();
  }

  choose(method) {
    this.chosen = method;
    const known = method.hyperparameters;
    this.values = Object.fromEntries(Object.entries(this.values).filter(([name]) => name in known));
    this.draw();
  }

  draw() {
    const { hyperparameters } = this.chosen;
    const first = FIRST_FIELDS.filter((name) => name in hyperparameters);
    const rest = Object.keys(hyperparameters).filter((name) => !first.includes(name));
    const grid = (names) => h("div", { class: "settings-grid" }, names.map((name) => this.field(name, hyperparameters[name])));
    fill(this.fields, grid(first), h("details", { class: "more" }, h("summary", {}, `All settings (${rest.length})`), grid(rest)));
  }

  field(name, { type, default: fallback, choices, expected, nullable }) {
    const id = `set-${name}`;
    const value = this.values[name];
    const label = words(name);
    const set = (given) => {
      if (given === undefined) delete this.values[name];
      else this.values[name] = given;
    };
    if (type === "boolean") {
      const box = h("input", { type: "checkbox", checked: value ?? fallback, onchange: () => set(box.checked === fallback ? undefined : box.checked) });
      return h("label", { class: "check" }, box, label);
    }
    if (choices) {
      const select = h("select", { id, onchange: () => set(select.value === String(fallback) ? undefined : select.value) }, choices.map((one) => h("option", { value: one, selected: one === (value ?? fallback) }, one.replaceAll("_", " "))));
      return h("div", { class: "field" }, h("label", { for: id }, label), select);
    }
    const isNumber = type === "integer" || type === "number";
    const input = h("input", { type: isNumber ? "number" : "text", id, step: type === "integer" ? "1" : "any", placeholder: fallback === null ? (nullable ? "automatic" : "") : plain(fallback), value: value === undefined ? "" : String(value), title: expected ?? "", oninput: () => set(input.value === "" ? undefined : isNumber ? Number(input.value) : input.value) });
    return h("div", { class: "field" }, h("label", { for: id }, label), input);
  }

  /** The `method` of the request. */
  value() {
    const { id } = this.chosen;
    return { type: id, [id]: { hyperparameters: this.values } };
  }
}
