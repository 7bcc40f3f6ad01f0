// The pattern of the chosen head, large: rows are queries, columns are keys.

import { drawWeights, onCells, onTheme } from "../canvas.js";
import { clamp, closePopover, h, number, openPopover, percent, put, showToken } from "../dom.js";
import { explainWeight, patternOf, quoted } from "../heads.js";

const LABEL_WIDTH = 76; // pixels for the labels of the rows
const CELL_STEPS = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };

export function makePattern(store) {
  const canvas = h("canvas", { class: "cells" });
  const [cursor, row, column] = [
    h("div", { class: "cursor" }),
    h("div", { class: "guide row-guide" }),
    h("div", { class: "guide column-guide" }),
  ];
  const cells = h(
    "div",
    {
      class: "cell-area",
      tabindex: "0",
      role: "group",
      "data-keys": true,
      "aria-label": "Pattern: arrows go to another query or key",
    },
    canvas,
    row,
    column,
    cursor,
  );
  const [queries, keys] = [
    h("div", { class: "row-labels", "aria-hidden": "true" }),
    h("div", { class: "column-labels", "aria-hidden": "true" }),
  ];
  const matrix = h(
    "div",
    { class: "pattern" },
    h("div", { class: "corner muted" }, "keys →", h("br"), "queries ↓"),
    keys,
    queries,
    cells,
  );
  const readout = h("p", { class: "readout", "aria-live": "polite" });
  let shown = null;
  let dense = false; // too narrow to label all cells: only those of the chosen one

  const enter = (key, query) => {
    store.point({ token: query, key });
    openPopover(cursor, explainWeight(store, { ...shown, query, key }));
  };
  const leave = () => (closePopover(), store.point({}));
  onCells(canvas, { enter, leave, choose: (_, query) => store.set({ token: query }) });
  cells.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return leave();
    const step = CELL_STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    enter(clamp(shown.key + step[1], 0, shown.T - 1), clamp(shown.query + step[0], 0, shown.T - 1));
  });
  cells.addEventListener("blur", leave);

  const draw = () =>
    shown && drawWeights(canvas, patternOf(shown.run, shown.layer, shown.head), shown.T, shown.T, (query) => query);
  onTheme(draw);
  const fit = () => {
    const room = element.clientWidth - LABEL_WIDTH;
    if (!shown || room <= 0) return; // not on the screen
    const cell = clamp(room / shown.T, 1, 30);
    matrix.style.setProperty("--cell", `${cell >= 3 ? Math.floor(cell) : cell}px`);
    if (matrix.classList.toggle("dense", cell < 11) !== dense) write();
  };
  const write = () => {
    dense = matrix.classList.contains("dense");
    put(queries, ...patternLabels(store, shown.T, dense, (query) => store.point({ token: query })));
    put(keys, ...patternLabels(store, shown.T, dense, (key) => store.point({ token: shown.query, key })));
    mark();
  };
  const mark = () => {
    markLabel(store, queries, shown.query, dense);
    markLabel(store, keys, shown.key, dense);
  };
  const element = h("div", { class: "large" }, matrix, readout);
  new ResizeObserver(fit).observe(element);

  const update = (at) => {
    const before = shown ?? {};
    shown = at;
    const changed = (...names) => names.some((name) => at[name] !== before[name]);
    if (changed("run")) {
      matrix.style.setProperty("--n", at.T);
      element.classList.toggle("long", at.T > 24); // needs the whole width
      fit();
      write();
    }
    if (changed("run", "layer", "head")) draw();
    if (!changed("run", "layer", "head", "query", "key")) return;
    matrix.style.setProperty("--query-at", at.query);
    matrix.style.setProperty("--key-at", at.key);
    mark();
    put(readout, ...patternReadout(store, at));
  };
  return { element, update };
}

/** The tokens of the text beside the rows or above the columns; a place for one where they are dense. */
function patternLabels(store, T, dense, enter) {
  const leave = () => store.point({});
  return Array.from({ length: dense ? 1 : T }, (_, position) =>
    h("span", {
      text: dense ? "" : showToken(store.tokenAt(position)),
      on: dense
        ? {}
        : { pointerenter: () => enter(position), pointerleave: leave, click: () => store.set({ token: position }) },
    }),
  );
}

function markLabel(store, list, position, dense) {
  list.querySelector(".pointed")?.classList.remove("pointed");
  const label = list.children[dense ? 0 : position];
  label.classList.add("pointed");
  if (dense) label.textContent = showToken(store.tokenAt(position));
}

function patternReadout(store, at) {
  const { run, layer, head, query, key, T } = at;
  const weight = patternOf(run, layer, head)[query * T + key];
  const data = { what: "pattern", layer, head, query, key };
  const shown = number(weight, data, () => explainWeight(store, at));
  const [from, to] = [quoted(store, query), quoted(store, key)];
  return [`${from} at ${query} gives ${to} at ${key} the weight `, shown, ` (${percent(weight)})`];
}
