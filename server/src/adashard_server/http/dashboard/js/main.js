// Puts the page together: which job is shown, where its numbers come from, and how fresh they are.

import { makeCharts } from "./charts.js";
import { onSchemeChange } from "./colours.js";
import { Events } from "./events.js";
import { Feed } from "./feed.js";
import { duration, integer } from "./format.js";
import { armCopy, showLesson, showShardCommand } from "./lesson.js";
import { makeMembers, showNoWorkers } from "./members.js";
import { showMemory } from "./memory.js";
import { Steps } from "./steps.js";
import { makeTiles, meanLoss } from "./tiles.js";

const one = (id) => document.getElementById(id);
const capital = (word) => word[0].toUpperCase() + word.slice(1);

const steps = new Steps();
const events = new Events();
const tiles = makeTiles(one("tiles"));
const charts = makeCharts(one("charts"), announce);
const members = makeMembers(() => watched);

let feed = null;
let watched = null; // name of the job that is shown; null while there is none
let job = null; // its newest status
let shards = [];
let historyRead = false; // since the stream was opened
let arrived = null; // what the stream tells of steps while the history is read
let rate = 0;
let range = 0;
let memoryOf = ""; // what the drawn memory bars belong to

function watch(name) {
  feed?.close();
  watched = name;
  job = null;
  rate = 0;
  memoryOf = "";
  steps.clear();
  events.clear();
  charts.update([]);
  const filter = name === null ? "" : `&job=${encodeURIComponent(name)}`;
  // The stream opens first and the history is read after, so that no step falls between them.
  feed = new Feed(`api/v1/events?after=0${filter}`, { opened, status, step, membership });
}

/** The stream is open, perhaps again: what was missed has to be read. */
function opened() {
  historyRead = false;
  arrived = [];
}

async function loadHistory() {
  const name = watched;
  const path = `api/v1/jobs/${encodeURIComponent(name)}`;
  const [history, about] = await Promise.all([read(`${path}/steps?max_points=1500`), read(path)]);
  if (name !== watched || history === null || about === null) return;
  steps.clear();
  steps.merge(history.items);
  for (const update of arrived ?? []) take(update); // it may have begun anew since the history was cut
  arrived = null;
  rate = about.steps_per_second;
  draw();
}

async function loadMemory() {
  const state = await read(`api/v1/jobs/${encodeURIComponent(watched)}/state`);
  if (state !== null && state.job === watched) showMemory(state, shards);
}

/** The answer to a GET as data; null where there is none, which is ordinary for a job that has gone. */
async function read(path) {
  try {
    const answer = await fetch(path);
    return answer.ok ? await answer.json() : null;
  } catch {
    return null; // the stream notices a server that is gone, and says so
  }
}

function status(update) {
  if (watched === null && update.jobs.length > 0) {
    watch(update.jobs[0].name);
    return;
  }
  job = update.jobs.find((other) => other.name === watched) ?? null;
  document.body.dataset.view = job !== null ? "job" : watched === null ? "empty" : "absent";
  showPicker(update.jobs);
  showShardCommand(update.cluster);
  members.showShards(update.shards);
  shards = update.shards;
  if (job === null) {
    showLesson(update.cluster, watched);
    document.title = "adashard";
    return;
  }
  if (!historyRead) {
    historyRead = true;
    loadHistory();
  }
  members.showWorkers(update.workers);
  showNoWorkers(job);
  showJob();
}

function showJob() {
  const pill = one("job-status");
  pill.dataset.status = job.status;
  pill.textContent = capital(job.status);
  one("job-about").textContent = job.status_reason || capital(job.algorithm);
  one("job-title").textContent = `Job ${job.name}`;
  showTiles();
  const memory = JSON.stringify([job.name, job.generation, job.state_bytes, job.weight_bytes]);
  if (memory !== memoryOf) {
    memoryOf = memory;
    loadMemory();
  }
}

function step(update) {
  if (update.job !== watched) return;
  rate = update.steps_per_second;
  arrived?.push(update);
  take(update);
  draw();
}

function take(update) {
  steps.cut(update.latest_step);
  steps.merge(update.items);
}

function membership(event, id) {
  events.add(event, id);
}

function draw() {
  charts.update(steps.last(range));
  showTiles();
}

function showTiles() {
  if (job === null) return;
  const newest = steps.newest;
  // Members tell their version once a lease, shards tell of every step.
  const current = { ...job, step: newest?.step ?? job.step };
  document.title = `${integer(current.step)} · ${job.name} · adashard`;
  tiles({ job: current, rate, newest, meanLoss: meanLoss(steps.points) });
}

function showPicker(jobs) {
  const picker = one("job");
  const names = jobs.map((other) => other.name);
  if (watched !== null && !names.includes(watched)) names.push(watched);
  const shown = [...picker.options].map((option) => option.value);
  if (JSON.stringify(shown) !== JSON.stringify(names)) {
    picker.replaceChildren(...names.map((name) => new Option(name, name)));
  }
  if (watched !== null && picker.value !== watched) picker.value = watched;
}

function showFreshness() {
  const { stale, age } = feed;
  const live = one("live");
  const known = document.body.dataset.view !== "loading";
  document.body.classList.toggle("stale", stale && known);
  live.dataset.status = stale ? "lost" : known ? "live" : "connecting";
  const word = stale ? "Not live" : known ? "Live" : "Connecting";
  if (live.textContent !== word) live.textContent = word;
  one("banner").hidden = !stale;
  if (stale) {
    one("banner").textContent = known
      ? `The connection is lost. What you see is ${duration(age)} old; trying again.`
      : "The coordinator does not answer; trying again.";
  }
}

function announce(text) {
  one("announcer").textContent = text;
}

function askedFor() {
  return new URLSearchParams(location.search).get("job") || null;
}

one("job").addEventListener("change", (event) => {
  const name = event.target.value;
  history.pushState(null, "", `?job=${encodeURIComponent(name)}`);
  watch(name);
});
one("range").addEventListener("change", (event) => {
  range = Number(event.target.value);
  draw();
});
addEventListener("popstate", () => watch(askedFor()));
onSchemeChange(() => charts.redraw());
armCopy();
watch(askedFor());
setInterval(showFreshness, 500);
