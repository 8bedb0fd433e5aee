// Numbers as people read them. `null` and non-finite values are a dash.

const grouped = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const known = (value) => typeof value === "number" && Number.isFinite(value);

export const count = (value) => (known(value) ? grouped.format(Math.round(value)) : "–");
export const compact = (value) => (known(value) ? short.format(value) : "–");
export const loss = (value) => (known(value) ? value.toFixed(4) : "–");
export const percent = (value) => (value >= 0.0995 ? `${(100 * value).toFixed(0)} %` : value >= 0.001 ? `${(100 * value).toFixed(1)} %` : "< 0.1 %");

/** A value on a chart: four significant digits. */
export const value = (number) => (!known(number) ? "–" : Math.abs(number) >= 10000 ? count(number) : String(Number(number.toPrecision(4))));

/** Seconds as "2 h 05 min", "5 min 20 s", "5 min". */
export function duration(seconds) {
  if (!known(seconds)) return "–";
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  const [large, largeName, small, smallName] = whole < 3600 ? [60, "min", 1, "s"] : whole < 86400 ? [3600, "h", 60, "min"] : [86400, "d", 3600, "h"];
  const rest = Math.floor((whole % large) / small);
  return `${Math.floor(whole / large)} ${largeName}${rest ? ` ${String(rest).padStart(2, "0")} ${smallName}` : ""}`;
}

export function bytes(number) {
  if (!known(number)) return "–";
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (number >= 1000 && unit < units.length - 1) {
    number /= 1000;
    unit += 1;
  }
  return `${unit && number < 100 ? number.toFixed(1) : Math.round(number)} ${units[unit]}`;
}

/** A time as "today 14:05", or the date. */
export function moment(time) {
  const date = typeof time === "string" ? new Date(time) : new Date(time * 1000);
  if (time === null || time === undefined || Number.isNaN(date.valueOf())) return "–";
  const clock = date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  if (date.toDateString() === new Date().toDateString()) return `today ${clock}`;
  return `${date.toLocaleDateString("en-CA")} ${clock}`;
}
