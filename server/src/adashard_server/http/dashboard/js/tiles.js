// The row of numbers at the top.

import { bytes, count, decimals, integer, number, percent, plural, rate, seconds } from "./format.js";

// Each answers [value, unit, note].
const TILES = {
  step: ["Step", ({ job, rate: speed }) => [integer(job.step), "", speed > 0 ? `${integer(speed * 60)} a minute` : "standing still"]],
  speed: ["Steps per second", ({ rate: speed }) => [decimals(speed, speed < 10 ? 2 : 1), "", speed > 0 ? `${seconds(1 / speed)} a step` : "no step in 30 s"]],
  loss: ["Loss", ({ newest, meanLoss }) => lossTile(newest, meanLoss)],
  lr: ["Learning rate", ({ newest }) => [rate(newest?.lr_applied), "", lrNote(newest)]],
  state: ["Optimizer state", ({ job }) => [...split(bytes(job.state_bytes)), job.adam_bytes ? `${percent(job.state_bytes / job.adam_bytes)} of Adam’s` : ""]],
  weights: ["Weights", ({ job }) => [...split(bytes(job.weight_bytes)), `${count(job.element_count)} in ${plural(job.parameter_count, "tensor")}`]],
  workers: ["Workers", ({ job }) => [integer(job.worker_count), "", job.worker_count < job.min_workers ? `waits for ${job.min_workers}` : `${job.min_workers} needed to begin`]],
  generation: ["Generation", ({ job }) => [integer(job.generation), "", `on ${plural(job.shard_count, "shard")}`]],
};

function lossTile(newest, mean) {
  if (newest === null) return ["–", "", "waits for a step"];
  if (mean === null) return ["–", "", "opt.log(loss=…) shows it"];
  return [decimals(newest.loss ?? mean, 3), "", `${decimals(mean, 3)} over 50 steps`];
}

function lrNote(newest) {
  if (newest === null) return "waits for a step";
  if (newest.lr_requested === 0) return "relative step";
  return newest.lr_requested === newest.lr_applied ? "as requested" : `${rate(newest.lr_requested)} requested`;
}

const split = (text) => text.split(" ");

/** Make the tiles; answers a function that shows {job, rate, newest, meanLoss}. */
export function makeTiles(container) {
  const parts = Object.entries(TILES).map(([id, [title, read]]) => {
    const tile = document.createElement("dl");
    tile.className = "tile";
    tile.id = `tile-${id}`;
    const label = document.createElement("dt");
    label.textContent = title;
    const value = document.createElement("dd");
    value.className = "value";
    const note = document.createElement("dd");
    note.className = "note";
    tile.append(label, value, note);
    container.append(tile);
    return { read, value, note };
  });
  return (facts) => {
    for (const { read, value, note } of parts) {
      const [text, unit, remark] = read(facts);
      const small = document.createElement("small");
      small.textContent = unit ?? "";
      value.replaceChildren(text, ...(unit ? [small] : []));
      note.textContent = note.title = remark ?? "";
    }
  };
}

/** Mean of the last 50 losses; null if none was logged. */
export function meanLoss(points) {
  const losses = points.slice(-50).map((point) => point.loss).filter((loss) => loss !== null);
  return losses.length === 0 ? null : losses.reduce((sum, loss) => sum + loss, 0) / losses.length;
}
