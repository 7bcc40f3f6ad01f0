// The residual stream of one token: its parts with their sizes, the vector between them, and the logit that they sum to.

import { dot, norm, row } from "./tensor.js";

/**
 * Read the stream at a position: {parts, stages, bias, sum, logit}.
 *
 * parts: [{label, kind, layer, name, heads, value, norm, cosine, share, vector}], in the order of computation. value is
 * what a part adds to the logit of ``target``, minus that of ``versus`` if it is not null; cosine is with the stream
 * before it; share is its projection on the last vector, and all shares sum to 1. stages: [{norm, value, vector}] at the
 * start and after each layer, value being the sum so far. What was not recorded is null.
 */
export function readStream(run, config, position, target, versus = null) {
  const { values, bias, logit } = logitValues(run, config, position, target, versus);
  const read = (name) => ({ norm: run.norms(name)[position], vector: vectorAt(run, name, position) });
  const stages = streamNames(config).map(read);
  const last = stages.at(-1).vector;
  const parts = partNames(config).map(({ name, before, ...part }) => {
    const here = { ...part, name, ...read(name), value: valueOf(part, values), heads: headsOf(part, values) };
    return { ...here, ...measures(run, here.vector, before, last, position) };
  });
  addPatch(run, parts, { bias, logit }, position, last);
  stages.forEach((stage, i) => {
    stage.value = parts.filter(({ layer }) => layer < i).reduce((sum, part) => sum + part.value, 0);
  });
  return { parts, stages, bias, sum: stages.at(-1).value + bias, logit };
}

/** The vector of an activation at a position (and head), as a view; null where it was not recorded. */
export function vectorAt(run, name, ...index) {
  const tensor = run.get(name);
  return tensor && row(tensor, ...index);
}

/** Names of the stream before each layer and after the last: n_layer + 1 of them. */
export function streamNames({ n_layer }) {
  const inputs = Array.from({ length: n_layer }, (_, layer) => `blocks.${layer}.hook_resid_pre`);
  return [...inputs, `blocks.${n_layer - 1}.hook_resid_post`];
}

/** Parts that are added to the stream. Labels are those of attribution.py; the embeddings are of layer -1. */
function partNames({ n_layer }) {
  const start = { layer: -1, kind: "embed", before: null };
  const names = [
    { ...start, label: "embed", name: "hook_embed" },
    { ...start, label: "pos_embed", name: "hook_pos_embed" },
  ];
  for (let layer = 0; layer < n_layer; layer++) {
    const hook = (name) => `blocks.${layer}.hook_${name}`;
    const [attn, mlp] = [{ kind: "attn", before: hook("resid_pre") }, { kind: "mlp", before: hook("resid_mid") }];
    names.push({ ...attn, label: `${layer}_attn_out`, layer, name: hook("attn_out") });
    names.push({ ...mlp, label: `${layer}_mlp_out`, layer, name: hook("mlp_out") });
  }
  return names;
}

/** What each label adds to the logit or the difference, a Map; its bias; and the logit of the model. */
function logitValues(run, config, position, target, versus) {
  const values = new Map(run.attribution(position, target).map(({ label, value }) => [label, value]));
  let logit = run.logit(position, target);
  if (versus !== null) {
    for (const { label, value } of run.attribution(position, versus)) values.set(label, values.get(label) - value);
    logit -= run.logit(position, versus);
  }
  return { values, bias: values.get("ln_final_bias"), logit };
}

function valueOf({ kind, label, layer }, values) {
  if (kind !== "attn") return values.get(label);
  return [...values].reduce((sum, [name, value]) => (isHeadOf(name, layer) ? sum + value : sum), 0);
}

/** The heads of an attention and its output bias: [{label, kind, layer, head, value}]. */
function headsOf({ kind, layer }, values) {
  if (kind !== "attn") return [];
  return [...values].filter(([label]) => isHeadOf(label, layer)).map(([label, value]) => ({
    label, layer, value, kind: "head", head: label.startsWith("L") ? Number(label.split("H")[1]) : null,
  }));
}

function isHeadOf(label, layer) {
  return label.startsWith(`L${layer}H`) || label === `${layer}_attn_bias`;
}

/** The cosine of a vector with the stream before it, and its share of the last vector. */
export function measures(run, vector, before, last, position) {
  if (!vector || !last) return { cosine: null, share: null };
  const stream = before && vectorAt(run, before, position);
  return { cosine: stream && cosine(vector, stream), share: dot(vector, last) / dot(last, last) };
}

/** The cosine of the angle between two vectors; 0 if one has no length. */
function cosine(a, b) {
  const product = norm(a) * norm(b);
  return product === 0 ? 0 : dot(a, b) / product;
}

/** If a patch replaced the stream at this position, make the change a part, so that the parts still sum to the logit. */
function addPatch(run, parts, { bias, logit }, position, last) {
  const { patch } = run.edits ?? {};
  if (!patch || patch.position !== position) return;
  const layer = Number(patch.name.split(".")[1]);
  const i = parts.findIndex((part) => part.layer === layer);
  const vector = patch.value.map((value, c) => parts.slice(0, i).reduce((rest, part) => rest - part.vector[c], value));
  const value = parts.reduce((rest, part) => rest - part.value, logit - bias);
  const part = { label: `${layer}_patch`, kind: "patch", layer, name: patch.name, vector, value, norm: norm(vector), heads: [] };
  parts.splice(i, 0, { ...part, ...measures(run, vector, null, last) });
}
