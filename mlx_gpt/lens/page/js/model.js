// The forward pass of GPT-2 with every step named, as in lens/trace.py, line by line, for one text at a time.
//
// Axis letters: T tokens, S tokens so far, C width of the residual stream, H heads, D width of a head, V vocabulary.
// A linear layer's weight is (out, in). Activations have their names in TransformerLens, without the axis of a batch.

import { ACTIVATIONS } from "./activations.js";
import { attentionPattern, attentionScores, weightedValues } from "./attend.js";
import { Run } from "./run.js";
import { Tensor, add, linear, multiply, normalize, row, rows, rowsOf, takeRows } from "./tensor.js";

const SLICE_MS = 12; // after which the page may react to input
const SLICE_PRODUCTS = 4e6; // of a layer or the head, at most in one go
const FLOATS_KEPT = 3e7; // of finished runs

/** Raised by a call of `trace` or `generate` that a newer one on the same lane has made useless. */
export class Superseded extends Error {
  name = "Superseded";
}

/** A GPT-2. `config` has the fields of GPTConfig, `tensors` the weights by the hub's names. */
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
   * It pauses often, so that the page stays responsive, and calls `onSlice(share done)`. A newer call on the same
   * `lane` makes it reject with Superseded. Rejects with an Error for a text that is empty or longer than the context.
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
    this.keep(run);
    return run;
  }

  /** Keep a finished run, and earlier ones while they are not too large. */
  keep(run) {
    let size = 0;
    this.recent = [run, ...this.recent].filter((kept) => (size += kept.size) < FLOATS_KEPT || kept === run);
  }

  /**
   * Continue a text by up to n ids: `pick(logits, run)` returns the next one, or null to stop. Returns the new ids.
   *
   * `onToken(id, run)` is called after each one with the run that it was picked from, and awaited. Ends where the
   * context is full.
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
      let normalized = this.layerNorm(`h.${layer}.ln_1`, `${name}.ln1`, x, hook);
      const attnOut = this.attention(layer, normalized, run, hook, start);
      x = hook(`${name}.hook_resid_mid`, add(x, hook(`${name}.hook_attn_out`, attnOut)));
      await pause();
      normalized = this.layerNorm(`h.${layer}.ln_2`, `${name}.ln2`, x, hook);
      const mlpOut = this.mlp(layer, normalized, hook);
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
    const scale = scale_attn_weights ? 1 / Math.sqrt(n_embd / n_head) : 1;
    return scale_attn_by_inverse_layer_idx ? scale / (layer + 1) : scale;
  }

  /** Apply the same neurons to each token by itself: (T, C) -> (T, C). */
  mlp(layer, x, hook) {
    const of = (name) => this.weight(`h.${layer}.mlp.${name}`);
    const activation = ACTIVATIONS[this.config.activation_function];
    // How far each neuron's direction is in the vector                                          (T, inner)
    const pre = hook(`blocks.${layer}.mlp.hook_pre`, linear(x, of("c_fc.weight"), of("c_fc.bias")));
    // Those below zero are nearly switched off                                                  (T, inner)
    const activated = new Tensor(pre.shape, pre.data.map((value) => activation(value)));
    const post = hook(`blocks.${layer}.mlp.hook_post`, activated);
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

/** Let the page react to input. */
function nextTask() {
  return globalThis.scheduler?.yield ? globalThis.scheduler.yield() : new Promise((resolve) => setTimeout(resolve));
}
