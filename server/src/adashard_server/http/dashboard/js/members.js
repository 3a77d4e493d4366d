// Shards and workers.

import { ago, bytes, count, integer } from "./format.js";
import { fill, head } from "./table.js";

const total = (sizes) => Object.values(sizes).reduce((sum, size) => sum + size, 0);
const brief = (id) => (id.length > 16 ? `${id.slice(0, 8)}…` : id);
const capital = (word) => word[0].toUpperCase() + word.slice(1);

function shardColumns(job) {
  return [
    { title: "#", text: (shard) => String(shard.index) },
    { title: "Address", text: (shard) => shard.address },
    { title: "Host", text: (shard) => `${shard.host} · ${shard.pid}` },
    { title: "Device", text: (shard) => shard.device },
    { title: "Weights", number: true, text: (shard) => bytes(shard.weight_bytes) },
    { title: "State", number: true, text: (shard) => bytes(total(shard.state_bytes)) },
    { title: "Version", number: true, text: (shard) => integer(job() === null ? shard.version : shard.versions[job()]) },
    { title: "Heard", number: true, text: (shard) => ago(shard.renewed_s_ago) },
    { title: "Status", status: (shard) => shard.status, text: (shard) => capital(shard.status) },
  ];
}

const WORKER_COLUMNS = [
  { title: "Rank", text: (worker) => (worker.rank === null ? "–" : String(worker.rank)) },
  { title: "Worker", text: (worker) => brief(worker.id), whole: (worker) => worker.id },
  { title: "Host", text: (worker) => `${worker.host} · ${worker.pid}` },
  { title: "Step", number: true, text: (worker) => integer(worker.step) },
  { title: "Heard", number: true, text: (worker) => ago(worker.renewed_s_ago) },
  { title: "Status", status: (worker) => worker.status, text: (worker) => capital(worker.status) },
];

/** Make the tables; `job()` answers the name of the job that is shown, or null. */
export function makeMembers(job) {
  const shards = document.getElementById("shards");
  const workers = document.getElementById("workers");
  const columns = shardColumns(job);
  head(shards, columns);
  head(workers, WORKER_COLUMNS);
  return {
    showShards: (items) => show(shards, columns, items),
    showWorkers: (items) => show(workers, WORKER_COLUMNS, items),
  };
}

function show(table, columns, items) {
  fill(table, columns, items, (item) => item.id);
  table.hidden = items.length === 0;
  table.closest("section").querySelector(".nothing").hidden = items.length > 0;
}

/** What the workers' card says while nobody takes part. */
export function showNoWorkers(job) {
  const place = job.step > 0 ? `goes on at step ${integer(job.step)}` : "begins";
  document.getElementById("no-workers").textContent =
    `No worker takes part. ${count(job.element_count)} weights stay on the shards: run the training script, and it ${place}.`;
}
