// The three steps of attention, for all heads of a layer (model/attention.py).
// There are S tokens; the last T of them, from `start` on, ask.

import { Tensor, multiply, rows, softmax } from "./tensor.js";

/** Return the products of the queries from `start` on with all keys, times scale: (S, H, D) twice -> (H, T, S). */
export function attentionScores(q, k, scale, start) {
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
export function attentionPattern(scores, start) {
  const [H, T, S] = scores.shape;
  const pattern = new Tensor([H, T, S]);
  for (let i = 0; i < H * T; i++) {
    const future = start + (i % T) + 1;
    pattern.data.set(softmax(scores.data.subarray(i * S, i * S + future)), i * S);
  }
  return pattern;
}

/** Return the average of the values, weighted by the pattern: (H, T, S), (S, H, D) -> (T, H, D). */
export function weightedValues(pattern, v) {
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
