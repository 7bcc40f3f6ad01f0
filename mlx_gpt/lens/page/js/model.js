// The forward pass of GPT-2 with every step named, as in lens/trace.py, line by line, for one text at a time.
//
// Axis letters: T tokens, S tokens so far, C width of the residual stream, H heads, D width of a head, V vocabulary.
// A linear layer's weight is (out, in). Activations have their names in TransformerLens, without the axis of a batch.

import { ACTIVATIONS } from "./activations.js";
import { logitAttribution, logitLens, topTokens } from "./readings.js";
import { Tensor, add, linear, multiply, norm, normalize, row, rows, sizeOf, softmax, takeRows } from "./tensor.js";

const SLICE_MS = 12; // after which the page may react to input
const SLICE_PRODUCTS = 4e6; // of a layer or the head, at most in one go
const FLOATS_KEPT = 3e7; // of finished runs

/** Raised by a call of `trace` or `generate` that a newer one on the same lane has made useless. */
export class Superseded extends Error {
  name = "Superseded";
}

/**
 * A GPT-2. `config` has the fields of GPTConfig, `tensors` the weights by the hub's names.
 *
 * Edits are `{heads: {"3.1": factor}, mlps: {"2": factor}, patch: null | {name, position, value}}`. A head's z or an
 * MLP's output is multiplied by its factor, 0 removes it; a patch then replaces a position of an activation by a vector.
 */
export class Model {
  constructor(config, tensors) {
    this.config = config;
    this.tensors = tensors;
    this.canCompute = true;
    this.calls = new Map(); // the newest call of each lane
    this.recent = []; // finished runs, the newest first
    this.paused = 0; // when the page could react last
    const { n_embd, inner_dim, vocab_size } = config;
    const ofBlock = 4 * n_embd * n_embd + 2 * n_embd * inner_dim;
    this.rowsAtOnce = Math.ceil(SLICE_PRODUCTS / Math.max(ofBlock, n_embd * vocab_size));
  }

  /** Return a weight by its hub name. */
  weight(name) {
    return this.tensors.get(name);
  }

  /** The matrix of the head, (V, C): the direction in which each token's logit is read. */
  get head() {
    return this.weight(this.config.tie_word_embeddings ? "wte.weight" : "lm_head.weight");
  }

  /**
   * Return the run of a text, a list of ids. What it shares with the beginning of an earlier run is not computed again.
   *
   * It pauses often, so that the page stays responsive, and calls `onSlice(share done)`. A newer call on the same `lane`
   * makes it reject with Superseded. Rejects with an Error for a text that is empty or longer than the context.
   */
  async trace(ids, { edits = {}, onSlice = () => {}, lane = "text" } = {}) {
    const call = {};
    this.calls.set(lane, call);
    this.checkLength(ids.length);
    const run = new Run(this, ids, edits);
    const same = this.recent.find((other) => other.key === run.key && String(other.ids) === String(ids));
    if (same) return same;
    let start = run.copyShared(this.recent);
    const pause = async () => {
      if (performance.now() - this.paused > SLICE_MS) {
        onSlice(start / ids.length);
        await nextTask();
        this.paused = performance.now();
      }
      if (this.calls.get(lane) !== call) throw new Superseded("a newer text is computed");
    };
    for (; start < ids.length; start += this.rowsAtOnce) {
      await this.forward(run, start, Math.min(start + this.rowsAtOnce, ids.length), pause);
    }
    this.recent = [run, ...this.recent].filter((_, i, runs) => i === 0 || sizeOfRuns(runs.slice(0, i + 1)) < FLOATS_KEPT);
    return run;
  }

  /**
   * Continue a text by up to n ids: `pick(logits, run)` returns the next one, or null to stop. Returns the new ids.
   *
   * `onToken(id, run)` is called after each one with the run that it was picked from, and awaited. Ends where the context is full.
   */
  async generate(ids, n, pick, edits = {}, onToken = () => {}, lane = "generate") {
    const all = [...ids];
    while (all.length < ids.length + n && all.length <= this.config.n_positions) {
      const run = await this.trace(all, { edits, lane });
      const id = pick(row(run.logits, all.length - 1), run);
      if (id === null) break;
      all.push(id);
      await onToken(id, run);
    }
    return all.slice(ids.length);
  }

  checkLength(T) {
    if (T === 0) throw new Error("the text is empty; give at least one token");
    const context = this.config.n_positions;
    if (T > context) throw new Error(`the text is ${T} tokens long and the model's context is ${context}; shorten it`);
  }

