// Prometheus' text format, read in the browser, and percentiles of its histograms.

const SAMPLE = /^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"/g;

/** Name -> `[{ labels, value }]`. */
export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = line[0] === "#" ? null : SAMPLE.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) labels[name] = value;
    if (!found.has(match[1])) found.set(match[1], []);
    found.get(match[1]).push({ labels, value: Number(match[3].replace("+Inf", "Infinity")) });
  }
  return found;
}

/** The sum of a metric's samples, or null where the server has no such metric. */
export function total(samples, name) {
  return samples.get(name)?.reduce((sum, one) => sum + one.value, 0) ?? null;
}

/** The cumulative buckets of a histogram: `[[upper bound, count], …]`; labels beside `le` are added up. */
export function buckets(samples, name) {
  const sums = new Map();
  for (const { labels, value } of samples.get(`${name}_bucket`) ?? []) {
    const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
    sums.set(bound, (sums.get(bound) ?? 0) + value);
  }
  return [...sums].sort((a, b) => a[0] - b[0]);
}

/** What was counted between two readings of the same buckets. */
export function between(before, after) {
  const old = new Map(before);
  return after.map(([bound, value]) => [bound, value - (old.get(bound) ?? 0)]);
}

/** A percentile by linear interpolation within its bucket, as Prometheus' own `histogram_quantile`; null without data. */
export function quantile(share, cumulative) {
  const all = cumulative.at(-1)?.[1] ?? 0;
  if (!(all > 0)) return null;
  const rank = share * all;
  let low = 0;
  let below = 0;
  for (const [bound, value] of cumulative) {
    if (value >= rank && value > below) return bound === Infinity ? low : low + ((bound - low) * (rank - below)) / (value - below);
    if (bound !== Infinity) low = bound;
    below = value;
  }
  return low;
}
