// What the page teaches while there is no job to show.

const one = (id) => document.getElementById(id);

export function script(address, job) {
  return [
    "import adashard",
    `opt = adashard.Adafactor(model.named_parameters(), address=${JSON.stringify(address)}, job=${JSON.stringify(job)})`,
    "loss.backward()",
    "opt.step()",
  ].join("\n");
}

/** Show how a job begins; `absent` is the name of a job that was asked for and is not there. */
export function showLesson(cluster, absent) {
  one("lesson-title").textContent = absent === null ? "No job yet" : `There is no job “${absent}”`;
  const code = script(cluster.address, absent ?? "my-run");
  if (one("lesson-code").textContent !== code) one("lesson-code").textContent = code;
  one("lesson-ready").textContent = cluster.ready
    ? "The cluster is ready. This page shows the job as soon as it begins."
    : `The cluster is not ready yet: ${cluster.not_ready.join("; ")}.`;
}

/** What starts a shard that joins this coordinator. */
export function showShardCommand(cluster) {
  one("shards-command").textContent = `adashard serve shard --coordinator ${cluster.address}`;
}

/** The button that copies the code; browsers allow it on this machine or over TLS only. */
export function armCopy() {
  const button = one("lesson-copy");
  button.hidden = navigator.clipboard === undefined;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(one("lesson-code").textContent);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}
