// Numbers as people read them. Every function takes null or undefined and says "–" then.

const NONE = "–";
const integers = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });

const known = (number) => number !== null && number !== undefined && Number.isFinite(number);

export const integer = (number) => (known(number) ? integers.format(number) : NONE);

/** Three to four significant digits; very large or small numbers with an exponent. */
export function number(value, digits = 3) {
  if (!known(value)) return NONE;
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3 || size >= 1e6) return value.toExponential(1).replace("e+", "e");
  if (size >= 1000) return integers.format(value);
  return value.toPrecision(Math.max(digits, Math.ceil(Math.log10(size))));
}

/** A fixed number of decimals, so that a number that moves does not change its width. */
export const decimals = (value, count) => (known(value) ? value.toFixed(count) : NONE);

/** Learning rates: 0.01, 3.1e-3. */
export function rate(value) {
  if (!known(value)) return NONE;
  if (value === 0) return "0";
  return Math.abs(value) >= 0.01 ? String(Number(value.toPrecision(3))) : value.toExponential(2);
}

export function bytes(value) {
  if (!known(value)) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  let size = value;
  while (size >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? size : short(size)} ${units[unit]}`;
}

/** 1,300,000 as "1.30 M". */
export function count(value) {
  if (!known(value)) return NONE;
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
    if (value >= size) return `${short(value / (unit === "k" ? 1e3 : size))} ${unit}`;
  }
  return integer(value);
}

export function seconds(value) {
  if (!known(value)) return NONE;
  if (value === 0) return "0 s";
  if (value < 1e-3) return `${short(value * 1e6)} µs`;
  if (value < 1) return `${short(value * 1e3)} ms`;
  if (value < 100) return `${short(value)} s`;
  return duration(value);
}

export function duration(value) {
  if (value < 100) return `${Math.round(value)} s`;
  if (value < 7200) return `${Math.round(value / 60)} min`;
  if (value < 48 * 3600) return `${Math.round(value / 3600)} h`;
  return `${Math.round(value / 86400)} days`;
}

export const ago = (value) => (value < 1.5 ? "now" : `${duration(value)} ago`);

export function percent(ratio) {
  if (!known(ratio)) return NONE;
  const value = ratio * 100;
  return `${value >= 10 ? value.toFixed(0) : value.toPrecision(2)} %`;
}

export const timeOfDay = (text) => clock.format(new Date(text));

export const plural = (amount, noun) => `${integer(amount)} ${noun}${amount === 1 ? "" : "s"}`;

const short = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));
