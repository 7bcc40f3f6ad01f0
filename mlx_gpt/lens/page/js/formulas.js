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
const FORMULAS = {
  hook_embed: {
    axes: ["token", "number"],
    formula: "W_E[id of the token]",
    fill: ({ run, weight }, t, c) => `W_E[${run.ids[t]}, ${c}] = ${fmt(at(weight("wte.weight"), run.ids[t], c))}`,
  },
  hook_pos_embed: {
    axes: ["token", "number"],
    formula: "W_pos[position]",
    fill: ({ weight }, t, c) => `W_pos[${t}, ${c}] = ${fmt(at(weight("wpe.weight"), t, c))}`,
  },
  hook_resid_pre: {
    axes: ["token", "number"],
    formula: "layer 0: hook_embed + hook_pos_embed; later: hook_resid_post of the layer before",
    fill: ({ run, layer }, ...i) => (layer === 0 ? plus(run, ["hook_embed", "hook_pos_embed"], i) : plus(run, [`blocks.${layer - 1}.hook_resid_post`], i)),
  },
  hook_resid_mid: { axes: ["token", "number"], formula: "hook_resid_pre + hook_attn_out", fill: ({ run, of }, ...i) => plus(run, [of("hook_resid_pre"), of("hook_attn_out")], i) },
  hook_resid_post: { axes: ["token", "number"], formula: "hook_resid_mid + hook_mlp_out", fill: ({ run, of }, ...i) => plus(run, [of("hook_resid_mid"), of("hook_mlp_out")], i) },
  hook_scale: { axes: ["token", "number"], formula: "√(mean((x − mean x)²) + ε)", fill: fillScale },
  hook_normalized: { axes: ["token", "number"], formula: "(x − mean x) / scale", fill: fillNormalized },
  hook_out: { axes: ["token", "number"], formula: "normalized × weight + bias", fill: fillNorm },
  hook_q: { axes: ["token", "head", "number"], formula: "LN(x) · W_Q + b_Q", fill: (context, t, head, i) => explainProjection(context.store, { ...context, head }, "q", t, i) },
  hook_k: { axes: ["token", "head", "number"], formula: "LN(x) · W_K + b_K", fill: (context, t, head, i) => explainProjection(context.store, { ...context, head }, "k", t, i) },
  hook_v: { axes: ["token", "head", "number"], formula: "LN(x) · W_V + b_V", fill: (context, t, head, i) => explainProjection(context.store, { ...context, head }, "v", t, i) },
  hook_attn_scores: {
    axes: ["head", "query", "key"],
    formula: "q · k × scale, −∞ for keys of the future",
    fill: (context, head, query, key) => (key > query ? "−∞: the key is in the query's future" : explainScore(context.store, { ...context, head, query, key })),
  },
  hook_pattern: { axes: ["head", "query", "key"], formula: "softmax of the scores", fill: (context, head, query, key) => explainWeight(context.store, { ...context, head, query, key }) },
  hook_z: { axes: ["token", "head", "number"], formula: "Σ over keys: pattern × v", fill: fillZ },
  hook_result: {
    axes: ["token", "head", "number"],
    formula: "z · W_O of the head",
    fill: ({ store, run, layer }, t, head, c) => explainResult(store, { layer, head, z: vectorOf(run, layer, head, "z", t), result: vectorOf(run, layer, head, "result", t) }, c),
  },
  hook_attn_out: {
    axes: ["token", "number"],
    formula: "z of all heads · W_O + b_O",
    fill: ({ run, layer, of, weight }, t, c) => product(row(run.get(of("attn.hook_z")), t), row(weight(`h.${layer}.attn.c_proj.weight`), c), at(weight(`h.${layer}.attn.c_proj.bias`), c)),
  },
  hook_pre: {
    axes: ["token", "neuron"],
    formula: "LN(x) · W_in + b_in",
    fill: ({ run, layer, of, weight }, t, n) => product(row(run.get(of("ln2.hook_out")), t), row(weight(`h.${layer}.mlp.c_fc.weight`), n), at(weight(`h.${layer}.mlp.c_fc.bias`), n)),
  },
  hook_post: {
    axes: ["token", "neuron"],
    formula: "activation function of hook_pre",
    fill: ({ store, run, of }, t, n) => {
      const name = store.config.activation_function;
      const pre = at(run.get(of("mlp.hook_pre")), t, n);
      return `${name}(${fmt(pre)}) = ${fmt(ACTIVATIONS[name](pre))}`;
    },
  },
  hook_mlp_out: {
    axes: ["token", "number"],
    formula: "hook_post · W_out + b_out",
    fill: ({ run, layer, of, weight }, t, c) => product(row(run.get(of("mlp.hook_post")), t), row(weight(`h.${layer}.mlp.c_proj.weight`), c), at(weight(`h.${layer}.mlp.c_proj.bias`), c)),
  },
  hook_unembed: {
    axes: ["token", "next token"],
    formula: "LN_f(x) · W_U",
    fill: ({ store, run }, t, id) => product(row(run.get("ln_final.hook_out"), t), row(store.model.head, id)),
  },
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
  const context = { store, run, layer, name, of: (part) => `blocks.${layer}.${part}`, weight: (weight) => store.model.weight(weight) };
  const found = fill(context, ...index);
  const edited = store.edited ? "An edit of this page may have replaced what the formula gives." : null;
  return typeof found === "string" ? { formula, filled: found, note: edited } : found;
}

function plus(run, names, index) {
  const values = names.map((name) => at(run.get(name), ...index));
  const sum = values.reduce((a, b) => a + b);
  return `${values.map(fmt).join(" + ").replaceAll("+ −", "− ")}${values.length > 1 ? ` = ${fmt(sum)}` : ""}`;
}

function product(a, b, bias = null) {
  return `${productsText(a, b)}${bias === null ? "" : ` + ${fmt(bias)}`} = ${fmt(dot(a, b) + (bias ?? 0))}`.replaceAll("+ −", "− ");
}

/** The vector that a norm reads at a position, its mean and its scale. */
function normed({ store, run, name, of }, t) {
  const { n_layer, layer_norm_epsilon: epsilon } = store.config;
  const source = name.startsWith("ln_final") ? `blocks.${n_layer - 1}.hook_resid_post` : of(name.includes(".ln1.") ? "hook_resid_pre" : "hook_resid_mid");
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
