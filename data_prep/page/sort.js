for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, column = head.cellIndex, body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending";
  const compare = new Intl.Collator("en", {numeric: true}).compare;
  for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const keyed = [...body.rows].map(row => [row.cells[column].dataset.value, row]);
  keyed.sort(([a], [b]) => a === "" || b === "" ? (a === "") - (b === "") : up ? compare(a, b) : compare(b, a));
  body.append(...keyed.map(([, row]) => row));
});
