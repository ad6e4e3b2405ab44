// One column of the playground: what one prompt, or the bare model, makes of the input.

import { call, stream } from "./api.js";
import { add, fill, h, icon, iconButton } from "./dom.js";
import { count, duration, percent } from "./format.js";
import { labelsOf } from "./records.js";
import { curl, python } from "./snippets.js";
import { tokenView } from "./tokens.js";
import { copy, errorNotice, menu, segments } from "./widgets.js";

const SHOWN_ALTERNATIVES = 5;

/** A card that asks one subject: `{ id, record }`; `record` is null for the bare model. */
export class Answer {
  constructor(subject, { color, onremove, makeRequest }) {
    this.subject = subject;
    this.makeRequest = makeRequest;
    this.mode = labelsOf(subject.record) || subject.classifyAs ? "labels" : "text";
    this.stopper = null;
    this.given = null;
    this.body = h("div", { class: "answer-body", "aria-live": "off" });
    this.foot = h("footer", { class: "answer-foot" });
    this.modes = h("div", {});
    const { record } = subject;
    const name = h("h3", { class: "answer-name" }, record ? h("a", { href: `#/prompts/${subject.id}` }, subject.id) : subject.id);
    const about = record ? `v${record.number} · ${record.kind} · ${record.num_virtual_tokens} virtual tokens` : "bare model, no prompt";
    this.element = h(
      "article",
      { class: "card answer", vars: { "--c": color }, "aria-label": `Answer of ${subject.id}` },
      h("header", {}, h("span", { class: "dot" }), h("div", { class: "grow" }, name, h("div", { class: "small muted" }, about)), iconButton("close", `Remove ${subject.id}`, onremove, { kind: "quiet slim" })),
      this.modes,
      this.body,
      this.foot,
    );
    this.showModes();
    this.showIdle();
  }

  showModes() {
    if (!labelsOf(this.subject.record) && !this.subject.classifyAs) return fill(this.modes);
    const change = (mode) => {
      this.mode = mode;
      this.stop();
      this.showIdle();
    };
    return fill(this.modes, h("div", { class: "answer-modes" }, segments("What to ask for", [["labels", "Labels"], ["text", "Text"]], this.mode, change)));
  }

  /** Let the bare model pick among another prompt's labels, or stop that. */
  classifyAs(record) {
    if (this.subject.record || this.subject.classifyAs?.version === record?.version) return;
    this.subject.classifyAs = record;
    this.mode = record ? "labels" : "text";
    this.showModes();
    this.showIdle();
  }

  showIdle() {
    this.given = null;
    fill(this.body, h("p", { class: "muted" }, this.mode === "labels" ? "Run to see how likely each label is." : "Run to see the answer here."));
    fill(this.foot);
  }

  stop() {
    this.stopper?.abort();
    this.stopper = null;
  }

  /** Ask, and show the answer as it comes. */
  async run() {
    this.stop();
    const stopper = new AbortController();
    this.stopper = stopper;
    this.element.setAttribute("aria-busy", "true");
    try {
      const request = this.makeRequest(this.subject, this.mode);
      await (this.mode === "labels" ? this.classify(request, stopper.signal) : this.complete(request, stopper.signal));
    } catch (error) {
      if (error.name === "AbortError") add(this.foot, h("span", { class: "badge" }, "stopped"));
      else fill(this.body, errorNotice(error));
    } finally {
      this.element.setAttribute("aria-busy", "false");
      if (this.stopper === stopper) this.stopper = null;
    }
  }

  async complete(request, signal) {
    const text = h("div", { class: "answer-text streaming" });
    fill(this.body, text);
    fill(this.foot);
    const began = performance.now();
    const given = { request, text: "", prompt: [], tokens: [], versions: [], first: null, last: null, usage: null, reason: null };
    const seen = () => this.showTimes(given, began);
    try {
      for await (const event of stream("POST", request.path, { json: request.body, signal })) {
        given.versions = event.prompt_versions;
        given.usage = event.usage ?? given.usage;
        for (const choice of event.choices) {
          const now = performance.now();
          if (choice.token_ids?.length) given.first ??= now;
          given.last = now;
          given.text += choice.text;
          given.prompt = choice.prompt_token_ids ?? given.prompt;
          given.tokens.push(...(choice.token_ids ?? []));
          given.reason = choice.finish_reason ?? given.reason;
          if (choice.text) {
            const isStart = !text.hasChildNodes();
            text.append(isStart ? choice.text.replace(/^\s+/, "") : choice.text); // the text itself keeps its first space
          }
        }
        seen();
      }
    } finally {
      text.classList.remove("streaming");
    }
    if (!given.text) fill(text, h("span", { class: "muted" }, "An empty answer: the model ended at once."));
    this.given = given;
    this.showTimes(given, began);
    this.showTools(request);
  }

