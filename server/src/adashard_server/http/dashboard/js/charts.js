// The four charts of a job: what each shows, and how it is read off the steps.

import { Chart } from "./chart.js";
import { bytes, decimals, seconds } from "./format.js";

const PHASES = [
  ["reply", "Reply", "rose"],
  ["apply", "Apply", "teal"],
  ["exchange", "Exchange", "violet"],
  ["wait", "Wait", "amber"],
  ["receive", "Receive", "blue"],
];

const field = (name) => (point) => point[name];
const three = (value) => decimals(value, 3);

/** 20.0 ms as "20 ms", for an axis. */
const round = (format) => (value) => format(value).replace(/\.0+ /, " ");

/** Time of a step in which no shard is busy with it: forward and backward on the workers. */
function outside(point) {
  if (point.interval_s === null) return null; // the first one: nobody knows when it began
  const busy = Object.values(point.phase_s).reduce((sum, value) => sum + value, 0);
  return Math.max(0, point.interval_s - busy);
}

const loss = {
  title: "Loss and gradient norm",
  fromZero: { right: true },
  series: [
    { label: "Gradient norm", colour: "amber", axis: "right", dash: [4, 3], smoothed: true, format: three, read: field("gradient_norm") },
    { label: "Loss", colour: "blue", smoothed: true, optional: true, format: three, read: field("loss") },
  ],
};

const time = {
  title: "Where a step’s time goes",
  axisFormat: round(seconds),
  fromZero: { left: true },
  stacked: true,
  series: [
    { label: "Workers compute", colour: "grey", format: seconds, read: outside },
    ...PHASES.map(([phase, label, colour]) => ({
      label,
      colour,
      format: seconds,
      read: (point) => point.phase_s[phase] ?? 0,
    })),
  ],
};

const update = {
  title: "Update RMS and clip ratio",
  series: [
    { label: "Clip ratio, largest", colour: "violet", dash: [4, 3], smoothed: true, format: three, read: field("clip_ratio") },
    { label: "Update RMS", colour: "teal", smoothed: true, format: three, read: field("update_rms") },
  ],
};

const traffic = {
  title: "Bytes per step",
  axisFormat: round(bytes),
  incrs: Array.from({ length: 45 }, (_, power) => 2 ** power),
  fromZero: { left: true },
  series: [
    { label: "Gradients pushed", colour: "blue", filled: true, format: bytes, read: field("pushed_bytes") },
    { label: "Weights pulled", colour: "rose", dash: [4, 3], format: bytes, read: field("pulled_bytes") },
  ],
};

/** Make all charts in a container; what follows it in the page is shown while there is no step. */
export function makeCharts(container, announce) {
  const charts = [loss, time, update, traffic].map((one) => new Chart(container, one, announce));
  return {
    update: (points) => {
      container.hidden = points.length === 0;
      container.nextElementSibling.hidden = points.length > 0;
      for (const chart of charts) chart.update(points);
    },
    redraw: () => {
      for (const chart of charts) chart.redraw();
    },
  };
}
