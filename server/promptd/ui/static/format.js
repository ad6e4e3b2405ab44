// Numbers, sizes, times and tokens as people read them.

const LOCALE = "en-GB";

/** 1234567 -> "1,234,567". */
export function count(value) {
  return value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en-US");
}

/** A number with about three digits that count. */
export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(1);
  const places = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? Math.min(1, digits) : digits;
  return value.toLocaleString("en-US", { minimumFractionDigits: Math.min(places, digits), maximumFractionDigits: places });
}

/** 21392 -> "20.9 KiB". */
export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let size = value;
  let unit = 0;
  while (size >= 1023.5 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${unit === 0 || size >= 100 ? Math.round(size) : size.toFixed(1)} ${units[unit]}`;
}

/** Seconds as "43 ms", "1.2 s", "3 min 20 s", "2 h 5 min". */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  if (seconds < 0.001) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** 0.8383 -> "83.8 %". */
export function percent(value) {
  return value === null || value === undefined ? "–" : `${(value * 100).toFixed(1)} %`;
}

/** Seconds since 1970 as "3 min ago"; the whole time goes into the tooltip. */
export function ago(seconds, now = Date.now() / 1000) {
  if (!seconds) return "–";
  const past = Math.max(0, now - seconds);
  if (past < 45) return "just now";
  if (past < 3600) return `${Math.max(1, Math.round(past / 60))} min ago`;
  if (past < 86400) return `${Math.round(past / 3600)} h ago`;
  if (past < 30 * 86400) return `${Math.round(past / 86400)} d ago`;
  return new Date(seconds * 1000).toLocaleDateString(LOCALE, { dateStyle: "medium" });
}

/** Seconds since 1970 as a whole date and time. */
export function moment(seconds) {
  return seconds ? new Date(seconds * 1000).toLocaleString(LOCALE, { dateStyle: "medium", timeStyle: "medium" }) : "–";
}

/** "sha256:0123456789…" -> "01234567". */
export function shortVersion(version) {
  return version ? version.replace("sha256:", "").slice(0, 8) : "–";
}

/** A JSON value on one line, for a table. */
export function plain(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value;
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : number(value, 4);
  return JSON.stringify(value);
}

/** "num_virtual_tokens" -> "Virtual tokens". */
export function words(name) {
  const text = name.replace(/^num_/, "").replaceAll("_", " ");
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** A token with what would not be seen. */
export function visible(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
}

/** The same with the space in front: most words begin with one. */
export function spaced(text) {
  return visible(text).replace(/^ /, "␣");
}
