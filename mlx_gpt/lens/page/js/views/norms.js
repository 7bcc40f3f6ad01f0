// The length of two residual streams at a position, layer by layer.

import { fmt, h, number, put } from "../dom.js";
import { streamNames } from "../stream_reading.js";

/** A table of {run, position} a and b. */
export function makeNormTable(store) {
  const names = streamNames(store.config);
  const body = h("tbody");
  const head = ["", "A", "B", "difference"].map((text) => h("th", { scope: "col", text }));
  const element = h("div", { class: "scroll" }, h("table", { class: "difference" }, h("thead", {}, h("tr", {}, ...head)), body));
  let drawn = [];
  const update = (...sides) => {
    const key = sides.flatMap(({ run, position }) => [run, position]);
    if (key.every((x, i) => x === drawn[i])) return;
    drawn = key;
    const norms = sides.map(({ run, position }) => names.map((name) => run.norms(name)[position]));
    const most = Math.max(...norms.flat());
    put(body, ...names.map((_, i) => normRow(i, names.length - 1, norms.map((list) => list[i]), most)));
  };
  return { element, update };
}

function normRow(layer, last, [a, b], most) {
  const title = layer < last ? `before layer ${layer}` : `after layer ${last - 1}`;
  const how = (x) => () => ({ formula: "‖x‖ = √(Σ x²)", filled: `x: the residual stream ${title}; ‖x‖ = ${fmt(x)}` });
  const cell = (x, side) => {
    const bar = h("span", { class: "norm-bar", style: { "--share": x / most } });
    return h("td", { class: "norm" }, bar, number(x, { what: "norm", side, layer }, how(x)));
  };
  const minus = () => ({ formula: "B − A", filled: `${fmt(b)} − ${fmt(a)} = ${fmt(b - a)}` });
  const difference = number(b - a, { what: "norm", side: "difference", layer }, minus, `${b > a ? "+" : ""}${fmt(b - a)}`);
  return h("tr", {}, h("th", { scope: "row", text: title }), cell(a, "A"), cell(b, "B"), h("td", {}, difference));
}
