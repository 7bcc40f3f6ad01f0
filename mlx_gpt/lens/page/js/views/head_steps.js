// What each step of one head shows: a sentence, and its numbers.

import { fmt, h, number } from "../dom.js";
import { explainProduct, explainProjection, explainScore, explainWeight, quoted, scaleOf, sumText } from "../heads.js";
import { dot } from "../tensor.js";
import { NEEDS_LIVING, keyRow, keyTable, keysShown, largest, moreRow, placed, strip, weightBar } from "./head_parts.js";

export function productStep(store, at) {
  const { q, query, key } = at;
  const k = at.k(key);
  const say = h("p", { text: `The query of ${quoted(store, query)} is what it looks for; the key of ${quoted(store, key)} is what that token can be found by. Their products, summed, say how well the key answers the query.` });
  if (!q || !k) return [say, h("p", { class: "muted", text: NEEDS_LIVING })];
  const products = q.map((x, i) => x * k[i]);
  const limit = largest(q, k);
  const multiply = (_, i) => ({ formula: `q${i} × k${i}`, filled: `${fmt(q[i])} × ${fmt(k[i])} = ${fmt(products[i])}` });
  const sum = number(dot(q, k), placed("product", at, { key }), () => explainProduct(q, k));
  return [
    say,
    strip(store, at, `query of ${quoted(store, query)}`, q, limit, (_, i) => explainProjection(store, at, "q", query, i), "--query"),
    strip(store, at, `key of ${quoted(store, key)}`, k, limit, (_, i) => explainProjection(store, at, "k", key, i), "--key"),
    strip(store, at, "their products", products, largest(products), multiply),
    h("p", { class: "result" }, "q·k, the sum of the products: ", sum),
  ];
}

export function scaleStep(store, at) {
  const { config } = store;
  const { key, layer, query, T, scores } = at;
  const D = config.n_embd / config.n_head;
  const scale = scaleOf(config, layer);
  const why = scale.text === "1"
    ? "This model does not scale its scores."
    : `A sum of ${D} products grows with √${D}. Times ${scale.text} = ${fmt(scale.value)} the scores keep a size at which the softmax can still divide the attention among several keys.`;
  const score = scores && number(scores[query * T + key], placed("score", at, { key }), () => explainScore(store, at));
  return [h("p", { text: why }), score && h("p", { class: "result" }, `score of ${quoted(store, key)}: q·k × ${scale.text} = `, score)];
}

export function maskStep(store, at) {
  const { q, query, T, layer, scores } = at;
  const future = [query + 1, query + 2].filter((key) => key < T);
  const { keys, left } = keysShown(at);
  const before = (key) => (q && at.k(key) ? dot(q, at.k(key)) * scaleOf(store.config, layer).value : (scores?.[query * T + key] ?? null));
  const row = (key) => {
    const masked = key > query;
    const value = masked && !q ? null : before(key);
    const unmasked = value === null ? "" : number(value, placed("unmasked", at, { key }), () => explainScore(store, { ...at, key }));
    return keyRow(store, at, key, [unmasked, masked ? "−∞" : value === null ? "" : fmt(value)]);
  };
  const hidden = T - 1 - query;
  const said = hidden
    ? `${quoted(store, query)} may look at itself and at the tokens before it. The scores of the ${hidden === 1 ? "later token" : `${hidden} later tokens`} become −∞.`
    : `${quoted(store, query)} is the last token, so nothing is in its future: the mask hides no key from it. For earlier tokens the scores of later ones become −∞.`;
  return [h("p", { text: said }), keyTable(["Key", "Score", "After the mask"], [...keys, ...future].map(row), [moreRow(left, hidden - future.length)])];
}

export function softmaxStep(store, at) {
  const { query, T, pattern, scores } = at;
  const { keys, others, left } = keysShown(at);
  const most = scores ? Math.max(...scores.subarray(query * T, query * T + query + 1)) : 0;
  const weight = (key) => pattern[query * T + key];
  const exp = (key) => Math.exp(scores[query * T + key] - most);
  const how = (key) => () => explainWeight(store, { ...at, key });
  const row = (key) => {
    const exps = scores ? [number(scores[query * T + key], placed("score", at, { key }), () => explainScore(store, { ...at, key })), number(exp(key), placed("exp", at, { key }), how(key))] : ["", ""];
    return keyRow(store, at, key, [...exps, number(weight(key), placed("weight", at, { key }), how(key)), weightBar(weight(key))]);
  };
  const all = Array.from({ length: query + 1 }, (_, key) => key);
  const total = (of, list) => list.reduce((sum, key) => sum + of(key), 0);
  const sum = (of, name, list) => number(total(of, list), placed(name, at, {}), () => ({ formula: "sum over the keys", filled: `${sumText(list.map((key) => fmt(of(key))))} = ${fmt(total(of, list))}` }));
  const sums = (label, list, suffix) => h("tr", {}, h("th", { scope: "row", text: label }), h("td", {}), h("td", {}, scores ? sum(exp, `exp-${suffix}`, list) : ""), h("td", {}, sum(weight, `weight-${suffix}`, list)), h("td", {}));
  const foot = [left ? sums(`${left} more`, others, "more") : null, sums("sum", all, "sum")];
  return [
    h("p", { text: "Softmax makes weights of the scores: e to the power of each score, divided by their sum. Each query divides one unit of attention among its keys. The largest score is subtracted first, which changes no weight and keeps the numbers small." }),
    keyTable(["Key", "Score", "exp(score − max)", "Weight", ""], keys.map(row), foot),
  ];
}

export function valueStep(store, at) {
  const { query, T, pattern, z, factor } = at;
  const { keys, others, left } = keysShown(at);
  const say = h("p", { text: `A value is what a token has to give. ${quoted(store, query)} receives the values, each times its weight: their sum is z.` });
  if (!z || !at.v(0)) return [say, h("p", { class: "muted", text: NEEDS_LIVING })];
  const weight = (key) => pattern[query * T + key];
  const moved = (list) => z.map((_, i) => list.reduce((sum, key) => sum + weight(key) * at.v(key)[i], 0));
  const rows = keys.map((key) => ({ key, vector: moved([key]) }));
  const limit = largest(z, ...rows.map(({ vector }) => vector));
  const all = Array.from({ length: query + 1 }, (_, key) => key);
  const explainMoved = (key) => (_, i) => ({
    formula: `weight × v${i} of ${quoted(store, key)}`, filled: `${fmt(weight(key))} × ${fmt(at.v(key)[i])} = ${fmt(weight(key) * at.v(key)[i])}`,
    note: `v${i}: ${explainProjection(store, at, "v", key, i).filled}`,
  });
  const explainSum = (list, name) => (_, i) => ({
    formula: `${name}${i} = Σ weight × v${i}${name === "z" && factor !== 1 ? ` × ${factor}, the factor of this head` : ""}`,
    filled: `${sumText(list.map((key) => `${fmt(weight(key))} × ${fmt(at.v(key)[i])}`))}${name === "z" && factor !== 1 ? `, times ${factor}` : ""} = ${fmt(name === "z" ? z[i] : moved(list)[i])}`,
  });
  return [
    say,
    ...rows.map(({ key, vector }) => strip(store, at, `${fmt(weight(key))} × v of ${quoted(store, key)}`, vector, limit, explainMoved(key), "--value")),
    left ? strip(store, at, `${left} more`, moved(others), limit, explainSum(others, "sum"), "--value") : null,
    strip(store, at, factor === 1 ? "z, their sum" : `z, their sum × ${factor}`, z, limit, explainSum(all, "z"), "--stream", "z"),
  ];
}
