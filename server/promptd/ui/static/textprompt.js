// A plain text as a prompt: written here, checked by the server while it is written, published like any other.

import { ApiError, call, promptPath } from "./api.js";
import { debounced, fill, h, icon } from "./dom.js";
import { count, shortVersion } from "./format.js";
import { dialog, errorNotice } from "./widgets.js";

const CHECK_MILLISECONDS = 400;

/** Open the dialog, for a new prompt or for the next version of `record`. Returns the published record, or null. */
export function openTextPrompt(record = null) {
  return dialog((close) => {
    const verdict = h("div", { "aria-live": "polite" });
    const publish = h("button", { type: "submit", class: "button primary", disabled: true }, icon("upload"), "Publish");
    const changed = () => {
      publish.disabled = true;
      checkSoon();
    };
    const name = h("input", { type: "text", id: "text-name", value: record?.id ?? "", readOnly: record !== null, spellcheck: "false", autocomplete: "off", maxlength: "96", placeholder: "concierge", oninput: changed });
    const text = h("textarea", { id: "text-text", rows: "8", placeholder: "You are the concierge of a small hotel in Porto. Answer in two sentences.", value: record?.manifest?.text ?? "", oninput: changed });
    const template = h("textarea", { id: "text-template", class: "mono", rows: "2", spellcheck: "false", placeholder: "{text}", value: record?.manifest?.template ?? "", oninput: changed });
    let asked = 0;

    const send = (dryRun) => call("PUT", promptPath(name.value.trim()), { json: { text: text.value, ...(template.value ? { template: template.value } : {}) }, query: { dry_run: dryRun || null } });

    async function check() {
      const mine = ++asked;
      if (!name.value.trim() || !text.value) return fill(verdict, h("p", { class: "small muted" }, "With a name and a text, the server checks both."));
      try {
        const [found, read] = await Promise.all([send(true), call("POST", "/tokenize", { json: { prompt: text.value, add_special_tokens: false } })]);
        if (mine !== asked) return undefined;
        fill(verdict, h("div", { class: "notice good" }, icon("check"), h("div", {}, `${count(read.count)} ${read.count === 1 ? "token" : "tokens"}, read once and shared by all requests. Version `, h("code", {}, shortVersion(found.version)), ".")));
        publish.disabled = false;
      } catch (error) {
        if (mine !== asked) return undefined;
        if (!(error instanceof ApiError)) throw error;
        fill(verdict, errorNotice(error));
      }
      return undefined;
    }
    const checkSoon = debounced(CHECK_MILLISECONDS, check);

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
      { onsubmit: submit },
      h("h2", {}, record ? `A new text for ${record.id}` : "Write a text prompt"),
      h("p", { class: "muted" }, "A system prompt, instructions, a document: it stands in front of every input. A learned prompt may replace it later under the same name."),
      h("div", { class: "field" }, h("label", { for: "text-name" }, "Name"), name),
      h("div", { class: "field" }, h("label", { for: "text-text" }, "Text"), text),
      h("details", { class: "more", open: Boolean(record?.manifest?.template) }, h("summary", {}, "How an input is asked"), h("div", { class: "field" }, h("label", { for: "text-template" }, "Template"), template, h("span", { class: "hint" }, "What stands around the input; {text} is the input itself."))),
      verdict,
      h("footer", {}, h("button", { type: "button", class: "button", onclick: () => close() }, "Cancel"), publish),
    );
  });
}
