// Readings of one attention head, and the formulas that explain its numbers.

import { fmt, percent, showToken } from "./dom.js";
import { dot, row } from "./tensor.js";

/** The weights of a head: row q holds what query q gives to each key, (T, T). */
export function patternOf(run, layer, head) {
  return headMap(run, layer, head, "pattern");
}

/** The scores of a head before the softmax, (T, T); null where they are not recorded. */
export function scoresOf(run, layer, head) {
  return headMap(run, layer, head, "attn_scores");
}

function headMap(run, layer, head, name) {
  const tensor = run.get(`blocks.${layer}.attn.hook_${name}`);
  return tensor ? row(tensor, head) : null;
}

/** The vector of a head at a position: its q, k, v or z (D,), or its result (C,); null where it is not recorded. */
export function vectorOf(run, layer, head, name, position) {
  const tensor = run.get(`blocks.${layer}.attn.hook_${name}`);
  return tensor ? row(tensor, position, head) : null;
}

/** What the scores are multiplied by, and how it is written. */
export function scaleOf(config, layer) {
  const D = config.n_embd / config.n_head;
  const root = config.scale_attn_weights === false ? { value: 1, text: "1" } : { value: 1 / Math.sqrt(D), text: `1/√${D}` };
  if (!config.scale_attn_by_inverse_layer_idx) return root;
  return { value: root.value / (layer + 1), text: `${root.text} / ${layer + 1}` };
}

/** What a head attends to, averaged over the queries that have such a key, from the second on:
 *  {first, offset, share, text}. ``share`` is the largest mean weight of a key ``offset`` tokens back. */
export function summarize(pattern, T) {
  if (T === 1) return { first: 1, offset: 0, share: 1, text: "one token" };
  let first = 0;
  for (let query = 1; query < T; query++) first += pattern[query * T] / (T - 1);
  let [offset, share] = [0, 0];
  for (let back = 0; back <= Math.min(8, (T - 1) / 2); back++) {
    const mean = meanBack(pattern, T, back);
    if (mean > share) [offset, share] = [back, mean];
  }
  const best = Math.max(first, share);
  const name = first >= share ? "first" : ["itself", "previous"][offset] ?? `${offset} back`;
  const text = best < 0.25 ? `≈ ${Math.round(keysAttended(pattern, T))} keys` : `${name} ${percent(best)}`;
  return { first, offset, share, text };
}

function meanBack(pattern, T, back) {
  let sum = 0;
  const start = Math.max(back, 1);
  for (let query = start; query < T; query++) sum += pattern[query * T + query - back];
  return sum / (T - start);
}

/** Number of keys that a head attends to: e to the power of the mean entropy of its rows. */
function keysAttended(pattern, T) {
  let entropy = 0;
  for (let query = 1; query < T; query++) {
    for (let key = 0; key <= query; key++) {
      const p = pattern[query * T + key];
      if (p > 0) entropy -= (p * Math.log(p)) / (T - 1);
    }
  }
  return Math.exp(entropy);
}

/** A sentence on what a head attends to. */
export function describe({ first, offset, share, text }, T) {
  if (T === 1) return "There is one token, which can only look at itself.";
  const back = ["the token itself", "the token before"][offset] ?? `the token ${offset} back`;
  const spread = text.startsWith("≈") ? ` It spreads over about ${text.slice(2)}.` : "";
  return `On average ${percent(share)} of a query's attention goes to ${back}, ${percent(first)} to the first token.${spread}`;
}

/** The key with the largest weight of a query. */
export function strongestKey(pattern, T, query) {
  let best = 0;
  for (let key = 1; key <= query; key++) if (pattern[query * T + key] > pattern[query * T + best]) best = key;
  return best;
}

export function quoted(store, position) {
  return `“${showToken(store.tokenAt(position))}”`;
}

/** "a + b + … + c" with the terms in the middle left out. */
export function sumText(terms, most = 4) {
  const signed = terms.map((term) => (term.startsWith("−") && !term.includes("×") ? `(${term})` : term));
  if (signed.length <= most + 2) return signed.join(" + ");
  return [...signed.slice(0, most), `… ${signed.length - most - 1} more …`, signed.at(-1)].join(" + ");
}

/** "2 × 3 + 1 × −1 + …": the products that sum to a·b. */
export function productsText(a, b) {
  return sumText(Array.from(a, (x, i) => `${fmt(x)} × ${fmt(b[i])}`));
}

/** q·k of a query and a key: {formula, filled}. */
export function explainProduct(q, k) {
  return { formula: "q·k = Σᵢ qᵢ × kᵢ", filled: `${productsText(q, k)} = ${fmt(dot(q, k))}` };
}

/** The score of a query and a key, q·k times the scale. */
export function explainScore(store, { layer, head, query, key }) {
  const scale = scaleOf(store.config, layer);
  const score = scoresOf(store.shown, layer, head)?.[query * store.shown.ids.length + key];
  const [q, k] = [vectorOf(store.shown, layer, head, "q", query), vectorOf(store.shown, layer, head, "k", key)];
  const formula = `score = q·k × ${scale.text}`;
  if (key > query) return { formula, filled: "−∞, since the key is in the query's future" };
  if (!q || !k) return { formula, filled: score === undefined ? "" : `score = ${fmt(score)}` };
  return { formula, filled: `q·k = ${explainProduct(q, k).filled}\nscore = ${fmt(dot(q, k))} × ${fmt(scale.value)} = ${fmt(score)}` };
}

/** The weight of a query and a key: softmax of the scores. */
export function explainWeight(store, { layer, head, query, key }) {
  const T = store.shown.ids.length;
  const weight = patternOf(store.shown, layer, head)[query * T + key];
  const scores = scoresOf(store.shown, layer, head)?.subarray(query * T, query * T + query + 1);
  const scale = scaleOf(store.config, layer).text;
  const formula = `weight = softmax(q·k × ${scale}) = exp(score − max) / Σ exp(score − max)`;
  const note = `Layer ${layer}, head ${head}: ${quoted(store, query)} looks at ${quoted(store, key)}.`;
  if (key > query) return { formula, filled: "exp(−∞) = 0", note: `${note.slice(0, -1)} in its future: not allowed.` };
  if (!scores) return { formula, filled: `weight = ${fmt(weight)}`, note };
  const most = scores.reduce((a, b) => Math.max(a, b));
  const terms = Array.from(scores, (score) => Math.exp(score - most));
  const sum = terms.reduce((a, b) => a + b, 0);
  const score = explainScore(store, { layer, head, query, key }).filled;
  const exp = `exp(${fmt(scores[key])} − ${fmt(most)})`.replace("− −", "+ ");
  return { formula, note, filled: `${score}\n${exp} = ${fmt(terms[key])}\nΣ = ${sumText(terms.map(fmt))} = ${fmt(sum)}\nweight = ${fmt(terms[key])} / ${fmt(sum)} = ${fmt(weight)}` };
}