  /** Compute the rows of a run from `start` to `end`; those before are there already. */
  async forward(run, start, end, pause) {
    const hook = (name, x) => run.hook(name, x, start);
    const ids = run.ids.slice(start, end);
    const positions = ids.map((_, i) => start + i);

    // A token starts as the sum of two vectors: what it is, and where it is.
    const embed = hook("hook_embed", takeRows(this.weight("wte.weight"), ids)); // (T, C)
    const posEmbed = hook("hook_pos_embed", takeRows(this.weight("wpe.weight"), positions)); // (T, C)

    // The residual stream: every layer reads from it and adds to it.
    let x = add(embed, posEmbed); // (T, C)
    for (let layer = 0; layer < this.config.n_layer; layer++) {
      const name = `blocks.${layer}`;
      x = hook(`${name}.hook_resid_pre`, x);
      const attnOut = this.attention(layer, this.layerNorm(`h.${layer}.ln_1`, `${name}.ln1`, x, hook), run, hook, start);
      x = hook(`${name}.hook_resid_mid`, add(x, hook(`${name}.hook_attn_out`, attnOut)));
      await pause();
      const mlpOut = this.mlp(layer, this.layerNorm(`h.${layer}.ln_2`, `${name}.ln2`, x, hook), hook);
      x = hook(`${name}.hook_resid_post`, add(x, hook(`${name}.hook_mlp_out`, mlpOut)));
      await pause();
    }

    // A logit is the dot product of the last vector with a token's direction in the head.
    hook("hook_unembed", linear(this.layerNorm("ln_f", "ln_final", x, hook), this.head)); // (T, V)
    await pause();
  }

  /** Center each token's vector and divide it by its spread, so that parts read directions: (T, C) -> (T, C). */
  layerNorm(weights, name, x, hook) {
    const { scale, normalized } = normalize(x, this.config.layer_norm_epsilon);
    hook(`${name}.hook_scale`, scale); // (T, 1)
    return this.scaleNorm(weights, hook(`${name}.hook_normalized`, normalized)); // (T, C)
  }

  /** Apply the learned weight and bias of a norm: (T, C) -> (T, C). */
  scaleNorm(weights, normalized) {
    const weight = this.weight(`${weights}.weight`).data;
    const bias = this.weight(`${weights}.bias`).data;
    const [T, C] = normalized.shape;
    const out = new Tensor([T, C]);
    for (let i = 0; i < T * C; i++) out.data[i] = normalized.data[i] * weight[i % C] + bias[i % C];
    return out;
  }

  /** Move information between tokens; the only part that does: (T, C) -> (T, C). */
  attention(layer, x, run, hook, start) {
    const name = `blocks.${layer}.attn`;
    const [T, C] = x.shape;
    const H = this.config.n_head;
    const [q, k, v] = ["q", "k", "v"].map((letter, part) => {
      const weight = rowsOf(this.weight(`h.${layer}.attn.c_attn.weight`), part * C, C);
      const bias = rowsOf(this.weight(`h.${layer}.attn.c_attn.bias`), part * C, C);
      hook(`${name}.hook_${letter}`, new Tensor([T, H, C / H], linear(x, weight, bias).data));
      return rowsOf(run.get(`${name}.hook_${letter}`), 0, start + T); // queries ask, keys answer, values move (S, H, D)
    });

    // The score is how well a key answers a query. A key of the future gets -Infinity: its weight will be zero.
    const scores = hook(`${name}.hook_attn_scores`, attentionScores(q, k, this.scoreScale(layer), start)); // (H, T, S)

    // The pattern weighs: each query shares one unit of attention among the keys.
    const pattern = hook(`${name}.hook_pattern`, attentionPattern(scores, start)); // (H, T, S), rows sum to 1

    // Values move: a token receives the average of the values, weighted by its row of the pattern.
    const z = hook(`${name}.hook_z`, weightedValues(pattern, v)); // (T, H, D)

    // Each head adds its own vector to the stream; their sum is one product.
    const merged = new Tensor([T, C], z.data);
    return linear(merged, this.weight(`h.${layer}.attn.c_proj.weight`), this.weight(`h.${layer}.attn.c_proj.bias`));
  }

  /** Return what the scores of a layer are multiplied by. */
  scoreScale(layer) {
    const { n_embd, n_head, scale_attn_weights, scale_attn_by_inverse_layer_idx } = this.config;
    return (scale_attn_weights ? 1 / Math.sqrt(n_embd / n_head) : 1) / (scale_attn_by_inverse_layer_idx ? layer + 1 : 1);
  }

