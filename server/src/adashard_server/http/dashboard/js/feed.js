// The stream of events: opens it, keeps it open, and knows how old the last word is.

const STALE_MS = 4000; // the server speaks once a second
const RETRY_MS = 2000; // after an answer that EventSource does not retry by itself

export class Feed {
  #source = null;
  #retry = null;
  #heard = performance.now();
  #url;
  #handlers;

  /** `handlers`: opened(), status(data), step(data), membership(data, id). */
  constructor(url, handlers) {
    this.#url = url;
    this.#handlers = handlers;
    this.#open();
  }

  /** Seconds since the server last said something. */
  get age() {
    return (performance.now() - this.#heard) / 1000;
  }

  get stale() {
    return performance.now() - this.#heard > STALE_MS;
  }

  close() {
    clearTimeout(this.#retry);
    this.#source.close();
  }

  #open() {
    this.#source = new EventSource(this.#url);
    this.#source.addEventListener("open", () => this.#handlers.opened());
    for (const kind of ["status", "step", "membership"]) {
      this.#source.addEventListener(kind, (event) => {
        this.#heard = performance.now();
        this.#handlers[kind](JSON.parse(event.data), event.lastEventId);
      });
    }
    this.#source.addEventListener("error", () => {
      if (this.#source.readyState === EventSource.CLOSED) {
        this.#retry = setTimeout(() => this.#open(), RETRY_MS);
      }
    });
  }
}
