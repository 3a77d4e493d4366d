// The list of what has changed, newest first.

import { timeOfDay } from "./format.js";

const EVENTS_MAX = 200;

export class Events {
  #list = document.getElementById("events");
  #seen = new Set();

  clear() {
    this.#seen.clear();
    this.#list.replaceChildren();
    this.#showNothing();
  }

  /** Take in one event; the same id twice is one event. */
  add(event, id) {
    if (this.#seen.has(id)) return;
    this.#seen.add(id);
    const item = document.createElement("li");
    const time = document.createElement("time");
    time.dateTime = event.time;
    time.title = event.time;
    time.textContent = timeOfDay(event.time);
    const text = document.createElement("span");
    text.textContent = event.text;
    text.title = event.name;
    item.append(time, text);
    this.#list.prepend(item);
    if (this.#list.children.length > EVENTS_MAX) this.#list.lastChild.remove();
    this.#showNothing();
  }

  #showNothing() {
    this.#list.nextElementSibling.hidden = this.#list.children.length > 0;
  }
}