  /** Apply the same neurons to each token by itself: (T, C) -> (T, C). */
  mlp(layer, x, hook) {
    const of = (name) => this.weight(`h.${layer}.mlp.${name}`);
    const activation = ACTIVATIONS[this.config.activation_function];
    // How far each neuron's direction is in the vector                                          (T, inner)
    const pre = hook(`blocks.${layer}.mlp.hook_pre`, linear(x, of("c_fc.weight"), of("c_fc.bias")));
    // Those below zero are nearly switched off                                                  (T, inner)
    const post = hook(`blocks.${layer}.mlp.hook_post`, new Tensor(pre.shape, pre.data.map((value) => activation(value))));
    return linear(post, of("c_proj.weight"), of("c_proj.bias")); // each neuron adds its output vector, times that
  }

  /** Return what each head of a layer adds to the residual stream: z (T, H, D) -> (T, H, C). */
  headResults(layer, z) {
    const weight = this.weight(`h.${layer}.attn.c_proj.weight`); // (C, H D)
    const [T, H, D] = z.shape;
    const C = H * D;
    const result = new Tensor([T, H, C]);
    for (let t = 0; t < T; t++) {
      for (let head = 0; head < H; head++) {
        const i = t * H + head;
        multiply(rows(z.data, i * D, D, 1), rows(weight.data, head * D, C, C), D, rows(result.data, i * C, C, 1));
      }
    }
    return result;
  }
}

/** The activations of a text: `ids`, `edits`, `logits` (T, V), and any activation by its name. */
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
    const norm = { "ln1.hook_out": `h.${layer}.ln_1`, "ln2.hook_out": `h.${layer}.ln_2`, "ln_final.hook_out": "ln_f" }[part];
    if (!norm) throw new Error(`no activation is named ${name}`);
    return this.model.scaleNorm(norm, this.get(name.replace("hook_out", "hook_normalized")));
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
  return { ...shapes, "ln_final.hook_scale": [T, 1], "ln_final.hook_normalized": [T, C], hook_unembed: [T, vocab_size] };
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

/** Return how many numbers some runs hold. */
function sizeOfRuns(runs) {
  return runs.reduce((sum, run) => sum + Object.values(run.shapes).reduce((total, shape) => total + sizeOf(shape), 0), 0);
}

/** Return whether an activation has the axes (H, T, S) instead of (T, ...). */
function isAttentionMap(name) {
  return name.endsWith("hook_attn_scores") || name.endsWith("hook_pattern");
}

/** Return the dot products of queries and earlier keys, times scale: T queries from (S, H, D), (S, H, D) -> (H, T, S). */
function attentionScores(q, k, scale, start) {
  const [S, H, D] = k.shape;
  const T = S - start;
  const scores = new Tensor([H, T, S]);
  for (let head = 0; head < H; head++) {
    const queries = rows(q.data, start * H * D + head * D, H * D, T);
    const keys = rows(k.data, head * D, H * D, S);
    multiply(queries, keys, D, rows(scores.data, head * T * S, S, T));
  }
  for (let i = 0; i < H * T; i++) {
    const future = start + (i % T) + 1;
    for (let key = 0; key < S; key++) scores.data[i * S + key] *= scale;
    scores.data.fill(-Infinity, i * S + future, (i + 1) * S);
  }
  return scores;
}

/** Return the softmax over the keys that are not in the future: (H, T, S) -> (H, T, S). */
function attentionPattern(scores, start) {
  const [H, T, S] = scores.shape;
  const pattern = new Tensor([H, T, S]);
  for (let i = 0; i < H * T; i++) {
    const future = start + (i % T) + 1;
    pattern.data.set(softmax(scores.data.subarray(i * S, i * S + future)), i * S);
  }
  return pattern;
}

/** Return the average of the values, weighted by the pattern: (H, T, S), (S, H, D) -> (T, H, D). */
function weightedValues(pattern, v) {
  const [H, T, S] = pattern.shape;
  const D = v.shape[2];
  const z = new Tensor([T, H, D]);
  const columns = new Float32Array(D * S); // a head's values, (D, S)
  for (let head = 0; head < H; head++) {
    for (let key = 0; key < S; key++) {
      for (let d = 0; d < D; d++) columns[d * S + key] = v.data[(key * H + head) * D + d];
    }
    multiply(rows(pattern.data, head * T * S, S, T), rows(columns, 0, S, D), S, rows(z.data, head * D, H * D, T));
  }
  return z;
}

/** Return n rows of a matrix, or n numbers of a vector, from one on, as a view. */
function rowsOf(tensor, start, n) {
  const size = sizeOf(tensor.shape.slice(1));
  return new Tensor([n, ...tensor.shape.slice(1)], tensor.data.subarray(start * size, (start + n) * size));
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

/** Let the page react to input. */
function nextTask() {
  return globalThis.scheduler?.yield ? globalThis.scheduler.yield() : new Promise((resolve) => setTimeout(resolve));
}
