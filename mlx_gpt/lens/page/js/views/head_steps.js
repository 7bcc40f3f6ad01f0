// What each step of one head shows: a sentence, and its numbers.

import { fmt, h, number } from "../dom.js";
import { explainProduct, explainProjection, explainScore, explainWeight, quoted, scaleOf, sumText } from "../heads.js";
import { dot } from "../tensor.js";
import { keyRow, keyTable, keysShown, largest, moreRow } from "./head_parts.js";
import { notRecorded, paragraph, placed, labelledRow, vectorStrip, weightBar } from "./head_parts.js";

const LEFT_OUT = "the vectors of the head; a living page shows them";

export function productStep(store, at) {
  const { q, query, key } = at;
  const k = at.k(key);
  const [asking, answering] = [quoted(store, query), quoted(store, key)];
  const say = paragraph(
    `The query of ${asking} is what it looks for; the key of ${answering} is what that token can be found by.`,
    "Their products, summed, say how well the key answers the query.",
  );
  if (!q || !k) return [say, notRecorded(LEFT_OUT)];
  const products = q.map((x, i) => x * k[i]);
  const limit = largest(q, k);
  const multiply = (_, i) => ({
    formula: `q${i} × k${i}`,
    filled: `${fmt(q[i])} × ${fmt(k[i])} = ${fmt(products[i])}`,
  });
  const projected = (letter, position) => (_, i) => explainProjection(store, at, letter, position, i);
  const sum = number(dot(q, k), placed("product", at, { key }), () => explainProduct(q, k));
  return [
    say,
    vectorStrip(`query of ${asking}`, q, placed("q", at), { limit, describe: projected("q", query), hue: "--query" }),
    vectorStrip(`key of ${answering}`, k, placed("k", at, { key }), { limit, describe: projected("k", key), hue: "--key" }),
    vectorStrip("their products", products, placed("products", at, { key }), { describe: multiply }),
    h("p", { class: "result" }, "q·k, the sum of the products: ", sum),
  ];
}

export function scaleStep(store, at) {
  const { config } = store;
  const { key, layer, query, T, scores } = at;
  const D = config.n_embd / config.n_head;
  const scale = scaleOf(config, layer);
  const why =
    scale.text === "1"
      ? paragraph("This model does not scale its scores.")
      : paragraph(
          `A sum of ${D} products grows with √${D}. Times ${scale.text} = ${fmt(scale.value)} the scores keep a size`,
          "at which the softmax can still divide the attention among several keys.",
        );
  const score = number(scores[query * T + key], placed("scaled", at, { key }), () => explainScore(store, at));
  return [why, h("p", { class: "result" }, `score of ${quoted(store, key)}: q·k × ${scale.text} = `, score)];
}

export function maskStep(store, at) {
  const { q, query, T, layer, scores } = at;
  const future = [query + 1, query + 2].filter((key) => key < T);
  const { keys, others } = keysShown(at);
  const row = (key) => {
    const masked = key > query;
    const value = masked ? q && dot(q, at.k(key)) * scaleOf(store.config, layer).value : scores[query * T + key];
    const before =
      value === null ? "" : number(value, placed("unmasked", at, { key }), () => explainScore(store, { ...at, key }));
    return keyRow(store, at, key, [before, masked ? "−∞" : fmt(value)]);
  };
  const hidden = T - 1 - query;
  const said = hidden
    ? paragraph(
        `${quoted(store, query)} may look at itself and at the tokens before it.`,
        hidden === 1
          ? "The score of the later token becomes −∞."
          : `The scores of the ${hidden} later tokens become −∞.`,
      )
    : paragraph(
        `${quoted(store, query)} is the last token, so nothing is in its future: the mask hides no key from it.`,
        "For earlier tokens the scores of later ones become −∞.",
      );
  const more = moreRow(others.length, hidden - future.length);
  return [said, keyTable(["Key", "Score", "After the mask"], [...keys, ...future].map(row), [more])];
}

