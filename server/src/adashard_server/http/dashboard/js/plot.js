// Drawing with uPlot: lines that are smoothed over a faint trace of the numbers, or stacked areas.

import { colour } from "./colours.js";
import { integer } from "./format.js";
import { quantile, smooth, typical } from "./smoothing.js";

const FONT = '11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
const WHOLE = [1, 2, 5].flatMap((digit) => Array.from({ length: 9 }, (_, zeros) => digit * 10 ** zeros)).sort((a, b) => a - b);

/**
 * Make a plot that fills `box`. Of a definition it reads `stacked` (areas on top of each other, the
 * first series highest), `fromZero` and `incrs`, `axisFormat`, and of each series `colour`, `dash`,
 * `filled`, `smoothed` and `axis` ("left" or "right"). `onCursor(index or null)` tells where the
 * pointer is.
 */
export function makePlot(box, definition, onCursor) {
  const traces = definition.stacked ? stackedTraces(definition) : lineTraces(definition);
  const options = {
    width: box.clientWidth,
    height: box.clientHeight,
    padding: [8, hasRight(definition) ? 0 : 12, 0, 0],
    legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false }, sync: { key: "steps" }, points: definition.stacked ? { show: false } : { size: 6 } },
    scales: {
      x: { time: false, range: (_, first, last) => (first === last ? [first - 1, last + 1] : [first, last]) },
      left: { range: limits(definition, "left") },
      right: { range: limits(definition, "right") },
    },
    axes: makeAxes(definition),
    series: [{}, ...traces.map((trace) => trace.look)],
    hooks: { setCursor: [(plot) => onCursor(plot.cursor.idx)] },
  };
  const plot = new uPlot(options, [[], ...traces.map(() => [])], box);
  new ResizeObserver(() => {
    if (box.clientWidth > 0) plot.setSize({ width: box.clientWidth, height: box.clientHeight });
  }).observe(box);
  return {
    get index() {
      return plot.cursor.idx ?? null;
    },
    draw: (steps, columns) => {
      const shaped = definition.stacked ? columns.map(typical) : columns;
      plot.setData([steps, ...traces.map((trace) => trace.heights(shaped))]);
    },
    redraw: () => plot.redraw(false),
    pointAt: (step) => plot.setCursor({ left: plot.valToPos(step, "x"), top: 10 }),
  };
}

/** The numbers of one step as part of a sentence. */
export function describe(definition, columns, index) {
  return definition.series
    .map((one, entry) => [one, columns[entry][index]])
    .filter(([, value]) => value !== null)
    .map(([one, value]) => `${one.label} ${one.format(value)}`)
    .join(", ");
}

/** The mark of a series in the legend: a line with its dashes, or a block. */
export function swatch(one, block) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const shape = document.createElementNS(svg.namespaceURI, block ? "rect" : "line");
  const dashes = one.dash?.join(" ") ?? "none";
  const attributes = block
    ? { width: 10, height: 10, rx: 2 }
    : { x1: 0, y1: 5, x2: 18, y2: 5, "stroke-width": 2, "stroke-dasharray": dashes };
  for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
  shape.style.setProperty(block ? "fill" : "stroke", `var(--${one.colour})`);
  svg.setAttribute("width", block ? "10" : "18");
  svg.setAttribute("height", "10");
  svg.setAttribute("aria-hidden", "true");
  svg.append(shape);
  return svg;
}

const hasRight = (definition) => definition.series.some((one) => one.axis === "right");

// A trace is how one line is drawn, and its heights given the numbers of all series.

function lineTraces({ series }) {
  return series.flatMap((one, index) => {
    const line = { look: lineLook(one), heights: (columns) => columns[index] };
    if (!one.smoothed) return [line];
    const faint = { ...line, look: { ...line.look, stroke: () => colour(one.colour, 0.25), width: 1, dash: undefined, points: { show: false } } };
    return [faint, { ...line, heights: (columns) => smooth(columns[index]) }];
  });
}

function lineLook(one) {
  return {
    scale: one.axis ?? "left",
    stroke: () => colour(one.colour),
    width: 1.75,
    dash: one.dash,
    fill: one.filled ? () => colour(one.colour, 0.1) : undefined,
    spanGaps: true,
    points: { show: false },
  };
}

// The highest sum is drawn first, and each following one covers the lower part of it.
function stackedTraces({ series }) {
  return series.map((one, index) => ({
    look: { scale: "left", stroke: () => colour("card"), width: 0.75, fill: () => colour(one.colour), points: { show: false } },
    heights: (columns) => {
      const [own, ...below] = columns.slice(index);
      return own.map((value, point) => below.reduce((sum, part) => sum + part[point], value));
    },
  }));
}

function limits(definition, side) {
  const zero = definition.fromZero?.[side] ?? false;
  return (plot, least, most) => {
    if (least === null) return [0, 1];
    const top = definition.stacked ? Math.min(most, 2 * quantile(plot.data[1], 0.9)) : most;
    const margin = (top - least || Math.abs(top) || 1) * 0.08;
    return [zero ? 0 : least - margin, top + (zero ? 0.08 * top || 1 : margin)];
  };
}

function makeAxes(definition) {
  const look = { font: FONT, stroke: () => colour("muted"), ticks: { show: false }, gap: 6 };
  const grid = { stroke: () => colour("grid"), width: 1 };
  const upright = { ...look, size: widest, space: 40, values: definition.axisFormat ? (_, splits) => splits.map(definition.axisFormat) : plain };
  const left = { ...upright, grid, scale: "left", ...(definition.incrs && { incrs: definition.incrs }) };
  const right = { ...upright, grid: { show: false }, scale: "right", side: 1 };
  const bottom = { ...look, grid: { show: false }, size: 24, space: 64, incrs: WHOLE, values: (_, splits) => splits.map(integer) };
  return hasRight(definition) ? [bottom, left, right] : [bottom, left];
}

/** As many decimals as tell neighbouring labels apart, the same for all of them. */
function plain(plot, splits, axis, space, increment) {
  const decimals = Math.max(0, -Math.floor(Math.log10(increment) + 1e-9));
  return splits.map((value) => value.toFixed(decimals));
}

/** Room for the widest label of an axis. */
function widest(plot, labels, axis, cycle) {
  if (cycle > 1) return plot.axes[axis]._size;
  plot.ctx.font = FONT;
  const widths = (labels ?? [""]).map((label) => plot.ctx.measureText(label ?? "").width);
  // After the first look uPlot measures on a canvas that is scaled by the device's pixels.
  return Math.ceil(Math.max(...widths)) + 14;
}
