// A training job's events as curves and messages: read once where the job has ended, followed as they come where not.

import { get, stream } from "./api.js";

const PAGE_SIZE = 1000;
const RETRY_MILLISECONDS = 2000;
export const ENDED = new Set(["succeeded", "failed", "cancelled"]);

/** Whether a job may still change. */
export function isActive(job) {
  return !ENDED.has(job.status);
}

/** What the events of one job have said so far. */
export class Curves {
  constructor() {
    this.train = [];
    this.validation = [];
    this.messages = [];
    this.progress = null;
    this.state = null;
    this.lastId = null;
  }

  /** Take one event, in their order. A job that starts again from a checkpoint overwrites what lies behind it. */
  take(event) {
    this.lastId = event.id;
    if (event.type === "metrics") {
      const { step, loss, validation_loss: validation } = event.data;
      for (const points of [this.train, this.validation]) while (points.length && points.at(-1)[0] >= step) points.pop();
      if (typeof loss === "number") this.train.push([step, loss]);
      if (typeof validation === "number") this.validation.push([step, validation]);
      this.progress = event.data;
      return;
    }
    this.messages.push(event);
    if (event.data?.state) this.state = event.data.state;
  }
}

/** Read all events of a job that has ended. */
export async function readCurves(jobId, signal) {
  const events = [];
  let after = null;
  for (;;) {
    const page = await get(`/v1/fine_tuning/jobs/${encodeURIComponent(jobId)}/events`, { limit: PAGE_SIZE, after }, signal);
    events.push(...page.data);
    if (!page.has_more || !page.data.length) break;
    after = page.last_id;
  }
  const curves = new Curves();
  for (const event of events.reverse()) curves.take(event);
  return curves;
}

/** Follow a job until it ends; `onchange(curves)` at most once a frame. Connects again where the server goes away. */
export async function followCurves(jobId, curves, onchange, signal) {
  let isWaiting = false;
  const changed = () => {
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => {
      isWaiting = false;
      if (!signal.aborted) onchange(curves);
    });
  };
  while (!signal.aborted && !ENDED.has(curves.state)) {
    try {
      const events = stream("GET", `/v1/fine_tuning/jobs/${encodeURIComponent(jobId)}/events`, { query: { stream: true, after: curves.lastId }, signal });
      for await (const event of events) {
        curves.take(event);
        changed();
      }
      if (!ENDED.has(curves.state)) await pause(RETRY_MILLISECONDS, signal);
    } catch (error) {
      if (error.name === "AbortError" || (error.status >= 400 && error.status < 500)) return;
      await pause(RETRY_MILLISECONDS, signal);
    }
  }
  changed();
}

/** Wait, or end at once when the page is left. */
export function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    }, { once: true });
  });
}

/** Call again and again while the page is shown and the window is in sight; `call` returns the next wait in ms. */
export async function whileShown(call, signal) {
  while (!signal.aborted) {
    const wait = document.hidden ? 500 : await call();
    await pause(wait, signal);
  }
}
