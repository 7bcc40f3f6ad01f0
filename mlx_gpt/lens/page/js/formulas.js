// How each activation is computed, as in lens/trace.py: a short formula by its name, with the values filled in.

import { ACTIVATIONS } from "./activations.js";
import { fmt } from "./dom.js";
import { explainProjection, explainResult, explainScore, explainWeight, productsText, vectorOf } from "./heads.js";
import { at, dot, row } from "./tensor.js";

/**
 * By the name within a block: the names of the axes, the formula, and ``fill(context, ...index)``, which returns the
 * formula with its values, or {formula, filled, note}. ``context`` has store, run, layer and ``of``, the name of an
 * activation of the layer. What is filled in needs the weights only where ``weight`` is called.
 */
const VECTOR = ["token", "number"];
const HEAD_VECTOR = ["token", "head", "number"];
const MAP = ["head", "query", "key"];
const FORMULAS = {
  hook_embed: { axes: VECTOR, formula: "W_E[id of the token]", fill: fillEmbedding },
  hook_pos_embed: { axes: VECTOR, formula: "W_pos[position]", fill: fillPosition },
  hook_resid_pre: { axes: VECTOR, formula: "hook_embed + hook_pos_embed, or the layer before's hook_resid_post", fill: fillStream },
  hook_resid_mid: { axes: VECTOR, formula: "hook_resid_pre + hook_attn_out", fill: sumOf("hook_resid_pre", "hook_attn_out") },
  hook_resid_post: { axes: VECTOR, formula: "hook_resid_mid + hook_mlp_out", fill: sumOf("hook_resid_mid", "hook_mlp_out") },
  hook_scale: { axes: VECTOR, formula: "√(mean((x − mean x)²) + ε)", fill: fillScale },
  hook_normalized: { axes: VECTOR, formula: "(x − mean x) / scale", fill: fillNormalized },
  hook_out: { axes: VECTOR, formula: "normalized × weight + bias", fill: fillNorm },
  hook_q: { axes: HEAD_VECTOR, formula: "LN(x) · W_Q + b_Q", fill: projectionTo("q") },
  hook_k: { axes: HEAD_VECTOR, formula: "LN(x) · W_K + b_K", fill: projectionTo("k") },
  hook_v: { axes: HEAD_VECTOR, formula: "LN(x) · W_V + b_V", fill: projectionTo("v") },
  hook_attn_scores: { axes: MAP, formula: "q · k × scale, −∞ for keys of the future", fill: fillScore },
  hook_pattern: { axes: MAP, formula: "softmax of the scores", fill: fillWeight },
  hook_z: { axes: HEAD_VECTOR, formula: "Σ over keys: pattern × v", fill: fillZ },
  hook_result: { axes: HEAD_VECTOR, formula: "z · W_O of the head", fill: fillResult },
  hook_attn_out: { axes: VECTOR, formula: "z of all heads · W_O + b_O", fill: affine("attn.hook_z", "attn.c_proj") },
  hook_pre: { axes: ["token", "neuron"], formula: "LN(x) · W_in + b_in", fill: affine("ln2.hook_out", "mlp.c_fc") },
  hook_post: { axes: ["token", "neuron"], formula: "activation function of hook_pre", fill: fillPost },
  hook_mlp_out: { axes: VECTOR, formula: "hook_post · W_out + b_out", fill: affine("mlp.hook_post", "mlp.c_proj") },
  hook_unembed: { axes: ["token", "next token"], formula: "LN_f(x) · W_U", fill: fillLogit },
};

/** {axes, formula} of an activation. */
export function formulaOf(name) {
  return FORMULAS[name.split(".").at(-1)];
}

/** One number of an activation: {formula, filled, note}. */
export function explainActivation(store, name, index) {
  const { shown: run } = store;
  const { formula, fill } = formulaOf(name);
  const value = at(run.get(name), ...index);
  if (!store.living) return { formula, filled: `= ${fmt(value)}`, note: "The numbers that it is made of need a living page." };
  const layer = name.startsWith("blocks.") ? Number(name.split(".")[1]) : null;
  const of = (part) => `blocks.${layer}.${part}`;
  const context = { store, run, layer, name, of, weight: (weight) => store.model.weight(weight) };
  const found = fill(context, ...index);
  const edited = store.edited ? "An edit of this page may have replaced what the formula gives." : null;
  return typeof found === "string" ? { formula, filled: found, note: edited } : found;
}

function fillEmbedding({ run, weight }, t, c) {
  return `W_E[${run.ids[t]}, ${c}] = ${fmt(at(weight("wte.weight"), run.ids[t], c))}`;
}

