// Line charts by uPlot, which is fetched when the first one is drawn. Colours come from the stylesheet.

import { h } from "./dom.js";
import { number } from "./format.js";

const HEIGHT = 260;
const STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000]; // whole ones
const SECONDS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600];
let loading = null;

/** uPlot is a classic script that leaves one global. */
function library() {
  loading ??= new Promise((resolve, reject) => {
    const style = h("link", { rel: "stylesheet", href: new URL("vendor/uPlot.min.css", import.meta.url).href });
    const script = h("script", { src: new URL("vendor/uPlot.iife.min.js", import.meta.url).href });
    script.addEventListener("load", () => resolve(window.uPlot));
    script.addEventListener("error", () => reject(new Error("the chart library could not be loaded")));
    document.head.prepend(style);
    document.head.append(script);
  });
  return loading;
}

/** What a CSS colour, variables and all, is on this page now. */
function resolved(color) {
  const probe = h("span", { class: "visually-hidden" });
  probe.style.color = color;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

/**
 * A chart that redraws itself at new data, sizes and themes.
 * `series`: `[{ label, color, points: [[x, y], …], isDashed, isDotted, isFilled }]`, x rising in each.
 */
export class LineChart {
  constructor({ label, xLabel = "", height = HEIGHT, isTime = false, isLog = false, least = -Infinity, format = number, signal, none = "Nothing to draw yet" }) {
    Object.assign(this, { xLabel, height, isTime, isLog, least, format });
    this.host = h("div", { class: "chart-host" });
    this.none = h("div", { class: "chart-none" }, none);
    this.element = h("div", { class: "chart", role: "img", "aria-label": label }, this.host, this.none);
    this.series = [];
    this.plot = null;
    this.shape = "";
    const observer = new ResizeObserver(() => this.resize());
    observer.observe(this.element);
    const retheme = () => this.draw(true);
    document.documentElement.addEventListener("themechange", retheme);
    signal?.addEventListener("abort", () => {
      observer.disconnect();
      document.documentElement.removeEventListener("themechange", retheme);
      this.plot?.destroy();
    });
  }

  /** Take new data. */
  update(series) {
    this.series = series;
    return this.draw(false);
  }

  /** Change the scale of the values. */
  setLog(isLog) {
    this.isLog = isLog;
    return this.draw(true);
  }

  resize() {
    const width = this.element.clientWidth;
    if (this.plot && width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: this.height });
  }

  async draw(isNew) {
    const UPlot = await library();
    const hasData = this.series.some((one) => one.points.length > (this.isTime ? 1 : 0));
    this.none.hidden = hasData;
    this.host.hidden = !hasData;
    const width = this.element.clientWidth;
    if (!hasData || width === 0) return;
    const shape = JSON.stringify(this.series.map(({ label, color, points, isDashed, isDotted, isFilled }) => [label, color, isAlone(points), isDashed, isDotted, isFilled]));
    const data = joined(this.series, this.isLog);
    if (this.plot && !isNew && shape === this.shape) {
      this.plot.setData(data);
      return;
    }
    this.plot?.destroy();
    this.shape = shape;
    this.plot = new UPlot(this.options(UPlot, width), data, this.host);
  }

  options(UPlot, width) {
    const line = resolved("var(--line)");
    const muted = resolved("var(--muted)");
    const font = `12px ${getComputedStyle(document.body).fontFamily}`;
    const axis = { stroke: muted, font, labelFont: font, grid: { stroke: line, width: 1 }, ticks: { show: false } };
    return {
      width,
      height: this.height,
      padding: [12, 32, 0, 0], // half a time stands right of the last tick
      legend: { live: true },
      cursor: { points: { size: 7 }, drag: { x: true, y: false } },
      scales: { x: { time: this.isTime }, y: this.isLog ? { distr: 3 } : { range: (_, low, high) => padded(low, Math.max(high ?? 0, this.least)) } },
      axes: [
        { ...axis, label: this.xLabel || undefined, labelSize: this.xLabel ? 18 : 0, labelGap: 0, size: 30, ...(this.isTime ? { space: 90, incrs: SECONDS, values: (_, ticks) => ticks.map(clock) } : { incrs: STEPS }) },
        { ...axis, size: 52, values: (_, ticks) => tickTexts(ticks, this.format) },
      ],
      series: [
        { label: this.isTime ? "Time" : this.xLabel || "x", value: (_, value) => (value === null || value === undefined ? "–" : this.isTime ? clock(value) : String(value)) },
        ...this.series.map((one) => {
          const stroke = resolved(one.color);
          return {
            label: one.label,
            stroke,
            width: one.isDotted ? 1 : 2,
            dash: one.isDashed ? [6, 4] : undefined,
            fill: one.isFilled ? resolved(`color-mix(in srgb, ${one.color} 12%, transparent)`) : undefined,
            spanGaps: !this.isTime,
            points: { show: isAlone(one.points) || one.isDashed === true, size: 5, fill: stroke },
            value: (_, value) => (value === null || value === undefined ? "–" : this.format(value)),
            paths: UPlot.paths.linear(),
          };
        }),
      ],
    };
  }
}

/** A point that no line leads to must be seen as one, until there is a second. */
function isAlone(points) {
  return points.length < 2;
}

/** One x axis for all: what a series does not have there is null. */
function joined(series, isLog) {
  const xs = [...new Set(series.flatMap((one) => one.points.map(([x]) => x)))].sort((a, b) => a - b);
  const at = new Map(xs.map((x, index) => [x, index]));
  const rows = series.map((one) => {
    const row = new Array(xs.length).fill(null);
    for (const [x, y] of one.points) if (y !== null && (!isLog || y > 0)) row[at.get(x)] = y;
    return row;
  });
  return [xs, ...rows];
}

/** Tick values with as many decimals as their distance needs, and no more. */
function tickTexts(ticks, format) {
  const shown = ticks.filter((one) => one !== null);
  const gap = shown.length > 1 ? Math.min(...shown.slice(1).map((one, index) => one - shown[index])) : 1;
  let places = 0;
  while (places < 6 && Math.abs(gap * 10 ** places - Math.round(gap * 10 ** places)) > 1e-6) places += 1;
  return ticks.map((one) => (one === null ? "" : Math.abs(one) >= 1000 ? format(one) : one.toFixed(places)));
}

function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString("en-GB");
}

function padded(low, high) {
  if (low === null || high === null) return [0, 1];
  const margin = (high - low || Math.abs(high) || 1) * 0.08;
  return [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin];
}

/** Exponential moving average, without the bias of its start; `weight` 0 changes nothing. */
export function smoothed(points, weight) {
  if (!weight) return points;
  let mean = 0;
  let norm = 0;
  return points.map(([x, y]) => {
    mean = mean * weight + y * (1 - weight);
    norm = norm * weight + (1 - weight);
    return [x, mean / norm];
  });
}
