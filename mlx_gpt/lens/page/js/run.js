// What a model computes of a text: every activation by its name in TransformerLens, with edits, and readings of them.

import { logitAttribution, logitLens, topTokens } from "./readings.js";
import { Tensor, norm, row, sizeOf } from "./tensor.js";

/**
 * The activations of a text: `ids`, `edits`, `logits` (T, V), and any activation by its name.
 *
 * Edits are `{heads: {"3.1": factor}, mlps: {"2": factor}, patch: null | {name, position, value}}`. A head's z or an
 * MLP's output is multiplied by its factor, 0 removes it; a patch then sets a position of an activation to a vector.
 */
export class Run {
  constructor(model, ids, edits) {
    this.model = model;
    this.ids = [...ids];
    this.edits = edits;
    this.key = editsKey(edits);
    this.shapes = shapesOf(model.config, ids.length);
    this.names = Object.keys(this.shapes).filter((name) => name !== "hook_unembed"); // in the order of computation
    this.activations = new Map();
  }

  /** How many numbers it holds. */
  get size() {
    return Object.values(this.shapes).reduce((sum, shape) => sum + sizeOf(shape), 0);
  }

  /** The logits of the token after each token: (T, V). */
  get logits() {
    return this.activations.get("hook_unembed");
  }

  /** Return an activation. Some are computed only here: each head's result, and what norms give to the parts. */
  get(name) {
    if (!this.activations.has(name)) this.activations.set(name, this.compute(name));
    return this.activations.get(name);
  }

  compute(name) {
    const [, layer, part] = name.match(/^blocks\.(\d+)\.(.*)$/) ?? [null, null, name];
    if (part === "attn.hook_result") return this.model.headResults(layer, this.get(`blocks.${layer}.attn.hook_z`));
    if (/^attn\.[qkv]\.hook_in$/.test(part)) return this.get(`blocks.${layer}.ln1.hook_out`);
    const norms = { "ln1.hook_out": `h.${layer}.ln_1`, "ln2.hook_out": `h.${layer}.ln_2`, "ln_final.hook_out": "ln_f" };
    if (!norms[part]) throw new Error(`no activation is named ${name}`);
    return this.model.scaleNorm(norms[part], this.get(name.replace("hook_out", "hook_normalized")));
  }

  /** Return the k most probable tokens after a position: [{id, logit, probability}]. */
  next(position, k) {
    return topTokens(row(this.logits, position), k);
  }

  /** Return the logit of an id after a position. */
  logit(position, id) {
    return row(this.logits, position)[id];
  }

  /** Return the k most probable tokens after a position at each layer's input and after the last layer. */
  logitLens(position, k) {
    const logits = logitLens(this, position);
    return Array.from({ length: logits.shape[0] }, (_, layer) => topTokens(row(logits, layer), k));
  }

  /** Return what each part of the model adds to the logit of an id after a position: [{label, value}]. */
  attribution(position, id) {
    return logitAttribution(this, position, id);
  }

  /** Return the norms of an activation's vectors: of (T, C) a list of T, of (T, H, C) or (T, H, D) of T H. */
  norms(name) {
    const { shape, data } = this.get(name);
    const C = shape.at(-1);
    return Float32Array.from({ length: data.length / C }, (_, i) => norm(data.subarray(i * C, (i + 1) * C)));
  }

  /** Edit some rows of an activation, those from `start` on, store them, and return what the model goes on with. */
  hook(name, x, start) {
    const edited = this.edit(name, x, start);
    if (x.data.length === sizeOf(this.shapes[name])) { // the whole text
      this.activations.set(name, edited);
      return edited;
    }
    copyTokens(edited, this.stored(name), name, start, x.shape[isAttentionMap(name) ? 1 : 0]);
    return edited;
  }

  /** Return the tensor of an activation, to write rows to. */
  stored(name) {
    if (!this.activations.has(name)) {
      const tensor = new Tensor(this.shapes[name]);
      if (name.endsWith("hook_attn_scores")) tensor.data.fill(-Infinity); // keys of the future
      this.activations.set(name, tensor);
    }
    return this.activations.get(name);
  }

