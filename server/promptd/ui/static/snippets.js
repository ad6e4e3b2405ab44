// What the reader's own program would send: the same request as curl and as Python.

import { address, hasKey } from "./api.js";

/** A request body as one `curl` command for a POSIX shell. */
export function curl(path, body) {
  const key = hasKey() ? ` \\\n  -H "Authorization: Bearer $PROMPTD_API_KEY"` : "";
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return `curl -sN '${address(path).href.replaceAll("'", "%27")}'${key} \\\n  -H 'Content-Type: application/json' \\\n  -d '${json}'\n`;
}

const OPENAI_FIELDS = new Set(["model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "logprobs"]);

/** A request body as Python: OpenAI's SDK for completions, httpx for what it does not know. */
export function python(path, body) {
  const key = hasKey() ? 'os.environ["PROMPTD_API_KEY"]' : '"none"';
  const imports = hasKey() ? "import os\n\n" : "";
  if (path === "/v1/completions") {
    const named = Object.entries(body).filter(([name]) => OPENAI_FIELDS.has(name));
    const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !OPENAI_FIELDS.has(name) && name !== "stream_options"));
    if (Object.keys(extra).length) named.push(["extra_body", extra]);
    const lines = named.map(([name, value]) => `    ${name}=${literal(value)},`).join("\n");
    const stream = `stream = client.completions.create(\n${lines}\n)\nfor event in stream:\n    print(event.choices[0].text if event.choices else "", end="", flush=True)\n`;
    return `${imports}from openai import OpenAI\n\nclient = OpenAI(base_url=${literal(address("/v1").href)}, api_key=${key})\n${stream}`;
  }
  const headers = hasKey() ? `, headers={"Authorization": "Bearer " + ${key}}` : "";
  return `${imports}import httpx\n\nreply = httpx.post(\n    ${literal(address(path).href)},\n    json=${literal(body, "    ")}${headers},\n    timeout=60,\n)\nreply.raise_for_status()\nfor one in reply.json()["data"]:\n    print(one["label"], max(one["probs"]))\n`;
}

/** A JSON value as a Python literal. */
function literal(value, indent = "    ") {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value === "string") return JSON.stringify(value).replaceAll("\u007f", "\\x7f");
  if (Array.isArray(value)) return `[${value.map((one) => literal(one, indent)).join(", ")}]`;
  if (typeof value === "object") {
    const inside = Object.entries(value).map(([name, one]) => `${indent}    ${JSON.stringify(name)}: ${literal(one, `${indent}    `)},`);
    return inside.length ? `{\n${inside.join("\n")}\n${indent}}` : "{}";
  }
  return String(value);
}
