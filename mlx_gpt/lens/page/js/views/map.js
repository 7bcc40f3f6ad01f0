// The way from the whole model to one number, in steps: stack, block, part, head, activation, number.

import { fmt, h, number, put } from "../dom.js";
import { formulaOf } from "../formulas.js";
import { allPlaces, isActivation, outputOf, partsOfPlace, titleOfPlace, wayTo } from "../places.js";
import { makeActivationPanel } from "./activation.js";
import { makeDiagram } from "./diagram.js";

export function makeMapView(store) {
  const places = allPlaces(store.config);
  const names = [...new Set(places.filter(isActivation))];
  const go = (place) => store.set({ zoom: place, cell: null, ...positionOf(place) });
  const crumbs = h("ol");
  const select = h("select", { id: "map-activation", on: { change: () => go(select.value) } }, h("option", { value: "", text: "none" }), ...names.map((name) => h("option", { value: name, text: name })));
  const diagram = makeDiagram(store, go);
  const panel = makeActivationPanel(store);
  const parts = h("div", { class: "parts" });
  const steps = h("nav", { class: "crumbs", "aria-label": "Way from the stack to one number" }, crumbs);
  const element = h(
    "div",
    {},
    h("h2", { text: "Map" }),
    h("p", { text: "From the whole model to one number: choose a box or a part to go into it, and a step of the way to go back. Escape goes back too." }),
    h("div", { class: "row choices" }, steps, h("label", {}, "any activation ", select)),
    panel.element,
    h("div", { class: "map-and-parts" }, diagram.element, parts),
  );
  const back = (event) => {
    if (event.key !== "Escape" || document.getElementById("popover")) return; // which it closes
    if (store.state.cell) store.set({ cell: null });
    else go(wayTo(placeOfState(), store.state.head).at(-2) ?? "");
    crumbs.querySelector("[aria-current]").focus();
  };
  element.addEventListener("keydown", back, true);
  const placeOfState = () => {
    const here = store.state.zoom.replace(/^blocks\.\d+/, `blocks.${store.state.layer}`).replace(/head\.\d+$/, `head.${store.state.head}`);
    return places.includes(here) ? here : "";
  };
  let drawn = [];
  const update = () => {
    const place = placeOfState();
    const seen = [store.shown, store.token, place, store.state.layer, store.state.head, store.state.cell];
    if (seen.every((value, i) => value === drawn[i])) return;
    drawn = seen;
    const activation = isActivation(place);
    select.value = activation ? place : "";
    put(crumbs, ...wayTo(place, store.state.head).map((step) => crumb(step, step === place && !store.state.cell, go)), numberCrumb(store));
    panel.element.hidden = !activation;
    if (activation) panel.update(place);
    diagram.update(place);
    const around = activation ? wayTo(place, store.state.head).at(-2) : place;
    put(parts, h("p", { class: "muted", text: `${titleOfPlace(around)}: its parts, and the length of the vector that each gives at token ${store.token}.` }), partsTable(store, around, go));
  };
  return { id: "map", title: "Map", element, update };
}

/** The layer and head that a place is of. */
function positionOf(place) {
  const layer = place.match(/^blocks\.(\d+)/)?.[1];
  const head = place.match(/head\.(\d+)$/)?.[1];
  return { ...(layer ? { layer: Number(layer) } : {}), ...(head ? { head: Number(head) } : {}) };
}

function crumb(place, current, go) {
  return h("li", {}, h("button", { type: "button", "data-crumb": place, "aria-current": current ? "step" : null, text: titleOfPlace(place), on: { click: () => go(place) } }));
}

function numberCrumb({ state }) {
  return state.cell ? h("li", {}, h("button", { type: "button", "aria-current": "step", text: `[${state.cell.join(", ")}]` })) : null;
}

/** What a place consists of: each part with its formula, and the length of its vector at the chosen token. */
function partsTable(store, place, go) {
  const lines = partsOfPlace(place, store.config).map((part) => {
    const length = lengthOf(store, part);
    const cell = length === null ? "" : number(length, { what: "part-norm", part }, () => ({ formula: "‖x‖ = √(Σ x²)", filled: `${outputOf(part)} at token ${store.token}: ${fmt(length)}` }));
    const formula = isActivation(part) ? formulaOf(part).formula : "";
    return h("tr", {}, h("th", { scope: "row" }, h("button", { type: "button", "data-go": part, text: titleOfPlace(part), on: { click: () => go(part) } })), h("td", {}, cell), h("td", { class: "formula muted", text: formula }));
  });
  const titles = ["part", "norm", ""].map((text) => h("th", { scope: "col", text }));
  return h("table", { class: "parts-table", "aria-label": `Parts of ${titleOfPlace(place)}` }, h("thead", {}, h("tr", {}, ...titles)), h("tbody", {}, ...lines));
}

/** The norm of what a place gives at the chosen token; null for patterns and for what was not recorded. */
function lengthOf({ shown: run, token, config, state }, place) {
  const name = outputOf(place);
  if (/pattern|attn_scores/.test(name)) return null;
  const norms = run.norms(name);
  if (!norms) return null;
  const head = Number(place.match(/head\.(\d+)$/)?.[1] ?? state.head);
  return norms.length > run.ids.length ? norms[token * config.n_head + head] : norms[token];
}
