// A model that cannot compute: it has what was traced of some texts (recorded.py), in the form of model.js.

import { readTensors } from "./blob.js";
import { Tensor, row, softmax } from "./tensor.js";

/** Raised for a text that was not recorded. */
export class NotRecorded extends Error {
  name = "NotRecorded";
}

export class RecordedModel {
  constructor(config, recordings) {
    Object.assign(this, { config, recordings, canCompute: false });
    this.runs = new Map(); // by recording
  }

  /** Return the ids of a recorded text, none for an empty one. */
  idsOf(text) {
    if (text === "") return [];
    const found = this.recordings.find((recording) => recording.text === text);
    if (!found) throw new NotRecorded("This text was not recorded; choose one of the list.");
    return found.ids;
  }

  /** Return the run of a recorded text. */
  async trace(ids) {
    const found = this.recordings.find((recording) => String(recording.ids) === String(ids));
    if (!found) throw new NotRecorded("This text was not recorded; choose one of the list.");
    if (!this.runs.has(found)) this.runs.set(found, new RecordedRun(this, found, await readTensors(found)));
    return this.runs.get(found);
  }
}

/** What was recorded of a text: attention scores and patterns; norms; readings. `get` returns null for the rest. */
export class RecordedRun {
  constructor(model, { ids, streams, labels }, tensors) {
    Object.assign(this, { model, ids, streams, labels, tensors, logits: null, edits: {}, key: "recorded" });
    const layers = Array.from({ length: model.config.n_layer }, (_, layer) => `blocks.${layer}.attn`);
    this.names = layers.flatMap((name) => [`${name}.hook_attn_scores`, `${name}.hook_pattern`]);
    this.maps = new Map();
  }

  /** Return the attention scores or the pattern of a layer, (H, T, T); null for any other activation. */
  get(name) {
    if (!this.names.includes(name)) return null;
    if (!this.maps.has(name)) {
      const layer = Number(name.split(".")[1]);
      this.maps.set(name, name.endsWith("hook_pattern") ? this.pattern(layer) : this.scores(layer));
    }
    return this.maps.get(name);
  }

  /** Each query's scores are recorded as their distance from its largest one, those of its future not at all. */
  scores(layer) {
    const [H, T] = [this.model.config.n_head, this.ids.length];
    const scores = new Tensor([H, T, T]);
    for (let head = 0; head < H; head++) {
      const below = row(this.tensors.get("scores"), layer, head); // (T (T + 1) / 2)
      const largest = row(this.tensors.get("largest_scores"), layer, head); // (T)
      for (let query = 0, i = 0; query < T; query++) {
        const values = row(scores, head, query);
        for (let key = 0; key < T; key++) values[key] = key <= query ? below[i++] + largest[query] : -Infinity;
      }
    }
    return scores;
  }

  pattern(layer) {
    const scores = this.get(`blocks.${layer}.attn.hook_attn_scores`);
    const pattern = new Tensor(scores.shape);
    const T = this.ids.length;
    for (let i = 0; i < scores.data.length; i += T) pattern.data.set(softmax(scores.data.subarray(i, i + T)), i);
    return pattern;
  }

  /** Return the most probable tokens after a position, at most the 50 recorded: [{id, logit, probability}]. */
  next(position, k) {
    const [ids, logits, probabilities] = ["ids", "logits", "probabilities"].map(
      (name) => row(this.tensors.get(`next_${name}`), position));
    return Array.from(ids.subarray(0, k), (id, i) => ({ id, logit: logits[i], probability: probabilities[i] }));
  }

  /** Return the logits of all tokens after a position, the largest first, interpolated between the recorded ranks. */
  sortedLogits(position) {
    const [ranks, gaps] = [this.tensors.get("ranks").data, row(this.tensors.get("gaps"), position)];
    const logits = new Float32Array(ranks[ranks.length - 1] + 1);
    logits.set(row(this.tensors.get("next_logits"), position));
    let logit = logits[ranks[0]];
    for (const [i, gap] of gaps.entries()) {
      const n = ranks[i + 1] - ranks[i];
      for (let j = 1; j <= n; j++) logits[ranks[i] + j] = logit - (gap * j) / n;
      logit -= gap;
    }
    return logits;
  }

  /** Return the logit of an id after a position, null for one that was not recorded. */
  logit(position, id) {
    return this.next(position).find((token) => token.id === id)?.logit ?? null;
  }

  /** Return the most probable tokens at each layer, at most the 10 recorded: [[{id, probability}]]. */
  logitLens(position, k) {
    return Array.from({ length: this.model.config.n_layer + 1 }, (_, layer) => {
      const probabilities = row(this.tensors.get("lens_probabilities"), layer, position);
      const ids = row(this.tensors.get("lens_ids"), layer, position).subarray(0, k);
      return Array.from(ids, (id, i) => ({ id, probability: probabilities[i] }));
    });
  }

  /** Return what each part adds to the logit of an id, [{label, value}]; null for an id that was not recorded. */
  attribution(position, id) {
    const target = this.targets(position).indexOf(id);
    if (target < 0) return null;
    const values = row(this.tensors.get("attribution"), position, target);
    return this.labels.map((label, i) => ({ label, value: values[i] }));
  }

  /** Return the ids of which attributions were recorded: the most probable, and last the one that follows. */
  targets(position) {
    return [...row(this.tensors.get("targets"), position)];
  }

  /** Return the norms of a stream or part, (T), or of each head's result, (T H); null for any other activation. */
  norms(name) {
    const stream = this.streams.indexOf(name);
    if (stream >= 0) return row(this.tensors.get("norms"), stream);
    const layer = name.match(/^blocks\.(\d+)\.attn\.hook_result$/)?.[1];
    if (layer === undefined) return null;
    const [H, T] = [this.model.config.n_head, this.ids.length];
    const first = this.labels.indexOf(`L${layer}H0`);
    const norms = this.tensors.get("part_norms"); // (N, T)
    return Float32Array.from({ length: T * H }, (_, i) => row(norms, first + (i % H))[Math.floor(i / H)]);
  }
}

/** The texts of the tokens in a recording. It cannot encode. */
export class RecordedTokenizer {
  constructor({ tokens }) {
    this.tokens = tokens;
    this.ends = [];
  }

  encode() {
    throw new NotRecorded("A recorded page has no tokenizer; choose a text of the list.");
  }

  decode(ids) {
    return [...ids].map((id) => this.tokens[id] ?? "").join("");
  }

  tokenText(id) {
    return this.decode([id]);
  }

  has(id) {
    return id in this.tokens;
  }
}
