// The server that this page came from, by addresses relative to it: a path in front of `/ui/` is in front of `/v1/` too.
// The API key lives in this module's memory and nowhere else.

const ROOT = new URL("../", document.baseURI);
let key = null;
let askForKey = null;
let asking = null;

/** An answer of the server that says no; `code` and `param` are its words for what is wrong. */
export class ApiError extends Error {
  constructor(status, { message, type = null, code = null, param = null }) {
    super(message);
    this.name = "ApiError";
    Object.assign(this, { status, type, code, param });
  }
}

/** Take or forget the key. */
export function setKey(value) {
  key = value || null;
}

/** Whether requests carry a key. */
export function hasKey() {
  return key !== null;
}

/** Say who asks the reader for a key when the server wants one; it returns a promise of the key, or of null. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** The address of a route, as the reader's own tools would use it. */
export function address(path, query = {}) {
  const url = new URL(path.replace(/^\//, ""), ROOT);
  for (const [name, value] of Object.entries(query)) {
    if (value !== undefined && value !== null && value !== "") url.searchParams.set(name, value);
  }
  return url;
}

/** Send one request; returns the response, or throws `ApiError` (also where nobody answers). */
export async function send(method, path, { json, body, headers = {}, query, signal } = {}) {
  const sent = { ...headers };
  if (json !== undefined) sent["Content-Type"] = "application/json";
  const content = json !== undefined ? JSON.stringify(json) : body;
  for (;;) {
    const used = key;
    if (used !== null) sent.Authorization = `Bearer ${used}`;
    let response;
    try {
      response = await fetch(address(path, query), { method, headers: sent, body: content, signal, cache: "no-store", credentials: "omit" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, { message: "The server does not answer. Is it still running?", code: "unreachable" });
    }
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401 || askForKey === null) throw error;
    if (key === used) {
      asking ??= askForKey(error.code === "missing_api_key" ? null : error.message).finally(() => {
        asking = null;
      });
      const given = await asking;
      if (given === null) throw error;
      key = given;
    }
  }
}

/** Send one request and read JSON. */
export async function call(method, path, options) {
  return (await send(method, path, options)).json();
}

/** Read JSON. */
export function get(path, query, signal) {
  return call("GET", path, { query, signal });
}

/** The base model's name, from a route that tells it alone: `/v1/models` lists every prompt, too. */
export async function baseModel(signal) {
  return (await get("/startupz", {}, signal)).model;
}

/** Read server-sent events as JSON, one by one, until `[DONE]`; an error event is thrown. */
export async function* stream(method, path, options) {
  const response = await send(method, path, options);
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error && !event.object) throw new ApiError(200, event.error);
    yield event;
  }
}

async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      pending += value;
      const lines = pending.split(/\r\n|\n|\r(?!$)/);
      pending = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function errorOf(response) {
  try {
    return new ApiError(response.status, (await response.json()).error);
  } catch {
    return new ApiError(response.status, { message: `HTTP ${response.status}`, code: "not_json" });
  }
}

/** Encode a prompt's id for a path: `owner/name` keeps its slash. */
export function promptPath(id, rest = "") {
  return `/v1/prompts/${id.split("/").map(encodeURIComponent).join("/")}${rest}`;
}
