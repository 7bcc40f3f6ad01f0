// Readings of one attention head, and the formulas that explain its numbers.

import { fmt, percent, showToken } from "./dom.js";
import { Tensor, dot, linear, row } from "./tensor.js";

/** The weights of a head: row q holds what query q gives to each key, (T, T). */
export function patternOf(run, layer, head) {
  return headMap(run, layer, head, "pattern");
}

/** The scores of a head before the softmax, (T, T). */
export function scoresOf(run, layer, head) {
  return headMap(run, layer, head, "attn_scores");
}

function headMap(run, layer, head, name) {
  return row(run.get(`blocks.${layer}.attn.hook_${name}`), head);
}

/** The vector of a head at a position: its q, k, v or z (D,), or its result (C,); null where it is not recorded. */
export function vectorOf(run, layer, head, name, position) {
  const tensor = run.get(`blocks.${layer}.attn.hook_${name}`);
  return tensor ? row(tensor, position, head) : null;
}

/** What the scores are multiplied by, and how it is written. */
export function scaleOf(config, layer) {
  const D = config.n_embd / config.n_head;
  const root =
    config.scale_attn_weights === false ? { value: 1, text: "1" } : { value: 1 / Math.sqrt(D), text: `1/√${D}` };
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
  const name = first >= share ? "first" : (["itself", "previous"][offset] ?? `${offset} back`);
  const text = best < 0.25 ? `≈ ${keysAttended(pattern, T).toFixed(1)} keys` : `${name} ${percent(best)}`;
  return { first, offset, share, text };
}

function meanBack(pattern, T, back) {
  let sum = 0;
  const start = Math.max(back, 1);
  for (let query = start; query < T; query++) sum += pattern[query * T + query - back];
  return sum / (T - start);
}

/** Number of keys that a head attends to: e to the power of the mean entropy of its rows but the first. */
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
  const shares = `${percent(share)} of the attention goes to ${back}, ${percent(first)} to the first token`;
  return `On average of the queries after the first, which sees only itself, ${shares}.${spread}`;
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

/** The score of a query and a key, q·k times the scale; that of a key of the future is what the mask replaces. */
export function explainScore(store, { run, layer, head, query, key }) {
  const scale = scaleOf(store.config, layer);
  const [q, k] = [vectorOf(run, layer, head, "q", query), vectorOf(run, layer, head, "k", key)];
  const formula = `score = q·k × ${scale.text}`;
  if (!q || !k) return { formula, filled: `score = ${fmt(scoresOf(run, layer, head)[query * run.ids.length + key])}` };
  const product = dot(q, k);
  const lines = [
    `q·k = ${productsText(q, k)} = ${fmt(product)}`,
    `score = ${fmt(product)} × ${fmt(scale.value)} = ${fmt(product * scale.value)}`,
  ];
  return { formula, filled: lines.join("\n"), note: `Query of ${quoted(store, query)}, key of ${quoted(store, key)}.` };
}

/** A number of a query, key or value: what the layer's weights make of the token's normalized vector. */
export function explainProjection(store, { run, layer, head }, letter, position, i) {
  const value = vectorOf(run, layer, head, letter, position)[i];
  const formula = `${letter}${i} = x · W + b, with x the normalized vector of ${quoted(store, position)}`;
  if (!store.living) return { formula, filled: `${letter}${i} = ${fmt(value)}` };
  const { n_embd: C, n_head: H } = store.config;
  const output = "qkv".indexOf(letter) * C + head * (C / H) + i;
  const of = (name) => store.model.weight(`h.${layer}.attn.c_attn.${name}`);
  const x = row(run.get(`blocks.${layer}.ln1.hook_out`), position);
  return {
    formula,
    filled: `${productsText(x, row(of("weight"), output))} + ${fmt(of("bias").data[output])} = ${fmt(value)}`,
  };
}

/** A number of what a head adds to the stream. */
export function explainResult(store, { layer, head, z, result }, c) {
  const formula = `result${c} = z · W_O, column ${c}`;
  if (!store.living || !z) return { formula, filled: `result${c} = ${fmt(result[c])}` };
  const outputs = row(store.model.weight(`h.${layer}.attn.c_proj.weight`), c).subarray(
    head * z.length,
    (head + 1) * z.length,
  );
  return { formula, filled: `${productsText(z, outputs)} = ${fmt(result[c])}` };
}

/** What the final norm makes of a part of the stream, at the scale of this text: centered, times its weight, / scale. */
export function throughFinalNorm(run, position, vector) {
  const mean = vector.reduce((sum, x) => sum + x, 0) / vector.length;
  const scale = run.get("ln_final.hook_scale").data[position];
  const weight = run.model.weight("ln_f.weight").data;
  return vector.map((x, c) => ((x - mean) * weight[c]) / scale);
}

/** What a part of the stream adds to the logit of each token: (C,) -> (V,). */
export function logitsOf(run, position, vector) {
  return linear(new Tensor([1, vector.length], throughFinalNorm(run, position, vector)), run.model.head).data;
}

/** The weight of a query and a key: softmax of the scores. */
export function explainWeight(store, { run, layer, head, query, key }) {
  const T = run.ids.length;
  const weight = patternOf(run, layer, head)[query * T + key];
  const scores = scoresOf(run, layer, head).subarray(query * T, query * T + query + 1);
  const scale = scaleOf(store.config, layer).text;
  const formula = `weight = softmax(q·k × ${scale}) = exp(score − max) / Σ exp(score − max)`;
  const note = `Layer ${layer}, head ${head}: ${quoted(store, query)} looks at ${quoted(store, key)}.`;
  if (key > query) return { formula, filled: "exp(−∞) = 0", note: `${note.slice(0, -1)} in its future: not allowed.` };
  const most = scores.reduce((a, b) => Math.max(a, b));
  const terms = Array.from(scores, (score) => Math.exp(score - most));
  const sum = terms.reduce((a, b) => a + b, 0);
  const score = explainScore(store, { run, layer, head, query, key }).filled;
  const exp = `exp(${fmt(scores[key])} − ${fmt(most)})`.replace("− −", "+ ");
  const lines = [
    score,
    `${exp} = ${fmt(terms[key])}`,
    `Σ = ${sumText(terms.map(fmt))} = ${fmt(sum)}`,
    `weight = ${fmt(terms[key])} / ${fmt(sum)} = ${fmt(weight)}`,
  ];
  return { formula, note, filled: lines.join("\n") };
}
