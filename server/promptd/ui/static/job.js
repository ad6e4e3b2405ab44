// One training job: its curves as they grow, what it scored before and after, its settings, what it said.

import { call, get } from "./api.js";
import { LineChart, smoothed } from "./charts.js";
import { Curves, followCurves, isActive, readCurves, whileShown } from "./curves.js";
import { add, fill, h, icon, iconButton } from "./dom.js";
import { ago, count, duration, moment, number, plain, words } from "./format.js";
import { bar, methodName, stateBadge } from "./jobs.js";
import { scoreTable } from "./records.js";
import { confirmed, facts, segments, toast } from "./widgets.js";

const POLL_MILLISECONDS = 2000;
const SMOOTHING = 0.7;

/** Show the page of one job. */
export async function showJob(root, id, signal) {
  const path = `/v1/fine_tuning/jobs/${encodeURIComponent(id)}`;
  let job = await get(path, {}, signal);
  let curves = new Curves();
  let isSmooth = true;
  const badge = h("span", {});
  const actions = h("div", { class: "actions" });
  const progress = h("section", { class: "card pad stack tight", "aria-label": "Progress" });
  const outcome = h("div", { class: "stack" });
  const log = h("ol", { class: "log" });
  const chart = new LineChart({ label: "Training and validation loss by step", xLabel: "Step", signal, none: "The curves begin with the first step" });

  const act = async (verb) => {
    try {
      job = await call("POST", `${path}/${verb}`);
      drawJob();
    } catch (error) {
      toast(error.message, "cross");
    }
  };
  const cancel = async () => {
    if (await confirmed("Cancel this job?", "It stops within a step and publishes nothing.", "Cancel the job", { danger: true })) await act("cancel");
  };

  function drawJob() {
    fill(badge, stateBadge(job.status));
    const { status } = job;
    fill(
      actions,
      job.fine_tuned_model && h("a", { class: "button primary", href: `#/playground?prompt=${encodeURIComponent(job.fine_tuned_model)}` }, icon("playground"), "Try the prompt"),
      job.fine_tuned_model && h("a", { class: "button", href: `#/prompts/${job.fine_tuned_model}` }, icon("prompts"), "Prompt page"),
      ["running", "queued"].includes(status) && iconButton("pause", "Pause", () => act("pause"), { text: true }),
      status === "paused" && iconButton("play", "Resume", () => act("resume"), { text: true, kind: "primary" }),
      ["running", "queued", "paused"].includes(status) && iconButton("close", "Cancel", cancel, { text: true, kind: "danger" }),
      !isActive(job) && h("a", { class: "button", href: `#/jobs/new?again=${encodeURIComponent(job.id)}` }, icon("history"), "Run again"),
    );
    fill(
      outcome,
      job.error && h("div", { class: "notice bad", role: "alert" }, icon("cross"), h("div", {}, job.error.message, h("code", { class: "reason" }, job.error.code))),
      job.result && h("section", { class: "card" }, h("header", {}, h("h2", {}, "Scores"), h("span", { class: "small muted" }, `on ${count(job.result.scores_after.num_rows)} rows that training did not see`)), scoreTable(job.result.scores_before, job.result.scores_after, ["Before", "After"])),
    );
    drawProgress();
  }

  function drawProgress() {
    const now = curves.progress && isActive(job) ? curves.progress : (job.progress ?? curves.progress);
    const share = now ? now.step / now.num_steps : 0;
    const best = curves.validation.reduce((low, point) => (low === null || point[1] < low[1] ? point : low), null);
    const seconds = job.started_at ? (job.finished_at ?? Date.now() / 1000) - job.started_at : null;
    fill(
      progress,
      h("div", { class: "tiles" }, [
        ["Step", now ? `${count(now.step)} / ${count(now.num_steps)}` : "–"],
        ["Train loss", number(curves.train.at(-1)?.[1] ?? now?.loss ?? null)],
        ["Best validation loss", best ? `${number(best[1])} at ${best[0]}` : "–"],
        ["Speed", now?.tokens_per_second ? `${count(now.tokens_per_second)} tok/s` : "–"],
        isActive(job) ? ["Time left", job.status === "running" ? duration(now?.eta_seconds ?? null) : "–"] : ["Best step", plain(job.result?.best_step)],
        ["Time", duration(seconds)],
      ].map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { class: "tabular" }, value)))),
      isActive(job) && bar(share),
    );
  }

  function drawCurves() {
    chart.update([
      { label: "Train", color: "var(--series-1)", points: isSmooth ? smoothed(curves.train, SMOOTHING) : curves.train },
      { label: "Validation", color: "var(--series-2)", points: curves.validation, isDashed: true },
    ]);
    drawProgress();
    fill(log, curves.messages.toReversed().map((event) => h("li", { class: event.level === "error" ? "bad" : "" }, h("time", { class: "small muted tabular", title: moment(event.created_at) }, new Date(event.created_at * 1000).toLocaleTimeString("en-GB")), h("span", {}, event.message))));
  }

  add(
    root,
    h("a", { class: "crumb", href: "#/jobs" }, icon("back"), "Jobs"),
    h("div", { class: "page-head" }, h("div", { class: "grow" }, h("h1", { class: "mono-title" }, job.prompt), h("div", { class: "row badges" }, badge, h("span", { class: "badge" }, methodName(job)), h("span", { class: "small muted mono" }, job.id), h("span", { class: "small muted", title: moment(job.created_at) }, ago(job.created_at)))), actions),
    h(
      "div",
      { class: "stack" },
      progress,
      outcome,
      h(
        "section",
        { class: "card" },
        h("header", {}, h("h2", {}, "Loss"), h("span", { class: "small muted" }, "nats per target token"), segments("Train curve", [[true, "Smooth"], [false, "Raw"]], true, (value) => { isSmooth = value; drawCurves(); }), segments("Scale", [[false, "Linear"], [true, "Log"]], false, (isLog) => chart.setLog(isLog))),
        h("div", { class: "chart-pad" }, chart.element),
      ),
      h("div", { class: "grid-2" }, settingsCard(job), h("section", { class: "card" }, h("header", {}, h("h2", {}, "What happened")), log)),
    ),
  );
  drawJob();
  if (!isActive(job)) {
    curves = await readCurves(job.id, signal);
    drawCurves();
    return;
  }
  const following = followCurves(job.id, curves, drawCurves, signal);
  following.then(() => !signal.aborted && get(path, {}, signal)).then((last) => {
    if (!last) return;
    job = last;
    drawJob();
    drawCurves();
  }, () => {});
  await whileShown(async () => {
    if (!isActive(job)) return 60_000;
    try {
      job = await get(path, {}, signal);
      drawJob();
    } catch (error) {
      if (error.name !== "AbortError") toast(error.message, "cross");
    }
    return POLL_MILLISECONDS;
  }, signal);
}

function settingsCard(job) {
  const labels = job.label_words ? Object.keys(job.label_words) : [];
  return h(
    "section",
    { class: "card" },
    h("header", {}, h("h2", {}, "Settings")),
    h(
      "div",
      { class: "pad-in stack" },
      facts([
        ["Method", methodName(job)],
        ["Base model", job.model],
        ["Starts from", job.base_prompt ? job.base_prompt.split("@")[0] : "nothing"],
        ["Training file", job.training_file ?? "rows of the request"],
        job.validation_file && ["Validation file", job.validation_file],
        ["Seed", plain(job.seed)],
        job.attempts > 1 && ["Attempts", count(job.attempts)],
        ...Object.entries(job.hyperparameters).map(([name, value]) => [words(name), plain(value)]),
      ]),
      job.template && h("pre", { class: "template" }, job.template),
      labels.length > 0 && h("div", { class: "row" }, labels.slice(0, 40).map((label) => h("span", { class: "badge" }, label)), labels.length > 40 && h("span", { class: "muted" }, `and ${labels.length - 40} more`)),
    ),
  );
}
