// Tables whose cells are changed in place, so that a selection or a focus in them survives.

/** Give a table its header. `columns`: {title, number?, text(item), whole?(item), status?(item)}. */
export function head(table, columns) {
  const row = document.createElement("tr");
  for (const column of columns) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = column.title;
    cell.classList.toggle("number", Boolean(column.number));
    row.append(cell);
  }
  const top = document.createElement("thead");
  top.append(row);
  table.replaceChildren(top, document.createElement("tbody"));
}

/** Show these items, one row each, in their order; rows are kept by `key`. */
export function fill(table, columns, items, key) {
  const body = table.tBodies[0];
  const rows = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  const wanted = items.map((item) => {
    const row = rows.get(String(key(item))) ?? newRow(String(key(item)), columns);
    columns.forEach((column, index) => update(row.cells[index].firstChild, column, item));
    return row;
  });
  const same = wanted.length === body.rows.length && wanted.every((row, i) => row === body.rows[i]);
  if (!same) body.replaceChildren(...wanted);
}

function newRow(key, columns) {
  const row = document.createElement("tr");
  row.dataset.key = key;
  for (const column of columns) {
    const cell = row.insertCell();
    cell.classList.toggle("number", Boolean(column.number));
    const text = document.createElement("span");
    text.classList.toggle("status", Boolean(column.status));
    cell.append(text);
  }
  return row;
}

function update(element, column, item) {
  const text = column.text(item);
  if (element.textContent !== text) element.textContent = text;
  if (column.whole) element.title = column.whole(item);
  if (column.status) element.dataset.status = column.status(item);
}
