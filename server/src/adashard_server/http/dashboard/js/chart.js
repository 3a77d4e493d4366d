// One chart card: legend, plot, keyboard, and the same numbers as a table.

import { integer } from "./format.js";
import { describe, makePlot, swatch } from "./plot.js";
import { fill, head } from "./table.js";

const ROWS = 25;

/**
 * A definition has `title` and `series`; each of them {label, colour, read(point) -> number or null,
 * format}. Legend, table and the spoken sentence give the numbers of one step as they are; what is
 * drawn may be smoothed: see plot.js, which knows the rest of a definition.
 */
export class Chart {
  #definition;
  #announce;
  #points = [];
  #columns = [];
  #plot = null;
  #page = 0;

  constructor(container, definition, announce) {
    this.#definition = definition;
    this.#announce = announce;
    const template = document.getElementById("chart-template");
    this.card = template.content.cloneNode(true).firstElementChild;
    container.append(this.card);
    this.#find();
    this.#label();
    this.#listen();
  }

  #find() {
    const one = (selector) => this.card.querySelector(selector);
    this.toggle = one(".chart-head button");
    this.legend = one(".legend");
    this.plotBox = one(".plot");
    this.tableBox = one(".chart-table");
    this.table = one("table");
    this.pager = one(".pager");
  }

  #label() {
    const { title, series, stacked } = this.#definition;
    this.card.querySelector("h3").textContent = title;
    this.card.setAttribute("aria-label", title);
    this.values = series.map((one) => {
      const item = document.createElement("li");
      const value = document.createElement("b");
      item.append(swatch(one, stacked), one.label, value);
      this.legend.append(item);
      return value;
    });
    this.tableColumns = [
      { title: "Step", text: (row) => integer(row.step) },
      ...series.map((one, index) => ({
        title: one.label,
        number: true,
        text: (row) => one.format(row.values[index]),
      })),
    ];
    head(this.table, this.tableColumns);
  }

  #listen() {
    this.toggle.addEventListener("click", () => this.#flip());
    this.plotBox.addEventListener("keydown", (event) => this.#move(event));
    for (const button of this.pager.querySelectorAll("button")) {
      button.addEventListener("click", () => {
        this.#page += button.dataset.page === "older" ? 1 : -1;
        this.#fillTable();
      });
    }
  }

  /** Draw these points, oldest first. */
  update(points) {
    this.#points = points;
    if (points.length === 0) return;
    this.#columns = this.#definition.series.map((one) => points.map(one.read));
    this.#hideEmpty();
    this.#plot ??= makePlot(this.plotBox, this.#definition, (index) => this.#showValues(index));
    this.#plot.draw(points.map((point) => point.step), this.#columns);
    this.#showValues(this.#plot.index);
    this.plotBox.setAttribute("aria-label", this.#summary());
    if (!this.tableBox.hidden) this.#fillTable();
  }

  /** Draw again, in the colours that hold now. */
  redraw() {
    this.#plot?.redraw();
  }

  #hideEmpty() {
    this.#definition.series.forEach((one, index) => {
      this.legend.children[index].hidden =
        Boolean(one.optional) && this.#columns[index].every((value) => value === null);
    });
  }

  #showValues(index) {
    const at = index ?? this.#points.length - 1;
    this.#definition.series.forEach((one, entry) => {
      const text = one.format(this.#columns[entry][at] ?? null);
      if (this.values[entry].textContent !== text) this.values[entry].textContent = text;
    });
  }

  #summary() {
    const last = this.#points.length - 1;
    const range = `Steps ${integer(this.#points[0].step)} to ${integer(this.#points[last].step)}`;
    const numbers = describe(this.#definition, this.#columns, last);
    return `${this.#definition.title}. ${range}. Newest: ${numbers}.`;
  }

  #move(event) {
    const last = this.#points.length - 1;
    const now = this.#plot.index ?? last;
    const target = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    const index = Math.max(0, Math.min(last, target));
    const { step } = this.#points[index];
    this.#plot.pointAt(step);
    this.#announce(`Step ${integer(step)}: ${describe(this.#definition, this.#columns, index)}`);
  }

  #flip() {
    const asTable = this.tableBox.hidden;
    this.tableBox.hidden = !asTable;
    this.plotBox.hidden = this.legend.hidden = asTable;
    this.toggle.textContent = asTable ? "Show as chart" : "Show as table";
    this.toggle.setAttribute("aria-pressed", String(asTable));
    this.#page = 0;
    if (asTable) this.#fillTable();
  }

  #fillTable() {
    const pages = Math.max(1, Math.ceil(this.#points.length / ROWS));
    this.#page = Math.max(0, Math.min(pages - 1, this.#page));
    const end = this.#points.length - this.#page * ROWS;
    const rows = [];
    for (let index = end - 1; index >= Math.max(0, end - ROWS); index -= 1) {
      rows.push({ step: this.#points[index].step, values: this.#columns.map((one) => one[index]) });
    }
    fill(this.table, this.tableColumns, rows, (row) => row.step);
    this.pager.querySelector("span").textContent = `Page ${this.#page + 1} of ${pages}`;
    this.pager.querySelector("[data-page=newer]").disabled = this.#page === 0;
    this.pager.querySelector("[data-page=older]").disabled = this.#page === pages - 1;
  }
}
