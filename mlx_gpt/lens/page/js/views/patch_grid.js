// Where to patch: positions in rows, with the tokens of both texts, and layers in columns.

import { diverge, explain, fmt, h, put, showToken } from "../dom.js";
import { NO_EDITS } from "../edits.js";
import { row } from "../tensor.js";
import { moveByArrows } from "./arrow_keys.js";
import { makeSweep } from "./sweep.js";

/** The metric of patching: after the selected token, the logit of the second text's prediction (``right``) minus that of
 *  the first text's most probable other token (``wrong``). ``of(run, position)`` reads it from a run. */
export function logitDifference({ run, otherRun, token }) {
  const [{ id: right }] = otherRun.next(Math.min(token, otherRun.ids.length - 1), 1);
  const wrong = run.next(token, 2).find(({ id }) => id !== right).id;
  return { right, wrong, of: (from, at = token) => row(from.logits, at)[right] - row(from.logits, at)[wrong] };
}

/** A table of buttons; pressing one patches there, pressing it again does not. Rows are kept when the texts change. */
export function makePatchGrid(store) {
  const { n_layer } = store.config;
  const head = ["at", "text", "second text", ...Array.from({ length: n_layer }, (_, layer) => `layer ${layer}`)];
  const body = h("tbody");
  const headRow = h("tr", {}, ...head.map((text) => h("th", { scope: "col", text })));
  const table = h("table", { class: "switches patches" }, h("thead", {}, headRow), body);
  const rows = [];
  let drawn = [];
  let pressed; // the cell of the patch
  const cells = () => rows.slice(0, Math.min(store.run.ids.length, store.otherRun.ids.length)).flatMap((row) => row.cells);
  const sweep = patchSweep(store, cells);
  moveByArrows(table, n_layer, () => cells().map(({ button }) => button));
  const update = () => {
    const { run, otherRun, state } = store;
    if (drawn[0] !== run || drawn[1] !== otherRun) {
      drawn = [run, otherRun];
      while (rows.length < run.ids.length) rows.push(patchRow(store, rows.length));
      rows.forEach((row, position) => position < run.ids.length && row.update());
      put(body, ...rows.slice(0, run.ids.length).map(({ element }) => element));
    }
    const chosen = state.patch ? rows[state.patch.position]?.cells[state.patch.layer] : undefined;
    if (chosen !== pressed) {
      pressed?.press(false);
      chosen?.press(true);
      pressed = chosen;
    }
    if (!cells().some(({ button }) => button.tabIndex === 0)) cells()[0].button.tabIndex = 0;
    sweep.update();
  };
  return { element: h("div", {}, sweep.element, h("div", { class: "scroll tall" }, table)), update };
}

/** The tokens of both texts at a position, and a cell for each layer. */
function patchRow(store, position) {
  const cells = Array.from({ length: store.config.n_layer }, (_, layer) => patchCell(store, layer, position));
  const [word, other] = [h("td", { class: "word" }), h("td", { class: "word" })];
  const element = h("tr", {}, h("th", { scope: "row", text: position }), word, other, ...cells.map(({ button }) => h("td", {}, button)));
  const update = () => {
    const { run, otherRun } = store;
    const there = position < otherRun.ids.length;
    word.textContent = showToken(store.tokenAt(position));
    other.textContent = there ? showToken(store.tokenAt(position, otherRun)) : "";
    element.classList.toggle("differs", there && otherRun.ids[position] !== run.ids[position]);
    for (const { button } of cells) button.disabled = !there;
  };
  return { element, cells, update };
}

/** A button for one layer and position. After a sweep it shows the logit difference with this patch. */
function patchCell(store, layer, position) {
  const toggle = () => {
    const { patch } = store.state;
    store.set({ patch: patch?.layer === layer && patch.position === position ? null : { layer, position } });
  };
  const button = h("button", { type: "button", class: "switch", "data-layer": layer, "data-position": position, tabindex: -1, on: { click: toggle } });
  const name = `layer ${layer}, position ${position}`;
  let isOn = false;
  let value = null; // {x, base}: with this patch and without any
  const draw = () => {
    button.textContent = value ? fmt(value.x) : isOn ? "on" : "·";
    button.setAttribute("aria-pressed", isOn);
    button.setAttribute("aria-label", `${name}: ${isOn ? "patched" : "not patched"}${value ? `, logit difference ${fmt(value.x)}` : ""}`);
  };
  const press = (on) => {
    isOn = on;
    draw();
  };
  const how = () => ({
    formula: `logit difference with ${name} taken from the second text`,
    filled: value ? `${fmt(value.x)}; without a patch ${fmt(value.base)}` : "",
  });
  const show = (x, base, most) => {
    if (!button.dataset.what) explain(button, how);
    button.dataset.what = "patched";
    button.dataset.value = x ?? "";
    button.tabIndex = -1;
    button.style.background = x === null ? "" : diverge((0.7 * (x - base)) / most);
    value = x === null ? null : { x, base };
    draw();
  };
  draw();
  return { layer, position, button, press, show };
}

/** On request: the logit difference with each patch (lens.activation_patching). */
function patchSweep(store, cells) {
  const found = new Map();
  let most = 0; // largest change so far: full colour
  const show = (cell, x) => {
    const base = logitDifference(store).of(store.run);
    found.set(cell, x);
    const grows = Math.abs(x - base) > most;
    if (grows) most = 1.2 * Math.abs(x - base);
    for (const [one, y] of grows ? found : [[cell, x]]) one.show(y, base, most || 1);
  };
  return makeSweep({
    id: "sweep-patches",
    label: "Logit difference with each patch",
    jobs: cells,
    measure: async ({ layer, position }) => {
      const { of } = logitDifference(store);
      if (position > store.token) return of(store.run); // no token sees a later one
      const edits = store.editsOf({ ...NO_EDITS, patch: { layer, position } });
      return of(await store.model.trace(store.run.ids, { edits, lane: "sweep-patches" }));
    },
    show,
    clear: () => {
      for (const cell of found.keys()) cell.show(null);
      found.clear();
      most = 0;
    },
    inputs: () => [store.run, store.otherRun, store.token],
  });
}
