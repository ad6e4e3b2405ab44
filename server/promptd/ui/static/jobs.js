// Jobs: every training job with its state, and the loss curves of those that are ticked, on one chart.

import { get } from "./api.js";
import { LineChart, smoothed } from "./charts.js";
import { Curves, followCurves, isActive, readCurves, whileShown } from "./curves.js";
import { add, fill, h, icon } from "./dom.js";
import { ago, count, duration, moment, number, words } from "./format.js";
import { score, scoreChange, scoreRows } from "./records.js";
import { segments, tableBox } from "./widgets.js";

const PAGE_SIZE = 50;
const NUM_COLORS = 8;
const NUM_FIRST = 4;
const MAX_STREAMS = 3; // a browser opens six connections to a server; the rest is for everything else
const BUSY_MILLISECONDS = 2000;
const IDLE_MILLISECONDS = 8000;

const STATES = { queued: ["", false], running: ["info", true], paused: ["warn", false], cancelled: ["", false], succeeded: ["good", false], failed: ["bad", false] };

/** A job's state as a badge. */
export function stateBadge(status) {
  const [kind, isPulsing] = STATES[status] ?? ["", false];
  return h("span", { class: `badge ${kind}` }, isPulsing && h("span", { class: "dot pulse", vars: { "--c": "currentColor" } }), words(status));
}

/** The name of the method of a job. */
export function methodName(job) {
  return String(job.method?.type ?? "residual").replaceAll("_", " ");
}

/** Show the list, one job, or the form for a new one. */
export async function show(root, { parts, query, signal }) {
  if (parts[0] === "new") return (await import("./newjob.js")).showNewJob(root, query, signal);
  if (parts.length) return (await import("./job.js")).showJob(root, parts[0], signal);
  const first = await get("/v1/fine_tuning/jobs", { limit: PAGE_SIZE }, signal);
  add(
    root,
    h(
      "div",
      { class: "page-head" },
      h("div", { class: "grow" }, h("h1", {}, "Jobs"), h("p", {}, "Training of prompts on the resident model, beside the requests that it answers. Rows of several jobs share passes.")),
      h("div", { class: "actions" }, h("a", { class: "button primary", href: "#/jobs/new" }, icon("plus"), "New job")),
    ),
  );
  if (!first.data.length) {
    add(root, h("div", { class: "card" }, empty()));
    return undefined;
  }
  const board = new Board(signal);
  add(root, board.element);
  board.take(first);
  await whileShown(async () => {
    try {
      board.take(await get("/v1/fine_tuning/jobs", { limit: PAGE_SIZE }, signal));
    } catch (error) {
      if (error.name !== "AbortError") board.say(error.message);
    }
    return board.isBusy ? BUSY_MILLISECONDS : IDLE_MILLISECONDS;
  }, signal);
  return undefined;
}

class Board {
  constructor(signal) {
    this.signal = signal;
    this.jobs = [];
    this.colors = new Map(); // job id -> number of its colour, where it is ticked
    this.curves = new Map(); // job id -> what its events said
    this.numStreams = 0;
    this.which = "validation";
    this.smoothing = 0.6;
    this.isFirst = true;
    this.chart = new LineChart({ label: "Loss of the ticked jobs by step", xLabel: "Step", signal, none: "Tick jobs below to compare their curves" });
    this.body = h("tbody", {});
    this.note = h("p", { class: "small muted", "aria-live": "polite" });
    this.foot = h("div", { class: "list-foot" });
    const smoothing = h("input", { type: "range", id: "smoothing", min: "0", max: "0.95", step: "0.05", value: String(this.smoothing), oninput: () => { this.smoothing = Number(smoothing.value); this.draw(); } });
    this.smoothingField = h("label", { class: "row small muted", for: "smoothing", hidden: true }, "Smoothing", smoothing);
    const choose = (which) => {
      this.which = which;
      this.smoothingField.hidden = which !== "train";
      this.draw();
    };
    this.element = h(
      "div",
      { class: "stack" },
      h("section", { class: "card" }, h("header", {}, h("h2", {}, "Loss"), this.smoothingField, segments("Which loss", [["validation", "Validation"], ["train", "Train"]], this.which, choose), segments("Scale", [[false, "Linear"], [true, "Log"]], false, (isLog) => this.chart.setLog(isLog))), h("div", { class: "chart-pad" }, this.chart.element)),
      h("section", { class: "card" }, tableBox("Jobs", h("table", { class: "list jobs" }, h("thead", {}, h("tr", {}, [["Compare"], ["Prompt"], ["State"], ["Progress", "wide"], ["Train loss", "num wide"], ["Score", "num"], ["Change", "num wide"], ["Created", "wide"]].map(([text, kind = ""]) => h("th", { scope: "col", class: kind }, text)))), this.body)), this.foot),
      this.note,
    );
  }

  get isBusy() {
    return this.jobs.some(isActive);
  }

  say(text) {
    fill(this.note, text);
  }

  take(page) {
    this.jobs = page.data;
    this.hasMore = page.has_more;
    this.say("");
    if (this.isFirst) for (const job of this.jobs.slice(0, NUM_FIRST)) this.tick(job, true);
    this.isFirst = false;
    const focused = document.activeElement?.dataset?.job;
    fill(this.body, this.jobs.map((job) => this.row(job)));
    if (focused) [...this.body.querySelectorAll("[data-job]")].find((one) => one.dataset.job === focused)?.focus();
    fill(this.foot, h("span", { class: "muted" }, `${count(this.jobs.length)} ${this.jobs.length === 1 ? "job" : "jobs"}${page.has_more ? ", the newest" : ""}`));
  }

