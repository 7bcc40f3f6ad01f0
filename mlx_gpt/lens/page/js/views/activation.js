// An activation as a heat map, one row of it, and one number with its formula.

import { onTheme } from "../canvas.js";
import { clamp, fmt, h, number, put, showToken } from "../dom.js";
import { explainActivation, formulaOf } from "../formulas.js";
import { limitOf, makeRaster } from "../raster.js";
import { norm, row } from "../tensor.js";

/** The panel of an activation. ``update(name)`` shows it at the state's head and cell. */
export function makeActivationPanel(store) {
  const facts = h("p", { class: "facts" });
  const labels = h("div", { class: "row-names", "aria-hidden": "true" });
  const detail = h("div", { class: "detail", "aria-live": "polite" });
  let shown = null; // {run, name, head, grid}
  const describe = (r, c) => explainCell(store, shown, r, c);
  const pick = (r, c) => store.set({ cell: [r, c], ...(isMap(shown.name) ? {} : { token: r }) });
  const label = () => `${shown.name}: arrow keys choose a number, Enter shows what it is made of`;
  const heat = makeRaster({ label, data: { what: "activation" }, describe, onPick: pick });
  const line = makeRaster({
    label: "The row of the chosen number",
    data: { what: "row" },
    describe: (_, c) => describe(store.state.cell[0], c),
    onPick: (_, c) => pick(store.state.cell[0], c),
  });
  const ofNorm = (r) => ({ formula: "‖row‖ = √(Σ x²)", filled: `${rowName(store, shown, r)}: ${fmt(norms.grid.data[r])}` });
  const norms = makeRaster({ label: "Norm of each row", data: { what: "row-norm" }, describe: ofNorm });
  const chart = h("div", { class: "chart" }, labels, heat.element, norms.element);
  const element = h("div", { class: "activation" }, facts, chart, detail);

  const update = (name) => {
    const { shown: run } = store;
    const { head, cell } = store.state;
    const tensor = run.get(name);
    chart.hidden = detail.hidden = !tensor;
    if (!tensor) return put(facts, `${name} needs a living page: this model is too large for one.`);
    if (!shown || shown.run !== run || shown.name !== name || shown.head !== head) {
      shown = { run, name, head, tensor, grid: gridOf(tensor, name, head) };
      showFacts(facts, shown);
      showGrid(chart, labels, { heat, norms }, store, shown);
    }
    showCell(detail, line, store, shown, cell);
    if (cell && fits(shown.grid, cell)) heat.mark(...cell);
  };
  onTheme(() => [heat, line, norms].forEach((raster) => raster.grid && raster.draw()));
  return { element, update };
}

function isMap(name) {
  return name.endsWith("attn_scores") || name.endsWith("pattern");
}

/** Rows and columns of an activation, of one head where it has heads. */
function gridOf(tensor, name, head) {
  const { shape, data } = tensor;
  if (shape.length === 2) return { rows: shape[0], columns: shape[1], data };
  if (isMap(name)) return { rows: shape[1], columns: shape[2], data: row(tensor, head) };
  const [T, , D] = shape;
  const grid = { rows: T, columns: D, data: new Float32Array(T * D) };
  for (let t = 0; t < T; t++) grid.data.set(row(tensor, t, head), t * D);
  return grid;
}

/** The index of a cell in the activation. */
function indexOf({ tensor, name, head }, r, c) {
  if (tensor.shape.length === 2) return [r, c];
  return isMap(name) ? [head, r, c] : [r, head, c];
}

function fits({ rows, columns }, [r, c]) {
  return r < rows && c < columns;
}

function showFacts(facts, { name, tensor, grid, head }) {
  const { low, mean, high } = statisticsOf(grid.data);
  const statistic = (what, value) => h("span", {}, `${what} `, number(value, { what: `activation-${what}` }));
  const of = tensor.shape.length === 3 ? `, head ${head}` : "";
  const { axes, formula } = formulaOf(name);
  put(
    facts,
    h("code", { text: name }),
    h("span", { "data-what": "shape", text: `${tensor.shape.join(" × ")} (${axes.join(", ")})${of}` }),
    h("span", { text: `= ${formula}` }),
    statistic("min", low), statistic("mean", mean), statistic("max", high),
  );
}

/** Of the finite numbers, which all are but masked scores. */
function statisticsOf(data) {
  let [low, high, sum, n] = [Infinity, -Infinity, 0, 0];
  for (const x of data) {
    if (!Number.isFinite(x)) continue;
    if (x < low) low = x;
    if (x > high) high = x;
    sum += x;
    n++;
  }
  return { low, high, mean: sum / n };
}

function showGrid(chart, labels, { heat, norms }, store, shown) {
  const { rows, columns, data } = shown.grid;
  const height = clamp(Math.floor(480 / rows), 3, 20);
  chart.style.setProperty("--rows", rows);
  chart.style.setProperty("--height", `${height}px`);
  const cell = isMap(shown.name) ? Math.max(height, 4) : columns < 16 ? 20 : null;
  chart.style.setProperty("--most", cell === null ? "1fr" : `${columns * cell}px`);
  const named = height < 11 ? [] : [...Array(rows).keys()];
  put(labels, ...named.map((r) => h("span", { text: rowName(store, shown, r) })));
  heat.show({ ...shown.grid, limit: limitOf(data) });
  const length = (r) => norm(data.subarray(r * columns, isMap(shown.name) ? r * columns + r + 1 : (r + 1) * columns));
  const lengths = Float32Array.from({ length: rows }, (_, r) => length(r));
  norms.element.hidden = columns === 1;
  norms.show({ rows, columns: 1, data: lengths, limit: Math.max(...lengths) });
}

function rowName(store, { run }, r) {
  return showToken(store.tokenAt(r, run));
}

function explainCell(store, shown, r, c) {
  const { formula, filled, note } = explainActivation(store, shown.name, indexOf(shown, r, c));
  const { axes } = formulaOf(shown.name);
  const where = indexOf(shown, r, c).map((i, axis) => `${axes[axis]} ${i}`).join(", ");
  const name = shown.name.split(".").at(-1);
  return { formula: `${name}[${where}] = ${formula}`, filled, note: note ?? `Row of “${rowName(store, shown, r)}”.` };
}

/** The chosen row and number. */
function showCell(detail, line, store, shown, cell) {
  const hint = "Click a number to see its row and what it is made of.";
  if (!cell || !fits(shown.grid, cell)) return put(detail, h("p", { class: "muted", text: hint }));
  const [r, c] = cell;
  const { columns, data } = shown.grid;
  const values = data.subarray(r * columns, (r + 1) * columns);
  const { formula, filled, note } = explainCell(store, shown, r, c);
  const index = indexOf(shown, r, c).join(",");
  put(
    detail,
    h("h3", {}, `row of “${rowName(store, shown, r)}”`),
    line.element,
    h("h3", {}, `number ${c}: `, number(values[c], { what: "number", name: shown.name, index })),
    h("div", { class: "formula", text: formula }),
    h("div", { class: "formula filled muted", "data-what": "filled", text: filled }),
    note ? h("p", { class: "muted", text: note }) : null,
  );
  line.show({ rows: 1, columns, data: values, limit: limitOf(data) });
  line.mark(0, c);
}
