// The pattern of one head in two runs, and their difference, as heat maps.

import { onTheme } from "../canvas.js";
import { fmt, h, showToken } from "../dom.js";
import { patternOf } from "../heads.js";
import { makeRaster } from "../raster.js";

/** Heat maps of {run, position} a and b. Rows are queries, columns are keys. */
export function makePatterns(store) {
  const { n_layer, n_head } = store.config;
  const choice = (name, n) => {
    const options = Array.from({ length: n }, (_, i) => h("option", { value: i, text: `${name} ${i}` }));
    return h("select", { id: `compare-${name}`, "aria-label": name, on: { change: (event) => store.set({ [name]: Number(event.target.value) }) } }, ...options);
  };
  const [layer, head] = [choice("layer", n_layer), choice("head", n_head)];
  let shown = null; // {layer, head, runs, grids}
  const maps = ["A", "B", "difference"].map((side, i) => {
    const describe = (query, key) => describeWeight(store, shown, i, query, key);
    const onPoint = (query, key) => readout(store, shown, line, query, key);
    return makeRaster({ label: `Pattern, ${side}`, data: { what: "compare-pattern", side }, describe, onPoint });
  });
  const line = h("p", { class: "muted", "aria-live": "polite", text: "Point at a cell, or go there with the arrow keys. Rows are queries, columns are keys." });
  const titles = ["A", "B", "B − A: more in blue, less in red"];
  const figures = maps.map(({ element }, i) => h("figure", {}, h("figcaption", { class: "muted", text: titles[i] }), element));
  const element = h("div", {}, h("div", { class: "row" }, layer, head), line, h("div", { class: "maps" }, ...figures));
  onTheme(() => shown && maps.forEach((map) => map.draw()));

  const update = (a, b) => {
    const { state } = store;
    [layer.value, head.value] = [state.layer, state.head];
    const runs = [a.run, b.run];
    if (shown && shown.layer === state.layer && shown.head === state.head && runs.every((run, i) => run === shown.runs[i])) return;
    shown = { layer: state.layer, head: state.head, runs, grids: gridsOf(runs, state.layer, state.head) };
    maps.forEach((map, i) => map.show(shown.grids[i]));
  };
  return { element, update };
}

/** The patterns of both, and B − A where both have a query and a key. */
function gridsOf(runs, layer, head) {
  const patterns = runs.map((run) => ({ data: masked(patternOf(run, layer, head), run.ids.length), T: run.ids.length }));
  const [p, q] = patterns;
  const T = Math.min(p.T, q.T);
  const data = Float32Array.from({ length: T * T }, (_, i) => {
    const [query, key] = [Math.floor(i / T), i % T];
    return q.data[query * q.T + key] - p.data[query * p.T + key];
  });
  const grid = (data, T) => ({ rows: T, columns: T, data, limit: 1 });
  return [grid(p.data, p.T), grid(q.data, q.T), grid(data, T)];
}

/** A pattern with NaN for keys of the future, which are not drawn. */
function masked(pattern, T) {
  return pattern.map((weight, i) => (i % T > Math.floor(i / T) ? NaN : weight));
}

function describeWeight(store, { layer, head, runs, grids }, i, query, key) {
  const name = (run) => `“${showToken(store.tokenAt(query, run))}” looks at “${showToken(store.tokenAt(key, run))}”`;
  const at = (grid) => grid.data[query * grid.columns + key];
  const where = `Layer ${layer}, head ${head}: ${name(runs[i] ?? runs[0])}.`;
  if (key > query) return { formula: "0: the key is in the query's future", note: where };
  if (i < 2) return { formula: `weight = softmax(scores) = ${fmt(at(grids[i]))}`, note: where };
  return { formula: "B − A", filled: `${fmt(at(grids[1]))} − ${fmt(at(grids[0]))} = ${fmt(at(grids[2]))}`, note: where };
}

/** The weights of a query and a key in words. */
function readout(store, { grids, runs }, line, query, key) {
  const value = ({ rows, columns, data }) => (query < rows && key <= query ? fmt(data[query * columns + key]) : "–");
  const token = (position) => showToken(store.tokenAt(position, runs.find(({ ids }) => position < ids.length)));
  line.textContent = `“${token(query)}” at ${query} to “${token(key)}” at ${key}: A ${value(grids[0])}, B ${value(grids[1])}, B − A ${value(grids[2])}`;
}
