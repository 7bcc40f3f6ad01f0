// Two distributions of the next token beside each other: probabilities, their difference, and the divergence.

import { diverge, fmt, h, number, percent, put, showToken } from "../dom.js";
import { NextToken, divergence } from "../distribution.js";

const COMPARED = 6; // most probable tokens of each

/** A table of {run, position} a and b. ``labels`` are the names of both, ``what`` begins the names of the numbers. */
export function makeDifferenceTable(store, labels, what) {
  const body = h("tbody");
  const head = ["token", ...labels, "difference"].map((text) => h("th", { scope: "col", text }));
  head.at(-1).title = "in percentage points (pp)";
  const table = h("table", { class: "difference" }, h("thead", {}, h("tr", {}, ...head)), body);
  const total = h("p");
  let drawn = [];
  const update = (a, b) => {
    const key = [a.run, a.position, b.run, b.position];
    if (key.every((x, i) => x === drawn[i])) return;
    drawn = key;
    const [p, q] = [a, b].map(({ run, position }) => new NextToken(run, position));
    const ids = [...new Set([...p.top(COMPARED), ...q.top(COMPARED)])];
    ids.sort((x, y) => (q.has(y) ? q.raw(y) : 0) - (q.has(x) ? q.raw(x) : 0));
    put(body, ...ids.map((id) => differenceRow(store, id, p, q, what)));
    put(total, ...divergenceOf(p, q, ids[0], labels, what));
  };
  return { element: h("div", {}, h("div", { class: "scroll" }, table), total), update };
}

function differenceRow(store, id, p, q, what) {
  const [before, after] = [p, q].map((next) => (next.has(id) ? next.raw(id) : null));
  const cell = (x, part, how, text) =>
    x === null ? h("td", { class: "muted", title: "not recorded", text: "–" }) : h("td", {}, number(x, { what: `${what}-${part}`, id }, how, text(x)));
  const change = before === null || after === null ? null : after - before;
  const minus = () => ({ formula: "difference of the probabilities (1 pp = 0.01)", filled: `${fmt(after)} − ${fmt(before)} = ${fmt(change)}` });
  const last = cell(change, "difference", minus, signedPercent);
  last.style.background = diverge(0.7 * change);
  const name = showToken(store.tokenizer.tokenText(id));
  const both = [cell(before, "a", () => p.explain(id), percent), cell(after, "b", () => q.explain(id), percent)];
  return h("tr", {}, h("th", { scope: "row", text: name }), ...both, last);
}

/** A difference of probabilities in percentage points. */
function signedPercent(x) {
  if (x === 0) return "0";
  return Math.abs(x) < 0.001 ? "≈ 0" : `${x > 0 ? "+" : "−"}${percent(Math.abs(x)).replace("%", "pp")}`;
}

/** The Kullback-Leibler divergence, where both distributions are known completely. */
function divergenceOf(p, q, id, [a, b], what) {
  if (p.ids || q.ids) return [`Only the ${p.ids.length} most probable tokens are recorded by name.`];
  const value = divergence(p.logits, q.logits);
  const how = () => ({
    formula: `KL(${a} ‖ ${b}) = sum of p log(p / q) over all tokens`,
    filled: `${fmt(p.raw(id))} × log(${fmt(p.raw(id))} / ${fmt(q.raw(id))}) + … = ${fmt(value)} nats`,
    note: "0 for equal distributions.",
  });
  return ["Divergence: ", number(value, { what: `${what}-divergence` }, how), " nats"];
}