export function softmaxStep(store, at) {
  const { query, T, pattern, scores } = at;
  const { keys, others } = keysShown(at);
  const most = scores.subarray(query * T, query * T + query + 1).reduce((a, b) => Math.max(a, b));
  const score = (key) => scores[query * T + key];
  const exp = (key) => Math.exp(score(key) - most);
  const weight = (key) => pattern[query * T + key];
  const row = (key) => {
    const how = () => explainWeight(store, { ...at, key });
    const numbers = [
      number(score(key), placed("score", at, { key }), () => explainScore(store, { ...at, key })),
      number(exp(key), placed("exp", at, { key }), how),
      number(weight(key), placed("weight", at, { key }), how),
    ];
    return keyRow(store, at, key, [...numbers, weightBar(weight(key))]);
  };
  const sumOf = (name, of, list) => {
    const sum = list.reduce((total, key) => total + of(key), 0);
    const terms = () => sumText(list.map((key) => fmt(of(key))));
    return number(sum, placed(name, at), () => ({ formula: "sum over the keys", filled: `${terms()} = ${fmt(sum)}` }));
  };
  const sums = (label, name, list) =>
    labelledRow(label, ["", sumOf(`exp-${name}`, exp, list), sumOf(`weight-${name}`, weight, list), ""]);
  const foot = [
    others.length ? sums(`${others.length} more`, "more", others) : null,
    sums("sum", "sum", [...keys, ...others]),
  ];
  return [
    paragraph(
      "Softmax makes weights of the scores: e to the power of each score, divided by their sum.",
      "Each query divides one unit of attention among its keys.",
      "The largest score is subtracted first, which changes no weight and keeps the numbers small.",
    ),
    keyTable(["Key", "Score", "exp(score − max)", "Weight", ""], keys.map(row), foot),
  ];
}

export function valueStep(store, at) {
  const { query, T, pattern, z, factor } = at;
  const { keys, others } = keysShown(at);
  const say = paragraph(
    "A value is what a token has to give.",
    `${quoted(store, query)} receives the values, each times its weight: their sum is z.`,
  );
  if (!z) return [say, notRecorded(LEFT_OUT)];
  const weight = (key) => pattern[query * T + key];
  const sumOf = (list) => z.map((_, i) => list.reduce((sum, key) => sum + weight(key) * at.v(key)[i], 0));
  const terms = (list, i) => sumText(list.map((key) => `${fmt(weight(key))} × ${fmt(at.v(key)[i])}`));
  const moved = keys.map((key) => sumOf([key]));
  const limit = largest(z, ...moved);
  const explainMoved = (key, vector) => (_, i) => ({
    formula: `weight × v${i} of ${quoted(store, key)}`,
    filled: `${terms([key], i)} = ${fmt(vector[i])}`,
    note: `${explainProjection(store, at, "v", key, i).filled} is v${i}`,
  });
  const explainRest = (_, i) => ({
    formula: `Σ weight × v${i} of the other keys`,
    filled: `${terms(others, i)} = ${fmt(rest[i])}`,
  });
  const times = factor === 1 ? (sum) => sum : (sum) => `${fmt(factor)} × (${sum})`;
  const explainSum = (_, i) => ({
    formula: `z${i} = ${times(`Σ weight × v${i}`)}`,
    filled: `${times(terms([...keys, ...others], i))} = ${fmt(z[i])}`,
    note: factor === 1 ? null : `This head is scaled by ${fmt(factor)}.`,
  });
  const rest = sumOf(others);
  const labelOf = (key) => `${fmt(weight(key))} × v of ${quoted(store, key)}`;
  const strip = (label, vector, describe, name, data = {}) =>
    vectorStrip(label, vector, placed(name, at, data), { limit, describe, hue: "--value" });
  return [
    say,
    ...keys.map((key, i) => strip(labelOf(key), moved[i], explainMoved(key, moved[i]), "moved", { key })),
    others.length ? strip(`${others.length} more`, rest, explainRest, "moved-more") : null,
    strip(factor === 1 ? "z, their sum" : `z, their sum × ${fmt(factor)}`, z, explainSum, "z"),
  ];
}