  edit(name, x, start) {
    const { heads = {}, mlps = {}, patch = null } = this.edits;
    const [, layer, part] = name.match(/^blocks\.(\d+)\.(.*)$/) ?? [];
    if (part === "attn.hook_z") {
      const [T, H] = x.shape;
      for (let i = 0; i < T * H; i++) {
        const factor = heads[`${layer}.${i % H}`] ?? 1;
        if (factor !== 1) row(x, Math.floor(i / H), i % H).forEach((value, d, z) => { z[d] = value * factor; });
      }
    }
    const factor = part === "hook_mlp_out" ? mlps[layer] ?? 1 : 1;
    if (factor !== 1) x.data.forEach((value, i) => { x.data[i] = value * factor; });
    if (patch && patch.name === name && patch.position >= start && patch.position < start + x.shape[0]) {
      const patched = new Tensor(x.shape, x.data.slice()); // x is also the output of the layer before
      row(patched, patch.position - start).set(patch.value);
      return patched;
    }
    return x;
  }

  /** Return how many first tokens have the activations of another run: those before another token or patch. */
  sharedWith(other) {
    if (factorsKey(other.edits) !== factorsKey(this.edits)) return 0;
    const patches = other.key === this.key ? [] : [other, this].map(({ edits }) => edits.patch?.position ?? Infinity);
    return Math.min(sharedLength(other.ids, this.ids), ...patches);
  }

  /** Copy the rows that the longest shared beginning of some runs has; return its length. */
  copyShared(runs) {
    const lengths = runs.map((other) => this.sharedWith(other));
    const n = Math.max(0, ...lengths);
    if (n === 0) return 0;
    const other = runs[lengths.indexOf(n)];
    for (const name of Object.keys(this.shapes)) {
      copyTokens(other.get(name), this.stored(name), name, 0, n);
    }
    return n;
  }
}

/** Return the shapes of the stored activations of T tokens, in the order of computation (lens/names.py). */
function shapesOf(config, T) {
  const { n_layer, n_head: H, n_embd: C, inner_dim, vocab_size } = config;
  const shapes = { hook_embed: [T, C], hook_pos_embed: [T, C] };
  const block = {
    hook_resid_pre: [T, C],
    "ln1.hook_scale": [T, 1],
    "ln1.hook_normalized": [T, C],
    "attn.hook_q": [T, H, C / H],
    "attn.hook_k": [T, H, C / H],
    "attn.hook_v": [T, H, C / H],
    "attn.hook_attn_scores": [H, T, T],
    "attn.hook_pattern": [H, T, T],
    "attn.hook_z": [T, H, C / H],
    hook_attn_out: [T, C],
    hook_resid_mid: [T, C],
    "ln2.hook_scale": [T, 1],
    "ln2.hook_normalized": [T, C],
    "mlp.hook_pre": [T, inner_dim],
    "mlp.hook_post": [T, inner_dim],
    hook_mlp_out: [T, C],
    hook_resid_post: [T, C],
  };
  for (let layer = 0; layer < n_layer; layer++) {
    for (const [name, shape] of Object.entries(block)) shapes[`blocks.${layer}.${name}`] = shape;
  }
  Object.assign(shapes, { "ln_final.hook_scale": [T, 1], "ln_final.hook_normalized": [T, C] });
  return { ...shapes, hook_unembed: [T, vocab_size] };
}

/** Copy the first n tokens of an activation to those from `start` on of a longer or shorter text. */
function copyTokens(from, to, name, start, n) {
  if (!isAttentionMap(name)) {
    const size = sizeOf(to.shape.slice(1));
    to.data.set(from.data.subarray(0, n * size), start * size);
    return;
  }
  const [H, T, S] = to.shape;
  const [, ofHead, ofQuery] = from.shape;
  const keys = Math.min(S, ofQuery); // those of the future are masked
  for (let head = 0; head < H; head++) {
    for (let i = 0; i < n; i++) {
      const begin = (head * ofHead + i) * ofQuery;
      to.data.set(from.data.subarray(begin, begin + keys), (head * T + start + i) * S);
    }
  }
}

/** Return whether an activation has the axes (H, T, S) instead of (T, ...). */
function isAttentionMap(name) {
  return name.endsWith("hook_attn_scores") || name.endsWith("hook_pattern");
}

/** Return a text that is equal for equal factors of heads and MLPs. */
function factorsKey({ heads = {}, mlps = {} }) {
  const changed = [heads, mlps].map((factors) => Object.entries(factors).filter(([, factor]) => factor !== 1).sort());
  return JSON.stringify(changed);
}

/** Return a text that is equal for equal edits. */
function editsKey({ patch = null, ...factors }) {
  return factorsKey(factors) + JSON.stringify(patch && [patch.name, patch.position, [...patch.value]]);
}

/** Return the length of the common beginning of two lists. */
function sharedLength(a, b) {
  let n = 0;
  while (n < a.length && n < b.length && a[n] === b[n]) n++;
  return n;
}
