// Knock out or scale heads and MLPs: a grid of switches, and a slider for the chosen one.

import { fmt, h, slider } from "../dom.js";
import { NO_EDITS, describeEdits, factorOf, partsOf, withFactor } from "../edits.js";
import { moveByArrows } from "./arrow_keys.js";
import { makeLossSweep } from "./loss_sweep.js";

export function makeEditGrid(store) {
  const rows = partsOf(store.config);
  const chosen = makeChoice(store, rows);
  const cells = rows.flat().map((part) => makeCell(store, part, chosen));
  const factor = factorControls(store, chosen);
  const sweep = makeLossSweep(store, cells);
  const reset = h("button", { type: "button", id: "reset", text: "Reset all", on: { click: () => store.set(NO_EDITS) } });
  const summary = h("span", { role: "status", "aria-live": "polite", "data-what": "edits" });
  const element = h(
    "section",
    { class: store.config.n_head > 6 ? "wide" : null, "aria-label": "Knock out or scale" },
    h("h3", { text: "Knock out or scale" }),
    h("p", { class: "muted", text: "Press a head or an MLP to switch it off; the slider scales the chosen one." }),
    h("div", { class: "scroll" }, gridTable(rows, cells, chosen)),
    factor.element,
    h("div", { class: "row" }, reset, summary),
    sweep.element,
  );
  const update = () => {
    for (const part of [...cells, factor, sweep]) part.update();
    reset.disabled = !store.hasEdits();
    summary.textContent = describeEdits(store.state) || "No edits.";
  };
  return { element, update };
}

/** The chosen part: the head of the state, or an MLP until another head is chosen. */
function makeChoice(store, rows) {
  let mlp = null; // {layer, head} of the state when an MLP was chosen
  const get = () => {
    const { layer, head } = store.state;
    return mlp && mlp.layer === layer && mlp.head === head ? rows[layer].at(-1) : rows[layer][head];
  };
  const choose = (part, changes = {}) => {
    const { layer } = part;
    const head = part.head ?? store.state.head;
    mlp = part.head === null ? { layer, head } : null;
    store.set({ layer, head, ...changes });
  };
  return { get, choose };
}

/** A switch, pressed where the part is edited. It is updated in place, which keeps the focus. */
function makeCell(store, part, chosen) {
  const toggle = () => chosen.choose(part, withFactor(store.state, part, factorOf(store.state, part) === 1 ? 0 : 1));
  const button = h("button", { type: "button", class: "switch", "data-part": part.label, on: { click: toggle } });
  const td = h("td", {}, button);
  const update = () => {
    const x = factorOf(store.state, part);
    button.textContent = x === 1 ? "on" : x === 0 ? "off" : `× ${fmt(x)}`;
    button.setAttribute("aria-pressed", x !== 1);
    button.setAttribute("aria-label", `${part.label}: ${button.textContent}`);
    button.tabIndex = chosen.get() === part ? 0 : -1;
    td.classList.toggle("chosen", chosen.get() === part);
  };
  return { part, button, td, update };
}

function gridTable(rows, cells, chosen) {
  const columns = rows[0].length;
  const head = ["layer", ...rows[0].map(({ head }) => (head === null ? "MLP" : `head ${head}`))].map((text) => h("th", { scope: "col", text }));
  const body = rows.map((_, layer) => {
    const ofLayer = cells.slice(layer * columns, (layer + 1) * columns);
    return h("tr", {}, h("th", { scope: "row", text: layer }), ...ofLayer.map(({ td }) => td));
  });
  const table = h("table", { class: "switches" }, h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...body));
  moveByArrows(table, columns, () => cells.map(({ button }) => button), (i) => chosen.choose(cells[i].part));
  return table;
}

/** Slider and field for the factor of the chosen part. */
function factorControls(store, chosen) {
  const set = (x) => store.set(withFactor(store.state, chosen.get(), x));
  const { element: row, input, setValue } = slider("Factor", { id: "factor", min: 0, max: 2, step: 0.05, value: 1 }, set);
  const field = h("input", { type: "number", id: "factor-typed", min: -10, max: 10, step: "any", "aria-label": "Factor, from −10 to 10" });
  field.addEventListener("input", () => Math.abs(field.valueAsNumber) <= 10 && set(field.valueAsNumber));
  field.addEventListener("blur", () => (field.value = factorOf(store.state, chosen.get())));
  const name = row.querySelector("span");
  const update = () => {
    const x = factorOf(store.state, chosen.get());
    name.textContent = chosen.get().label;
    input.setAttribute("aria-label", `Factor of ${chosen.get().label}`);
    setValue(x);
    if (document.activeElement !== field) field.value = x;
  };
  return { element: h("div", { class: "factor" }, row, field), update };
}