function fillPosition({ weight }, t, c) {
  return `W_pos[${t}, ${c}] = ${fmt(at(weight("wpe.weight"), t, c))}`;
}

function fillStream({ run, layer }, t, c) {
  return plus(run, layer === 0 ? ["hook_embed", "hook_pos_embed"] : [`blocks.${layer - 1}.hook_resid_post`], [t, c]);
}

/** Fill in the sum of two activations of the layer. */
function sumOf(...parts) {
  return ({ run, of }, t, c) => plus(run, parts.map(of), [t, c]);
}

function plus(run, names, index) {
  const values = names.map((name) => at(run.get(name), ...index));
  const sum = values.length > 1 ? ` = ${fmt(values.reduce((a, b) => a + b))}` : "";
  return values.map(fmt).join(" + ").replaceAll("+ −", "− ") + sum;
}

/** Fill in a linear layer: the vector of an activation of the layer, times one output's weights, plus its bias. */
function affine(input, linear) {
  return ({ run, layer, of, weight }, t, i) => {
    const bias = at(weight(`h.${layer}.${linear}.bias`), i);
    return product(row(run.get(of(input)), t), row(weight(`h.${layer}.${linear}.weight`), i), bias);
  };
}

function product(a, b, bias = null) {
  const shift = bias === null ? "" : ` + ${fmt(bias)}`;
  return `${productsText(a, b)}${shift} = ${fmt(dot(a, b) + (bias ?? 0))}`.replaceAll("+ −", "− ");
}

function projectionTo(letter) {
  return (context, t, head, i) => explainProjection(context.store, { ...context, head }, letter, t, i);
}

function fillScore(context, head, query, key) {
  if (key > query) return "−∞: the key is in the query's future";
  return explainScore(context.store, { ...context, head, query, key });
}

function fillWeight(context, head, query, key) {
  return explainWeight(context.store, { ...context, head, query, key });
}

function fillResult({ store, run, layer }, t, head, c) {
  const [z, result] = ["z", "result"].map((name) => vectorOf(run, layer, head, name, t));
  return explainResult(store, { layer, head, z, result }, c);
}

function fillPost({ store, run, of }, t, n) {
  const name = store.config.activation_function;
  const pre = at(run.get(of("mlp.hook_pre")), t, n);
  return `${name}(${fmt(pre)}) = ${fmt(ACTIVATIONS[name](pre))}`;
}

function fillLogit({ store, run }, t, id) {
  return product(row(run.get("ln_final.hook_out"), t), row(store.model.head, id));
}

/** The vector that a norm reads at a position, its mean and its scale. */
function normed({ store, run, name, of }, t) {
  const { n_layer, layer_norm_epsilon: epsilon } = store.config;
  const ofLayer = () => of(name.includes(".ln1.") ? "hook_resid_pre" : "hook_resid_mid");
  const source = name.startsWith("ln_final") ? `blocks.${n_layer - 1}.hook_resid_post` : ofLayer();
  const x = row(run.get(source), t);
  const mean = x.reduce((sum, value) => sum + value, 0) / x.length;
  const variance = x.reduce((sum, value) => sum + (value - mean) ** 2, 0) / x.length;
  return { x, mean, variance, epsilon, scale: Math.sqrt(variance + epsilon) };
}

function fillScale(context, t) {
  const { mean, variance, epsilon, scale } = normed(context, t);
  return `mean x = ${fmt(mean)}\n√(${fmt(variance)} + ${fmt(epsilon)}) = ${fmt(scale)}`;
}

function fillNormalized(context, t, c) {
  const { x, mean, scale } = normed(context, t);
  return `(${fmt(x[c])} − ${fmt(mean)}) / ${fmt(scale)} = ${fmt((x[c] - mean) / scale)}`.replace("− −", "+ ");
}

function fillNorm({ run, name, layer, weight }, t, c) {
  const norm = name.startsWith("ln_final") ? "ln_f" : `h.${layer}.ln_${name.includes(".ln1.") ? 1 : 2}`;
  const normalized = at(run.get(name.replace("hook_out", "hook_normalized")), t, c);
  const [scale, shift] = ["weight", "bias"].map((kind) => at(weight(`${norm}.${kind}`), c));
  return `${fmt(normalized)} × ${fmt(scale)} + ${fmt(shift)} = ${fmt(normalized * scale + shift)}`.replace("+ −", "− ");
}

function fillZ({ run, of }, t, head, i) {
  const pattern = row(run.get(of("attn.hook_pattern")), head, t).subarray(0, t + 1);
  const v = run.get(of("attn.hook_v"));
  return product(pattern, Float32Array.from(pattern, (_, key) => at(v, key, head, i)));
}
