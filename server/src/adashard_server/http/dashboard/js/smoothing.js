// How noisy numbers become a line. All of it is linear in the number of points.

/** Mean over the neighbours, about a fiftieth of all points to each side; gaps are left out. */
export function smooth(values) {
  const mean = runningMean(values);
  const reach = Math.ceil(values.length / 50);
  return values.map((value, index) => {
    // Near the start as far forward as back, so that a line that falls steeply is not shifted.
    const back = Math.min(index, reach);
    const forward = Math.max(back, Math.ceil(reach / 3));
    return value === null ? null : mean(index - back, Math.min(values.length, index + forward + 1));
  });
}

/** Mean over the last few points, about an eightieth of all; a long pause counts as a short one. */
export function typical(values) {
  const known = values.filter((value) => value !== null);
  if (known.length === 0) return values.map(() => 0);
  const most = 3 * quantile(known, 0.5);
  const mean = runningMean(values.map((value) => (value === null ? null : Math.min(value, most))));
  const width = Math.min(values.length, Math.max(5, Math.ceil(values.length / 80)));
  return values.map((_, index) => mean(Math.max(0, index - width + 1), Math.max(width, index + 1)));
}

/** The value that this share of the values does not exceed. */
export function quantile(values, share) {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

/** A function that answers the mean of the known values from `begin` up to, not including, `end`. */
function runningMean(values) {
  const sums = [0];
  const counts = [0];
  for (const value of values) {
    sums.push(sums.at(-1) + (value ?? 0));
    counts.push(counts.at(-1) + (value === null ? 0 : 1));
  }
  return (begin, end) => (sums[end] - sums[begin]) / Math.max(1, counts[end] - counts[begin]);
}
