// Readings of a run at one position (lens/attribution.py): the logits at every layer, what each part adds to a logit.

import { Tensor, dot, linear, normalize, row, softmax, takeRows } from "./tensor.js";

/** Return the k most probable ids of logits (V), the most probable first: [{id, logit, probability}]. */
export function topTokens(logits, k) {
  const probabilities = softmax(logits);
  const top = [];
  for (let id = 0; id < logits.length; id++) {
    if (top.length === k && logits[id] <= logits[top[k - 1]]) continue;
    let i = top.length;
    while (i > 0 && logits[top[i - 1]] < logits[id]) i--;
    top.splice(i, 0, id);
    if (top.length > k) top.pop();
  }
  return top.map((id) => ({ id, logit: logits[id], probability: probabilities[id] }));
}

/** Return the logits that each layer's input and the last layer's output would give at a position: (n_layer + 1, V). */
export function logitLens(run, position) {
  const { model } = run;
  const { n_layer: L, n_embd: C } = model.config;
  const streams = new Tensor([L + 1, C]);
  for (let layer = 0; layer <= L; layer++) {
    const name = layer < L ? `blocks.${layer}.hook_resid_pre` : `blocks.${L - 1}.hook_resid_post`;
    row(streams, layer).set(row(run.get(name), position));
  }
  const { normalized } = normalize(streams, model.config.layer_norm_epsilon);
  return linear(model.scaleNorm("ln_f", normalized), model.head);
}

/**
 * Return the parts whose sum is the residual stream at a position after the last layer: [{label, vector (C)}].
 *
 * Labels: embed, pos_embed, and for each layer L0H0, L0H1, ..., 0_attn_bias, 0_mlp_out.
 */
export function decomposeResid(run, position) {
  const { model } = run;
  const parts = ["embed", "pos_embed"].map((label) => ({ label, vector: row(run.get(`hook_${label}`), position) }));
  for (let layer = 0; layer < model.config.n_layer; layer++) {
    const z = takeRows(run.get(`blocks.${layer}.attn.hook_z`), [position]);
    const results = model.headResults(layer, z); // (1, H, C)
    for (let head = 0; head < model.config.n_head; head++) {
      parts.push({ label: `L${layer}H${head}`, vector: row(results, 0, head) });
    }
    parts.push({ label: `${layer}_attn_bias`, vector: model.weight(`h.${layer}.attn.c_proj.bias`).data });
    parts.push({ label: `${layer}_mlp_out`, vector: row(run.get(`blocks.${layer}.hook_mlp_out`), position) });
  }
  return parts;
}

/**
 * Return what each part adds to the logit of an id at a position: [{label, value}], the values' sum is the logit.
 *
 * The final norm is taken as the linear map that it is at the scale of this text. Labels are those of decomposeResid,
 * and ln_final_bias. Where an edit replaced a residual stream, the values sum to another number.
 */
export function logitAttribution(run, position, id) {
  const { model } = run;
  const direction = row(model.head, id);
  const weight = model.weight("ln_f.weight").data;
  const scale = run.get("ln_final.hook_scale").data[position];
  const weighted = direction.map((value, c) => value * weight[c]);
  const mean = weighted.reduce((sum, value) => sum + value, 0) / weighted.length;
  const centered = weighted.map((value) => value - mean); // the norm removes each part's mean
  const parts = decomposeResid(run, position);
  const values = parts.map(({ label, vector }) => ({ label, value: dot(vector, centered) / scale }));
  return [...values, { label: "ln_final_bias", value: dot(direction, model.weight("ln_f.bias").data) }];
}
