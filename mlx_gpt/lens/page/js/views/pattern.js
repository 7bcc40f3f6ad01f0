// The pattern of the chosen head, large: rows are queries, columns are keys.

import { drawWeights, onCells, onTheme } from "../canvas.js";
import { clamp, closePopover, h, number, openPopover, percent, put, showToken } from "../dom.js";
import { explainWeight, patternOf, quoted } from "../heads.js";

const LABEL_WIDTH = 76; // pixels for the labels of the rows
const CELL_STEPS = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };

export function makePattern(store) {
  const canvas = h("canvas", { class: "cells" });
  const [cursor, row, column] = [h("div", { class: "cursor" }), h("div", { class: "guide row-guide" }), h("div", { class: "guide column-guide" })];
  const cells = h("div", { class: "cell-area", tabindex: "0", role: "group", "data-keys": true, "aria-label": "Pattern: arrows go to another query or key" }, canvas, row, column, cursor);
  const [queries, keys] = [h("div", { class: "row-labels", "aria-hidden": "true" }), h("div", { class: "column-labels", "aria-hidden": "true" })];
  const matrix = h("div", { class: "pattern" }, h("div", { class: "corner muted" }, "keys →", h("br"), "queries ↓"), keys, queries, cells);
  const readout = h("p", { class: "readout", "aria-live": "polite" });
  let shown = null;

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

  const draw = () => shown && drawWeights(canvas, patternOf(shown.run, shown.layer, shown.head), shown.T, shown.T, (query) => query);
  onTheme(draw);
  const fit = () => {
    const room = element.clientWidth - LABEL_WIDTH;
    if (!shown || room <= 0) return; // not on the screen
    const cell = clamp(room / shown.T, 1, 30);
    matrix.style.setProperty("--cell", `${cell >= 3 ? Math.floor(cell) : cell}px`);
    matrix.classList.toggle("dense", cell < 11);
  };
  const element = h("div", { class: "large" }, matrix, readout);
  new ResizeObserver(fit).observe(element);

  const update = (at) => {
    const before = shown ?? {};
    shown = at;
    const changed = (...names) => names.some((name) => at[name] !== before[name]);
    if (changed("run")) {
      put(queries, ...patternLabels(store, at.T, (query) => store.point({ token: query })));
      put(keys, ...patternLabels(store, at.T, (key) => store.point({ token: shown.query, key })));
      matrix.style.setProperty("--n", at.T);
      fit();
    }
    if (changed("run", "layer", "head")) draw();
    if (!changed("run", "layer", "head", "query", "key")) return;
    matrix.style.setProperty("--query-at", at.query);
    matrix.style.setProperty("--key-at", at.key);
    markLabel(queries, at.query);
    markLabel(keys, at.key);
    put(readout, ...patternReadout(store, at));
  };
  return { element, update };
}

/** The tokens of the text beside the rows or above the columns. */
function patternLabels(store, T, enter) {
  return Array.from({ length: T }, (_, position) =>
    h("span", {
      text: showToken(store.tokenAt(position)),
      on: { pointerenter: () => enter(position), pointerleave: () => store.point({}), click: () => store.set({ token: position }) },
    }),
  );
}

function markLabel(list, position) {
  list.querySelector(".pointed")?.classList.remove("pointed");
  list.children[position].classList.add("pointed");
}

function patternReadout(store, at) {
  const { run, layer, head, query, key, T } = at;
  const weight = patternOf(run, layer, head)[query * T + key];
  const data = { what: "pattern", layer, head, query, key };
  return [quoted(store, query), ` at ${query} gives `, quoted(store, key), ` at ${key} the weight `, number(weight, data, () => explainWeight(store, at)), ` (${percent(weight)})`];
}
