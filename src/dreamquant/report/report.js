"use strict";

// Sorts tables by the column whose heading is pressed; cells that hold nothing stay last, whichever way.
const NOTHING = "–";

function keyOf(cell, kind) {
  if (kind === "number") return "value" in cell.dataset ? Number(cell.dataset.value) : null;
  const text = cell.firstChild.textContent.trim(); // without the note below it
  return text === NOTHING ? null : text;
}

function compare(one, other, direction) {
  if (one === null || other === null) return (one === null) - (other === null);
  const order = typeof one === "number" ? one - other : one.localeCompare(other, "en", { numeric: true });
  return direction * order;
}

function sortBy(table, heading) {
  const column = heading.cellIndex;
  const kind = heading.dataset.kind;
  const now = heading.getAttribute("aria-sort");
  const order = now === "descending" || (now === null && kind === "text") ? "ascending" : "descending";
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, (row) => ({ row, key: keyOf(row.cells[column], kind) }));
  rows.sort((one, other) => compare(one.key, other.key, order === "ascending" ? 1 : -1));
  body.append(...rows.map((entry) => entry.row));
  for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", order);
}

for (const table of document.querySelectorAll("table[data-sortable]")) {
  for (const heading of table.tHead.rows[0].cells) {
    heading.querySelector("button").addEventListener("click", () => sortBy(table, heading));
  }
}

// Paper cannot be unfolded.
let folded = [];
window.addEventListener("beforeprint", () => {
  folded = Array.from(document.querySelectorAll("details:not([open])"));
  for (const one of folded) one.open = true;
});
window.addEventListener("afterprint", () => {
  for (const one of folded) one.open = false;
});
