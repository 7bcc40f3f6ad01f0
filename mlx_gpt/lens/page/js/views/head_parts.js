// What the steps of one head are made of: tables of keys, strips of numbers.

import { h, showToken } from "../dom.js";
import { makeRaster } from "../raster.js";

const MOST_KEYS = 8; // the strongest keys of a query are shown, the others together

/** What a step says whose vectors were not recorded. */
export function notRecorded(what) {
  return h("p", { class: "muted", text: `This page was recorded without ${what}.` });
}

/** The strongest keys of the query in the order of the text, and the others. */
export function keysShown({ query, T, pattern }) {
  const all = Array.from({ length: query + 1 }, (_, key) => key);
  const strongest = [...all].sort((a, b) => pattern[query * T + b] - pattern[query * T + a]);
  const few = all.length <= MOST_KEYS + 2;
  const keys = few ? all : strongest.slice(0, MOST_KEYS).sort((a, b) => a - b);
  return { keys, others: all.filter((key) => !keys.includes(key)) };
}

/** Sentences as a paragraph. */
export function paragraph(...sentences) {
  return h("p", { text: sentences.join(" ") });
}

export function labelledRow(label, cells, props = {}) {
  return h("tr", props, h("th", { scope: "row" }, label), ...cells.map((cell) => h("td", {}, cell)));
}

export function keyTable(columns, rows, foot) {
  const head = h("thead", {}, h("tr", {}, ...columns.map((text) => h("th", { scope: "col", text }))));
  return h(
    "div",
    { class: "scroll" },
    h("table", {}, head, h("tbody", {}, ...rows), h("tfoot", {}, ...foot.filter(Boolean))),
  );
}

export function keyRow(store, { query }, key, cells) {
  const on = { pointerenter: () => store.point({ token: query, key }), pointerleave: () => store.point({}) };
  const name = h("span", {}, h("span", { class: "muted", text: `${key} ` }), showToken(store.tokenAt(key)));
  return labelledRow(name, cells, { on, "data-key": key, class: key > query ? "future" : null });
}

export function moreRow(past, future) {
  const parts = [past ? `${past} more before` : "", future > 0 ? `${future} more after` : ""].filter(Boolean);
  return parts.length ? h("tr", {}, h("th", { scope: "row", colspan: 3, text: `${parts.join(", ")}` })) : null;
}

/** A bar of a share in 0..1; ``kind`` is "raised" or "lowered" for a change. */
export function weightBar(share, kind = "") {
  return h("span", { class: `weight-bar ${kind}`, "aria-hidden": "true", style: { "--share": share } });
}

/** A labelled vector as a strip of colours; ``describe(_, i)`` explains its numbers. */
export function vectorStrip(label, vector, data, { limit = largest(vector), describe, hue = null }) {
  const raster = makeRaster({ label: `${label}, ${vector.length} numbers`, data, describe });
  raster.show({ rows: 1, columns: vector.length, data: vector, limit });
  const name = h("span", { class: "strip-label", style: hue ? { "--hue": `var(${hue})` } : {}, text: label });
  return h("div", { class: "vector-strip" }, name, raster.element);
}

/** The data- attributes of a number of a step. */
export function placed(what, { layer, head, query }, more = {}) {
  return { what, layer, head, query, ...more };
}

/** The largest size of a number in some vectors. */
export function largest(...vectors) {
  return Math.max(...vectors.map((vector) => vector.reduce((most, x) => Math.max(most, Math.abs(x)), 0)));
}