  row(job) {
    const { progress } = job;
    const rows = scoreRows(job.result?.scores_before, job.result?.scores_after);
    const [main] = rows;
    const color = this.colors.get(job.id);
    const href = `#/jobs/${job.id}`;
    const box = h("input", { type: "checkbox", checked: color !== undefined, "aria-label": `Compare ${job.prompt}`, data: { job: job.id }, onchange: () => { this.tick(job, box.checked); this.take({ data: this.jobs, has_more: this.hasMore }); } });
    return h(
      "tr",
      { class: "link", onclick: (event) => { if (!event.target.closest("a, label, input")) location.hash = href; } },
      h("td", {}, h("label", { class: "row nowrap compare" }, box, h("span", { class: "dot", vars: color === undefined ? {} : { "--c": `var(--series-${color})` } }))),
      h("td", {}, h("a", { class: "name mono", href }, job.prompt), h("div", { class: "small muted" }, `${methodName(job)}${job.base_prompt ? `, from ${job.base_prompt.split("@")[0]}` : ""}`)),
      h("td", {}, stateBadge(job.status)),
      h("td", { class: "progress wide" }, progress ? progressOf(job) : h("span", { class: "muted" }, job.status === "queued" ? "waiting" : "–")),
      h("td", { class: "num wide" }, number(progress?.loss ?? null)),
      h("td", { class: "num" }, main ? [score(main.name, main.after), h("div", { class: "small muted" }, main.name.replaceAll("_", " "))] : "–"),
      h("td", { class: `num wide ${main?.isBetter ? "good" : main?.isBetter === false ? "bad" : ""}` }, main ? scoreChange(main) : "–"),
      h("td", { class: "when wide", title: moment(job.created_at) }, ago(job.created_at)),
    );
  }

  tick(job, isTicked) {
    if (!isTicked) this.colors.delete(job.id);
    else if (!this.colors.has(job.id)) {
      const used = new Set(this.colors.values());
      const free = Array.from({ length: NUM_COLORS }, (_, index) => index + 1).find((color) => !used.has(color));
      this.colors.set(job.id, free ?? (this.colors.size % NUM_COLORS) + 1);
      this.load(job);
    }
    this.draw();
  }

  async load(job) {
    if (this.curves.has(job.id)) return;
    const curves = new Curves();
    this.curves.set(job.id, curves);
    try {
      if (isActive(job) && this.numStreams < MAX_STREAMS) {
        this.numStreams += 1;
        await followCurves(job.id, curves, () => this.draw(), this.signal).finally(() => (this.numStreams -= 1));
      } else {
        this.curves.set(job.id, await readCurves(job.id, this.signal));
        if (isActive(job)) setTimeout(() => this.again(job), IDLE_MILLISECONDS);
      }
    } catch (error) {
      if (error.name !== "AbortError") this.say(error.message);
    }
    this.draw();
  }

  again(job) {
    if (this.signal.aborted || !this.colors.has(job.id)) return;
    this.curves.delete(job.id);
    this.load(this.jobs.find((one) => one.id === job.id) ?? job);
  }

  draw() {
    if (this.signal.aborted) return;
    const names = this.jobs.map((job) => job.prompt);
    const series = this.jobs
      .filter((job) => this.colors.has(job.id))
      .map((job) => {
        const curves = this.curves.get(job.id) ?? new Curves();
        const isTwice = names.indexOf(job.prompt) !== names.lastIndexOf(job.prompt);
        const label = isTwice ? `${job.prompt} (${job.id.slice(-4)})` : job.prompt;
        return { label, color: `var(--series-${this.colors.get(job.id)})`, points: this.which === "train" ? smoothed(curves.train, this.smoothing) : curves.validation };
      });
    this.chart.update(series);
  }
}

function progressOf(job) {
  const { progress } = job;
  const steps = h("span", {}, `${count(progress.step)} / ${count(progress.num_steps)}`);
  const time = job.status === "running" ? progress.eta_seconds && `${duration(progress.eta_seconds)} left` : job.finished_at && duration(job.finished_at - job.started_at);
  const line = h("div", { class: "row small tabular muted" }, steps, time && h("span", { class: "push" }, time));
  return isActive(job) ? [line, bar(progress.step / progress.num_steps)] : line;
}

/** A bar for a share of 0 to 1. */
export function bar(share) {
  return h("div", { class: "bar", "aria-hidden": "true" }, h("i", { vars: { "--share": Math.min(1, Math.max(0, share)) } }));
}

function empty() {
  return h(
    "div",
    { class: "empty" },
    h("h2", {}, "No training jobs yet"),
    h("p", {}, "Give rows of inputs and answers, get a prompt that is served the moment it is trained. The base model stays as it is."),
    h("pre", { class: "sample" }, '{"text": "play some jazz", "label": "PlayMusic"}\n{"text": "is it cold in Oslo", "label": "GetWeather"}'),
    h("div", { class: "row" }, h("a", { class: "button primary", href: "#/jobs/new" }, icon("plus"), "Train the first prompt")),
    h("p", { class: "small" }, "OpenAI's SDK works too: ", h("code", {}, "client.fine_tuning.jobs.create(…)")),
  );
}
