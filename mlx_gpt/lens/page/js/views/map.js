// The way from the whole model to one number, in steps: stack, block, part, head, activation, number.

import { fmt, h, number, put } from "../dom.js";
import { formulaOf } from "../formulas.js";
import { allPlaces, isActivation, outputOf, partsOfPlace, titleOfPlace, wayTo } from "../places.js";
import { makeActivationPanel } from "./activation.js";
import { makeDiagram } from "./diagram.js";

const INTRO_OF_MAP =
  "From the whole model to one number: choose a box or a part to go into it, and a step of the way to go back. " +
  "Escape goes back too.";

export function makeMapView(store) {
  const places = allPlaces(store.config);
  const names = [...new Set(places.filter(isActivation))];
  const go = (place) => store.set({ zoom: place, cell: null, ...positionOf(place) });
  const crumbs = h("ol");
  const options = names.map((name) => h("option", { value: name, text: name }));
  const none = h("option", { value: "", text: "none" });
  const select = h("select", { id: "map-activation", on: { change: () => go(select.value) } }, none, ...options);
  const diagram = makeDiagram(store, go);
  const panel = makeActivationPanel(store);
  const parts = h("div", { class: "parts" });
  const steps = h("nav", { class: "crumbs", "aria-label": "Way from the stack to one number" }, crumbs);
  const element = h(
    "div",
    {},
    h("h2", { text: "Map" }),
    h("p", { text: INTRO_OF_MAP }),
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
    const { zoom, layer, head } = store.state;
    const here = zoom.replace(/^blocks\.\d+/, `blocks.${layer}`).replace(/head\.\d+$/, `head.${head}`);
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
    const way = wayTo(place, store.state.head);
    put(crumbs, ...way.map((step) => crumb(step, step === place && !store.state.cell, go)), numberCrumb(store));
    panel.element.hidden = !activation;
    if (activation) panel.update(place);
    diagram.update(place);
    const around = activation ? way.at(-2) : place;
    const text = `${titleOfPlace(around)}: its parts, and the length of the vector that each gives at token ${store.token}.`;
    put(parts, h("p", { class: "muted", text }), partsTable(store, around, go));
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
  const props = { type: "button", "data-crumb": place, "aria-current": current ? "step" : null };
  return h("li", {}, h("button", { ...props, text: titleOfPlace(place), on: { click: () => go(place) } }));
}

function numberCrumb({ state }) {
  if (!state.cell) return null;
  return h("li", {}, h("button", { type: "button", "aria-current": "step", text: `[${state.cell.join(", ")}]` }));
}

/** What a place consists of: each part with its formula, and the length of its vector at the chosen token. */
function partsTable(store, place, go) {
  const lines = partsOfPlace(place, store.config).map((part) => partLine(store, part, go));
  const titles = ["part", "norm", ""].map((text) => h("th", { scope: "col", text }));
  const props = { class: "parts-table", "aria-label": `Parts of ${titleOfPlace(place)}` };
  return h("table", props, h("thead", {}, h("tr", {}, ...titles)), h("tbody", {}, ...lines));
}

function partLine(store, part, go) {
  const button = h("button", { type: "button", "data-go": part, text: titleOfPlace(part), on: { click: () => go(part) } });
  const length = lengthOf(store, part);
  const how = () => ({ formula: "‖x‖ = √(Σ x²)", filled: `${outputOf(part)} at token ${store.token}: ${fmt(length)}` });
  const cell = length === null ? "" : number(length, { what: "part-norm", part }, how);
  const formula = isActivation(part) ? formulaOf(part).formula : "";
  return h("tr", {}, h("th", { scope: "row" }, button), h("td", {}, cell), h("td", { class: "formula muted", text: formula }));
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
