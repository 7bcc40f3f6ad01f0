// The logit lens: what the model would predict at each position if it stopped after each layer.

import { inSlices } from "../canvas.js";
import { clamp, closePopover, h, heat, openPopover, percent, put, showToken } from "../dom.js";
import { logitLens, topTokens } from "../readings.js";
import { row } from "../tensor.js";

const TOP = 5;
const SHARES = { steps: [0, 0.25, 0.5, 0.75, 1], shade: (p) => p, show: percent };
const RANKS = { steps: [1, 10, 100, 1000], shade: (rank) => 1 - Math.log10(rank) / 3, show: String };
const MODES = {
  top: { title: "most probable token", legend: "Colour: its probability.", ...SHARES },
  p: { title: "probability of the final prediction", legend: "Colour: that probability.", ...SHARES },
  rank: { title: "rank of the final prediction", legend: "Colour: the rank, 1 for the most probable token.", ...RANKS },
};

export function makeLogitLensView(store) {
  const { n_layer } = store.config;
  const options = Object.entries(MODES).map(([value, { title }]) => h("option", { value, text: title }));
  const mode = h("select", { id: "lens-mode", on: { change: () => repaint() } }, ...options);
  const legend = h("div", { class: "row lens-legend muted" });
  const body = h("tbody");
  const label = "Logit lens: a row for each token, a column for each layer";
  const table = h("table", { class: "lens", role: "grid", "data-keys": "", "aria-label": label }, headOf(n_layer), body);
  const element = h(
    "div",
    {},
    h("h2", { text: "Logit lens" }),
    h("p", { text: INTRO }),
    h("p", { class: "muted", text: CONTROLS }),
    h("div", { class: "row choices" }, h("label", {}, "show the ", mode), legend),
    h("div", { class: "scroll" }, table),
  );
  put(legend, ...swatchesOf(MODES.top));
  const lens = { run: null, rows: [], active: [0, n_layer] }; // rows: what was read at each position
  const waiting = new Set(); // positions whose rows are on the screen and were not read, or are to be painted again

  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const position = Number(target.dataset.position);
      if (lens.rows[position]) continue;
      if (isIntersecting) waiting.add(position);
      else waiting.delete(position);
    }
    readWaiting();
  }, { rootMargin: "400px" });
  const read = inSlices(readRow);
  const readWaiting = () => read([...waiting].sort((a, b) => a - b));

  function readRow(position) {
    waiting.delete(position);
    if (position >= lens.run.ids.length) return;
    lens.rows[position] ??= readLens(store, lens.run, position);
    paintRow(body.children[position], lens.rows[position], mode.value, store);
    if (position === lens.active[0]) body.children[position].children[lens.active[1] + 1].tabIndex = 0;
  }

  function repaint() {
    put(legend, ...swatchesOf(MODES[mode.value]));
    lens.rows.forEach((_, position) => waiting.add(position));
    readWaiting();
  }

  /** The cell at a position and layer, which may have to be read first. */
  function cellAt([position, layer]) {
    if (!lens.rows[position]) readRow(position);
    return body.children[position].children[layer + 1];
  }

  function activate(place) {
    cellAt(lens.active).tabIndex = -1;
    lens.active = place;
    cellAt(place).tabIndex = 0;
  }

  function open(cell) {
    const [position, layer] = placeOf(cell);
    store.point({ token: position, layer: Math.max(layer - 1, 0) });
    openPopover(cell, detailsOf(store, lens, position, layer));
  }

  const onCell = (action) => ({ target }) => target.closest("td") && action(target.closest("td"));
  table.addEventListener("pointerover", onCell(open));
  table.addEventListener("pointerleave", () => {
    const focused = table.querySelector("td:focus-visible");
    closePopover();
    store.point({});
    if (focused) open(focused);
  });
  table.addEventListener("focusin", onCell((cell) => { activate(placeOf(cell)); open(cell); }));
  table.addEventListener("focusout", closePopover);
  table.addEventListener("click", onCell((cell) => { store.set({ token: placeOf(cell)[0] }); cell.focus(); }));
  table.addEventListener("keydown", (event) => {
    if (event.key === "Escape") closePopover();
    if (event.key === "Enter" || event.key === " ") store.set({ token: lens.active[0] });
    const place = stepFrom(event.key, lens.active, lens.run.ids.length - 1, n_layer);
    if (place || event.key === " ") event.preventDefault();
    if (place) cellAt(place).focus();
  });

  const update = () => {
    const { shown: run } = store;
    if (run !== lens.run) {
      const same = sharedRows(run, lens.run);
      lens.run = run;
      lens.rows.length = Math.min(lens.rows.length, same);
      [...body.children].slice(same).forEach((line) => { observer.unobserve(line); line.remove(); });
      [...waiting].filter((position) => position >= same).forEach((position) => waiting.delete(position));
      for (let position = same; position < run.ids.length; position++) {
        body.append(lineOf(store, position));
        observer.observe(body.lastChild);
      }
      lens.active = [store.token, n_layer];
      activate([store.token, n_layer]);
    }
    [...body.children].forEach((line, position) => line.setAttribute("aria-selected", position === store.token));
  };
  return { id: "lens", title: "Logit lens", element, update };
}

