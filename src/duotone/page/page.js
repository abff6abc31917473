"use strict";
// Tooltips, sorting, filtering, the theme and the clipboard. Without it the page shows all but what hovers.
(() => {
  const tip = document.getElementById("tip");
  let over = null;

  function place(event) {
    const box = tip.getBoundingClientRect(), gap = 14;
    const left = event.clientX + gap + box.width > innerWidth ? event.clientX - gap - box.width : event.clientX + gap;
    const top = event.clientY + gap + box.height > innerHeight ? event.clientY - gap - box.height : event.clientY + gap;
    tip.style.transform = `translate(${Math.max(4, left)}px, ${Math.max(4, top)}px)`;
  }

  function point(event) {
    const found = event.target.closest?.("[data-tip]") ?? null;
    if (found !== over) {
      over = found;
      if (found) tip.textContent = found.dataset.tip;
      tip.classList.toggle("on", found !== null);
    }
    if (found) place(event);
  }

  document.addEventListener("pointermove", point, { passive: true });
  document.addEventListener("pointerdown", point, { passive: true });
  document.addEventListener("scroll", () => { over = null; tip.classList.remove("on"); }, { passive: true, capture: true });

  function value(row, column) {
    const cell = row.cells[column];
    const figure = cell.dataset.v;
    return figure === undefined ? cell.textContent : figure === "" ? null : Number(figure);
  }

  function sort(button) {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const direction = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
    const rows = Array.from(body.rows, row => [value(row, head.cellIndex), row]);
    const compare = new Intl.Collator(undefined, { numeric: true }).compare;
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // what is not known comes last both ways
      return direction * (typeof a === "number" ? a - b : compare(a, b));
    });
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    body.append(...rows.map(([, row]) => row));
  }

  function metric(button) {
    const card = button.closest(".card");
    card.querySelector(".heat").dataset.metric = button.dataset.metric;
    for (const other of card.querySelectorAll("[data-metric][aria-pressed]")) other.setAttribute("aria-pressed", other === button);
    for (const ramp of card.querySelectorAll(".ramp")) ramp.hidden = ramp.dataset.of !== button.dataset.metric;
  }

  function theme() {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.style.colorScheme || (dark ? "dark" : "light");
    document.documentElement.style.colorScheme = now === "dark" ? "light" : "dark";
  }

  async function copy(button) {
    const text = button.parentElement.querySelector("pre");
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "copied";
    } catch { // a page from a file may not be allowed to: select it instead
      getSelection().selectAllChildren(text);
      button.textContent = "selected";
    }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  }

  document.addEventListener("click", event => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.closest("th")) sort(button);
    else if (button.dataset.metric) metric(button);
    else if (button.id === "theme") theme();
    else if (button.closest(".shell")) copy(button);
  });

  for (const input of document.querySelectorAll("input[data-filters]")) {
    const rows = Array.from(document.getElementById(input.dataset.filters).tBodies[0].rows);
    const words = rows.map(row => row.textContent.toLowerCase());
    input.addEventListener("input", () => {
      const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      rows.forEach((row, i) => { row.hidden = !wanted.every(word => words[i].includes(word)); });
    });
  }
})();
