// Fleet: what the engine does right now, and did since this page was opened. Asked only while the page is in sight.

import { ApiError, get, send } from "./api.js";
import { LineChart } from "./charts.js";
import { whileShown } from "./curves.js";
import { add, fill, h, icon } from "./dom.js";
import { bytes, count, duration, number, percent, plain, shortVersion } from "./format.js";
import { between, buckets, parse, quantile, total } from "./prometheus.js";
import { errorNotice, facts, tableBox } from "./widgets.js";

const POLL_MILLISECONDS = 2000;
const NUM_KEPT = 300;
const WINDOW_SECONDS = 300;
const MAX_SHARES = 12;
const HISTOGRAMS = [
  ["promptd_time_to_first_token_seconds", "First token"],
  ["promptd_inter_token_latency_seconds", "Between tokens"],
  ["promptd_request_queue_seconds", "In the queue"],
  ["promptd_request_seconds", "Whole request"],
];

// Kept while the console is open: the page's past is there when one comes back.
const readings = [];

/** Show the page. */
export async function show(root, { signal }) {
  const notice = h("div", { class: "fleet-notice", "aria-live": "polite" });
  const board = h("div", { class: "stack", hidden: true });
  const tiles = h("dl", { class: "stat-tiles" });
  const meters = h("div", { class: "stack" });
  const latency = h("tbody", {});
  const engine = h("div", {});
  const tenants = h("div", {});
  const servers = h("div", {});
  const speed = new LineChart({ label: "Tokens per second over time", isTime: true, height: 200, least: 4, format: count, signal, none: "The first two readings make a line" });
  const rows = new LineChart({ label: "Rows running and waiting over time", isTime: true, height: 200, least: 4, format: count, signal, none: "The first two readings make a line" });
  const card = (title, note, content) => h("section", { class: "card" }, h("header", {}, h("h2", {}, title), note && h("span", { class: "small muted" }, note)), content);
  add(
    root,
    h("div", { class: "page-head" }, h("div", { class: "grow" }, h("h1", {}, "Fleet"), h("p", {}, "What this server's engine does now. Read every two seconds while this page is in sight, and not otherwise."))),
    notice,
    board,
  );
  // Shown with the first reading and not before: what is shown never moves.
  add(
    board,
    tiles,
    h("div", { class: "grid-2" }, card("Tokens per second", "", h("div", { class: "chart-pad" }, speed.element)), card("Rows", "running and waiting", h("div", { class: "chart-pad" }, rows.element))),
    h(
      "div",
      { class: "grid-2" },
      h(
        "div",
        { class: "stack" },
        card("Latency", "of generations", tableBox("Latency", h("table", { class: "list" }, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Time"), ["p50", "p90", "p99"].map((name) => h("th", { scope: "col", class: "num" }, name)), h("th", { scope: "col", class: "num" }, "Count"))), latency))),
        card("Memory", "", h("div", { class: "pad-in" }, meters)),
      ),
      h("div", { class: "stack" }, card("Tenants", "with work here now", tenants), card("Engine", "", h("div", { class: "pad-in" }, engine))),
    ),
    card("Servers", "that share this store", servers),
  );
  await whileShown(async () => {
    try {
      const [text, stats, fleet] = await Promise.all([send("GET", "/metrics", { signal }).then((reply) => reply.text()), forAdmins("/admin/engine", signal), forAdmins("/admin/servers", signal)]);
      readings.push({ at: Date.now() / 1000, samples: parse(text), stats, servers: fleet?.data ?? null });
      if (readings.length > NUM_KEPT) readings.shift();
      const isFresh = !total(readings.at(-1).samples, "promptd_requests_total");
      fill(notice, isFresh && h("div", { class: "notice" }, icon("playground"), h("div", {}, "No request has ended yet. Ask something in the ", h("a", { href: "#/playground" }, "playground"), ", come back, and its timings are here.")), stats === null && h("div", { class: "notice" }, icon("key"), "The engine's own figures need an admin key. The rest comes from the server's metrics."));
      board.hidden = false;
      draw();
    } catch (error) {
      if (error.name === "AbortError") return 0;
      fill(notice, errorNotice(error));
    }
    return POLL_MILLISECONDS;
  }, signal);

  function draw() {
    const last = readings.at(-1);
    const { samples, stats } = last;
    const lines = { made: [], read: [], running: [], waiting: [] };
    readings.forEach((one, index) => {
      lines.running.push([one.at, total(one.samples, "promptd_requests_running")]);
      lines.waiting.push([one.at, total(one.samples, "promptd_requests_waiting")]);
      const before = readings[index - 1];
      const seconds = before ? one.at - before.at : 0;
      const isGap = !before || seconds > 5 * (POLL_MILLISECONDS / 1000);
      lines.made.push([one.at, isGap ? null : rate(before, one, "promptd_generation_tokens_total", seconds)]);
      lines.read.push([one.at, isGap ? null : rate(before, one, "promptd_prompt_tokens_total", seconds)]);
    });
    speed.update([
      { label: "Made", color: "var(--series-1)", points: lines.made, isFilled: true },
      { label: "Read", color: "var(--series-2)", points: lines.read },
    ]);
    rows.update([
      { label: "Running", color: "var(--series-3)", points: lines.running, isFilled: true },
      { label: "Waiting", color: "var(--series-7)", points: lines.waiting },
    ]);
    const hits = total(samples, "promptd_prompt_cache_hits_total");
    const misses = total(samples, "promptd_prompt_cache_misses_total");
    const ended = Object.fromEntries((samples.get("promptd_requests_total") ?? []).map(({ labels, value }) => [labels.outcome, value]));
    fill(
      tiles,
      [
        ["Running", `${count(total(samples, "promptd_requests_running"))}${stats ? ` / ${count(stats.config.max_num_seqs)}` : ""}`, "rows in the batch"],
        ["Waiting", count(total(samples, "promptd_requests_waiting")), "rows in the queue"],
        ["Made", `${count(lines.made.at(-1)[1])}`, "tokens/s"],
        ["Read", `${count(lines.read.at(-1)[1])}`, "tokens/s"],
        ["Prompts resident", count(total(samples, "promptd_prompts_resident")), hits + misses > 0 ? `${percent(hits / (hits + misses))} hits` : "none asked for yet"],
        ["Requests", count((ended.finished ?? 0) + (ended.failed ?? 0) + (ended.aborted ?? 0)), `${count(ended.failed ?? 0)} failed, ${count(ended.aborted ?? 0)} aborted`],
      ].map(([name, value, note]) => h("div", { class: "card" }, h("dt", {}, name), h("dd", {}, h("strong", { class: "tabular" }, value), h("span", { class: "small muted" }, note)))),
    );
    const ratio = total(samples, "promptd_kv_cache_usage_ratio");
    const used = total(samples, "promptd_prompt_cache_bytes");
    const capacity = total(samples, "promptd_prompt_cache_capacity_bytes");
    const resident = total(samples, "process_resident_memory_bytes");
    fill(
      meters,
      meter("K/V of texts", stats ? `${bytes(ratio * stats.config.kv_cache_bytes)} of ${bytes(stats.config.kv_cache_bytes)}` : percent(ratio), ratio),
      meter("K/V of learned prompts", `${bytes(used)} of ${bytes(capacity)}`, capacity ? used / capacity : 0),
      resident !== null && h("div", { class: "row small" }, h("span", { class: "grow muted" }, "The whole process"), h("span", { class: "tabular" }, bytes(resident))),
    );
    const oldest = readings.find((one) => last.at - one.at <= WINDOW_SECONDS);
    fill(latency, HISTOGRAMS.map(([name, label]) => {
      const since = buckets(samples, name);
      const recent = between(buckets(oldest.samples, name), since);
      const isRecent = (recent.at(-1)?.[1] ?? 0) > 0;
      const used = isRecent ? recent : since;
      return h("tr", {}, h("th", { scope: "row" }, label, h("div", { class: "small muted" }, isRecent ? "last 5 minutes" : "since the start")), [0.5, 0.9, 0.99].map((share) => h("td", { class: "num" }, duration(quantile(share, used)))), h("td", { class: "num" }, count(used.at(-1)?.[1] ?? null)));
    }));
    fill(engine, stats ? facts([
      ["Model", stats.model],
      ["Architecture", stats.architecture],
      ["Device", stats.device],
      ["Dtype", stats.dtype],
      ["Fingerprint", shortVersion(stats.fingerprint), stats.fingerprint],
      ["Tokens of a step", count(stats.config.max_num_batched_tokens)],
      ["Last step", `${duration(stats.stats.last_step_seconds)}, ${count(stats.stats.last_step_num_tokens)} ${stats.stats.last_step_num_tokens === 1 ? "token" : "tokens"}`],
      ["Steps", count(stats.stats.steps)],
      ["Preemptions", count(stats.stats.preemptions)],
      ["Text tokens reused", count(stats.stats.cached_tokens)],
      ["Strict", plain(stats.config.strict)],
      ["Numerical errors", number(stats.stats.numerical_errors, 0)],
    ]) : h("p", { class: "muted" }, "–"));
    fill(tenants, sharesView(stats?.shares));
    fill(servers, serversView(last.servers));
  }
}

/** Who has work in the batch and in the queue: rows of each tenant, and its part of all rows. */
function sharesView(shares) {
  if (!shares) return h("p", { class: "pad-in muted" }, "Shown to admins.");
  if (!shares.length) return h("p", { class: "pad-in muted" }, "Nobody has work here now. While several do, each gets its part by weight.");
  const rows = (share) => share.num_running + share.num_waiting;
  const all = shares.reduce((sum, share) => sum + share.num_running, 0) || 1;
  const sorted = shares.toSorted((a, b) => rows(b) - rows(a));
  const body = sorted.slice(0, MAX_SHARES).map((share) => h("tr", {}, h("th", { scope: "row" }, share.key, share.weight !== 1 && h("span", { class: "small muted" }, ` weight ${plain(share.weight)}`)), h("td", { class: "num" }, count(share.num_running)), h("td", { class: "num" }, count(share.num_waiting)), h("td", { class: "share" }, h("div", { class: "row nowrap" }, h("div", { class: "bar grow", "aria-hidden": "true" }, h("i", { vars: { "--share": share.num_running / all } })), h("span", { class: "small tabular" }, percent(share.num_running / all))))));
  return [
    tableBox("Tenants", h("table", { class: "list" }, h("thead", {}, h("tr", {}, [["Tenant"], ["Running", "num"], ["Waiting", "num"], ["Share of rows", "share"]].map(([text, kind = ""]) => h("th", { scope: "col", class: kind }, text)))), h("tbody", {}, body))),
    shares.length > MAX_SHARES && h("div", { class: "list-foot muted" }, `and ${count(shares.length - MAX_SHARES)} more`),
  ];
}

function serversView(servers) {
  if (!servers) return h("p", { class: "pad-in muted" }, "Shown to admins.");
  const speed = (server) => {
    // The others tell of themselves every few seconds only: their last word before this one may be some readings old.
    const told = readings.map((reading) => reading.servers?.find((one) => one.id === server.id && one.at < server.at));
    const old = told.findLast(Boolean);
    return old ? count(Math.max(0, server.generation_tokens - old.generation_tokens) / (server.at - old.at)) : "–";
  };
  const columns = [["Server"], ["Running", "num"], ["Waiting", "num wide"], ["Made/s", "num"], ["Prompts resident", "num wide"], ["K/V in use", "num wide"], ["Up", "num wide"], ["Version", "wide"]];
  return tableBox("Servers", h("table", { class: "list" }, h("thead", {}, h("tr", {}, columns.map(([text, kind = ""]) => h("th", { scope: "col", class: kind }, text)))), h("tbody", {}, servers.map((server) => h(
    "tr",
    {},
    h("th", { scope: "row" }, server.host, h("div", { class: "small muted" }, `${server.model} · process ${server.pid}`)),
    h("td", { class: "num" }, `${count(server.num_requests_running)} / ${count(server.max_num_seqs)}`),
    h("td", { class: "num wide" }, count(server.num_requests_waiting)),
    h("td", { class: "num" }, speed(server)),
    h("td", { class: "num wide" }, count(server.prompts_resident)),
    h("td", { class: "num wide" }, percent(server.kv_cache_usage_ratio)),
    h("td", { class: "num wide" }, duration(server.at - server.started_at)),
    h("td", { class: "wide mono" }, server.version),
  )))));
}

function rate(before, after, name, seconds) {
  const made = total(after.samples, name) - total(before.samples, name);
  return made < 0 ? null : made / seconds; // it counts from zero again after a restart
}

function meter(name, text, share) {
  return h("div", { class: "meter" }, h("div", { class: "row small" }, h("span", { class: "grow" }, name), h("span", { class: "tabular muted" }, text)), h("div", { class: "bar", "aria-hidden": "true" }, h("i", { vars: { "--share": share } })));
}

/** What a route of admins says; null where the key is not an admin's. */
async function forAdmins(path, signal) {
  try {
    return await get(path, {}, signal);
  } catch (error) {
    if (error instanceof ApiError && error.status === 403) return null;
    throw error;
  }
}