const INTRO =
  "Each layer's vector, read as if it were the last: the final norm and the head are applied to it. " +
  "Read a row from left to right to see a prediction form; the last column is what the model says comes after the token.";
const CONTROLS = "Hover, tap or focus a cell for its five most probable tokens; click it to select the token.";

function headOf(n_layer) {
  const after = Array.from({ length: n_layer }, (_, layer) => `after ${layer}`);
  const titles = ["token", "start", ...after.slice(0, -1), `${after.at(-1)}: the model`];
  return h("thead", {}, h("tr", {}, ...titles.map((text) => h("th", { scope: "col", text }))));
}

function lineOf(store, position) {
  const text = showToken(store.tokenAt(position, store.shown));
  return h("tr", { "data-position": position }, h("th", { scope: "row", text }));
}

/** Read a position: for each layer's input and the last output {top, id, p, rank}, the last three of the prediction. */
function readLens(store, run, position) {
  if (!store.living) return readRecorded(run.logitLens(position, TOP));
  const logits = logitLens(run, position); // (n_layer + 1, V)
  const tops = Array.from({ length: logits.shape[0] }, (_, i) => topTokens(row(logits, i), TOP));
  const { id } = tops.at(-1)[0];
  return tops.map((top, i) => {
    const others = row(logits, i);
    const rank = others.reduce((count, logit) => count + (logit > others[id]), 1);
    return { top, id, rank, p: top[0].probability * Math.exp(others[id] - top[0].logit) };
  });
}

/** Where only the most probable tokens were recorded, the prediction is looked up among them. */
function readRecorded(tops) {
  const { id } = tops.at(-1)[0];
  return tops.map((top) => {
    const place = top.findIndex((token) => token.id === id);
    return { top, id, rank: place < 0 ? null : place + 1, p: place < 0 ? null : top[place].probability };
  });
}

/** How many rows two runs share: those of the tokens that are equal from the beginning on. */
function sharedRows(run, before) {
  if (!before || run.key !== before.key) return 0;
  let n = 0;
  while (n < run.ids.length && run.ids[n] === before.ids[n]) n++;
  return n;
}

function paintRow(line, layers, mode, store) {
  const position = Number(line.dataset.position);
  const focused = line.contains(document.activeElement) ? [...line.children].indexOf(document.activeElement) : -1;
  put(line, line.firstChild, ...layers.map((reading, layer) => cellOf(reading, mode, store, { position, layer })));
  line.children[focused]?.focus();
}

function cellOf({ top, id, p, rank }, mode, { tokenizer }, { position, layer }) {
  const { shade, show } = MODES[mode];
  const value = { top: top[0].probability, p, rank }[mode];
  const unknown = mode === "p" ? "–" : `> ${TOP}`;
  const text = mode === "top" ? showToken(tokenizer.tokenText(top[0].id)) : value === null ? unknown : show(value);
  return h("td", {
    tabindex: "-1",
    text,
    "data-what": `lens-${mode}`,
    "data-position": position,
    "data-layer": layer,
    "data-id": mode === "top" ? top[0].id : id,
    "data-value": value,
    style: { background: colour(value === null ? 0 : shade(value)) },
  });
}

/** Text stays legible on the full colour. */
function colour(shade) {
  return heat(0.6 * clamp(shade, 0, 1));
}

function swatchesOf({ legend, steps, shade, show }) {
  const swatch = (value) => h("span", { class: "swatch", style: { background: colour(shade(value)) }, text: show(value) });
  return [h("span", { text: legend }), ...steps.map(swatch)];
}

function placeOf(cell) {
  return [Number(cell.dataset.position), Number(cell.dataset.layer)];
}

function stepFrom(key, [position, layer], last, n_layer) {
  const place = {
    ArrowUp: [position - 1, layer],
    ArrowDown: [position + 1, layer],
    ArrowLeft: [position, layer - 1],
    ArrowRight: [position, layer + 1],
    Home: [position, 0],
    End: [position, n_layer],
    PageUp: [position - 10, layer],
    PageDown: [position + 10, layer],
  }[key];
  return place && [clamp(place[0], 0, last), clamp(place[1], 0, n_layer)];
}

/** The popover of a cell: its most probable tokens, and where the final prediction stands. */
function detailsOf({ tokenizer, shown }, { rows }, position, layer) {
  const { top, id, p, rank } = rows[position][layer];
  const text = (token) => showToken(tokenizer.tokenText(token));
  const lines = top.map((token, i) => {
    const data = { "data-what": "lens-token", "data-id": token.id, "data-value": token.probability };
    const name = h("th", { scope: "row", text: text(token.id) });
    return h("tr", {}, h("td", { text: String(i + 1) }), name, h("td", { ...data, text: percent(token.probability) }));
  });
  const where = layer === 0 ? "at the start" : `after layer ${layer - 1}`;
  return {
    formula: "softmax(W_U · LN_f(x))",
    filled: `x: the vector of “${showToken(tokenizer.tokenText(shown.ids[position]))}” ${where}`,
    content: h("table", { class: "top" }, h("tbody", {}, ...lines)),
    note: `The final prediction “${text(id)}” ${rank === null ? "is not among these" : `has rank ${rank} and ${percent(p)}`}.`,
  };
}