  showTimes(given, began) {
    const first = given.first === null ? null : (given.first - began) / 1000;
    const total = given.last === null ? null : (given.last - began) / 1000;
    const between = given.tokens.length > 1 ? (given.last - given.first) / 1000 : 0;
    const rate = between > 0 ? (given.tokens.length - 1) / between : null;
    const ends = { stop: "complete", length: "at the limit", abort: "aborted" };
    fill(
      this.foot,
      facts([
        ["First token", duration(first)],
        ["Total", duration(total)],
        ["Speed", rate === null ? "–" : `${count(rate)} tok/s`],
        ["Tokens", given.usage ? `${count(given.usage.prompt_tokens)} + ${count(given.usage.completion_tokens)}` : count(given.tokens.length)],
        given.reason && ["End", ends[given.reason] ?? given.reason],
      ]),
    );
  }

  showTools(request, { probabilities = true } = {}) {
    const copyButton = h("button", { type: "button", class: "button quiet slim" }, icon("copy"), "Copy");
    const tools = h(
      "div",
      { class: "row answer-tools" },
      probabilities && this.given.tokens.length > 0 && h("button", { type: "button", class: "button quiet slim", "aria-pressed": "false", onclick: (event) => this.toggleProbabilities(event.currentTarget) }, "Token probabilities"),
      menu(copyButton, [
        { label: "Copy as curl", onclick: () => copy(curl(request.path, request.shown), "curl command") },
        { label: "Copy as Python", onclick: () => copy(python(request.path, request.shown), "Python program") },
        { label: "Copy the answer", onclick: () => copy(this.given?.text ?? this.body.innerText, "Answer") },
      ], { up: true }),
    );
    add(this.foot, tools);
  }

  /** Score the very tokens of the answer in one pass: nothing is sampled again. */
  async toggleProbabilities(button) {
    const isOn = button.getAttribute("aria-pressed") === "true";
    button.setAttribute("aria-pressed", String(!isOn));
    const { given } = this;
    if (isOn) {
      fill(this.body, h("div", { class: "answer-text" }, given.text.trimStart()));
      return;
    }
    button.disabled = true;
    try {
      const body = { model: this.subject.id, prompt: [...given.prompt, ...given.tokens], max_tokens: 0, echo: true, logprobs: SHOWN_ALTERNATIVES };
      given.scored ??= (await call("POST", "/v1/completions", { json: body })).choices[0].logprobs;
      if (this.given === given) fill(this.body, tokenView(given.scored, given.prompt.length));
    } catch (error) {
      fill(this.body, errorNotice(error));
    } finally {
      button.disabled = false;
    }
  }

  async classify(request, signal) {
    fill(this.body, h("p", { class: "muted" }, "Scoring the labels …"));
    fill(this.foot);
    const began = performance.now();
    const reply = await call("POST", request.path, { json: request.body, signal });
    const seconds = (performance.now() - began) / 1000;
    const { labels, probs, label } = reply.data[0];
    const ranked = labels.map((name, index) => [name, probs[index]]).sort((a, b) => b[1] - a[1]);
    this.given = { text: label, tokens: [] };
    fill(
      this.body,
      this.subject.classifyAs && h("p", { class: "small muted asked-as" }, "Asked with the template and labels of ", h("code", {}, this.subject.classifyAs.id)),
      h("ol", { class: "label-bars" }, ranked.map(([name, share], index) => h("li", { class: index === 0 ? "best" : "" }, h("span", { class: "grow" }, name), h("span", { class: "tabular" }, percent(share)), h("div", { class: "bar", "aria-hidden": "true" }, h("i", { vars: { "--share": share } }))))),
    );
    const { usage } = reply;
    fill(this.foot, facts([["Total", duration(seconds)], ["Tokens", count(usage.prompt_tokens)], ["Labels", count(labels.length)]]));
    this.showTools(request, { probabilities: false });
  }
}

function facts(entries) {
  return h("dl", { class: "answer-facts" }, entries.filter(Boolean).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { class: "tabular" }, value))));
}
