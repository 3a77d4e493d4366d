// The steps that the page knows of one job, in order; bounded, like the server's history.

const POINTS_MAX = 4000;

export class Steps {
  points = [];

  clear() {
    this.points = [];
  }

  get newest() {
    return this.points.at(-1) ?? null;
  }

  /** Take in steps that are new or have changed. */
  merge(items) {
    if (items.length === 0) return;
    const known = new Map(this.points.map((point) => [point.step, point]));
    for (const item of items) known.set(item.step, item);
    this.points = [...known.values()].sort((a, b) => a.step - b.step);
    if (this.points.length > POINTS_MAX) this.#thin();
  }

  /** Drop what came after `step`: the job was replaced or restored, and counts from there again. */
  cut(step) {
    this.points = this.points.filter((point) => point.step <= step);
  }

  /** The last `count` steps by number, or all if it is 0. */
  last(count) {
    if (count === 0 || this.newest === null) return this.points;
    const first = this.newest.step - count;
    return this.points.filter((point) => point.step > first);
  }

  // Every second point of the older half goes: long runs stay complete and cheap to draw.
  #thin() {
    const half = this.points.length >> 1;
    this.points = this.points.filter((_, index) => index >= half || index % 2 === 0);
  }
}
