// What the shards hold for a job, as bars: weights, optimizer state and Adam's beside it.

import { bytes } from "./format.js";

const KINDS = { row: "blue", column: "teal", vector: "violet", momentum: "amber" };
const SHARDS_MAX = 16;

const colourOf = (kind) => KINDS[kind] ?? "rose";
const total = (parts) => parts.reduce((sum, [, size]) => sum + size, 0);

/** Draw the answer of /state; `shards` come by index. The bars of a group have one scale. */
export function showMemory(state, shards) {
  const known = Object.keys(KINDS);
  const kinds = Object.entries(state.by_kind)
    .filter(([, size]) => size > 0)
    .sort(([one], [other]) => known.indexOf(one) - known.indexOf(other));
  const groups = [
    [
      ["Weights", [["grey", state.weight_bytes]]],
      ["Optimizer state", kinds.map(([kind, size]) => [colourOf(kind), size])],
      ["Adam would hold", [["ghost", state.adam_bytes]]],
    ],
    kinds.map(([kind, size]) => [`State: ${kind}`, [[colourOf(kind), size]]]),
    shards
      .filter((shard) => shard.id in state.by_shard)
      .slice(0, SHARDS_MAX)
      .map((shard) => [`State on shard ${shard.index}`, [["grey", state.by_shard[shard.id]]]]),
  ];
  const bars = groups.filter((rows) => rows.length > 0).flatMap((rows) => [rule(), ...group(rows)]);
  document.getElementById("memory").replaceChildren(...bars.slice(1));
}

function group(rows) {
  const most = Math.max(1, ...rows.map(([, parts]) => total(parts)));
  return rows.flatMap(([label, parts]) => bar(label, parts, most));
}

function bar(label, parts, most) {
  const name = document.createElement("dt");
  name.textContent = label;
  const track = document.createElement("dd");
  track.className = "track";
  for (const [colour, size] of parts) {
    const part = document.createElement("i");
    part.classList.toggle("ghost", colour === "ghost");
    if (colour !== "ghost") part.style.background = `var(--${colour})`;
    part.style.width = `${(100 * size) / most}%`;
    track.append(part);
  }
  const amount = document.createElement("dd");
  amount.className = "amount";
  amount.textContent = bytes(total(parts));
  return [name, track, amount];
}

function rule() {
  const line = document.createElement("dd");
  line.className = "rule";
  return line;
}
