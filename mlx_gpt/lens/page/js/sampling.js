// The sampling rules of generate/sampling.py, each a pure function of logits (V) that returns logits, and the choice of
// an id. A rule forbids an id by -Infinity. Numbers are rounded to float32 as there, so that ties are the same.

import { softmax } from "./tensor.js";

/** Forbid some ids, such as those that no token has. */
export function forbid(logits, ids) {
  const allowed = Float32Array.from(logits);
  for (const id of ids) allowed[id] = -Infinity;
  return allowed;
}

/** Divide the logits by `temperature`: below 1 sharpens the distribution, above 1 flattens it. */
export function withTemperature(logits, temperature) {
  const max = largestLogit(logits);
  const divisor = Math.max(Math.fround(temperature), 1e-30);
  return Float32Array.from(logits, (logit) => Math.fround(logit - max) / divisor);
}

/** Keep the k most probable ids, and ids as probable as the k-th (Fan et al. 2018). */
export function keepTopK(logits, k) {
  const ascending = Float32Array.from(logits).sort();
  const kth = ascending[Math.max(0, logits.length - k)];
  return Float32Array.from(logits, (logit) => (logit < kth ? -Infinity : logit));
}

/**
 * Keep the nucleus: the fewest most probable ids whose probabilities sum to at least p (Holtzman et al. 2020).
 *
 * Ids as probable as the last of them are kept too.
 */
export function keepTopP(logits, p) {
  const ascending = Float32Array.from(logits).sort();
  const cut = Math.fround(1 - Math.fround(p));
  let cumulative = 0;
  let last = ascending[ascending.length - 1];
  for (const [i, probability] of softmax(ascending).entries()) {
    cumulative = Math.fround(cumulative + probability);
    if (cumulative > cut) {
      last = ascending[i];
      break;
    }
  }
  return Float32Array.from(logits, (logit) => (logit < last ? -Infinity : logit));
}

/** Return the most probable id, the first of several. */
export function greedy(logits) {
  return logits.indexOf(largestLogit(logits));
}

/** Keep the most probable id alone: what temperature 0 means. */
export function keepGreedy(logits) {
  const best = greedy(logits);
  return Float32Array.from(logits, (logit, id) => (id === best ? logit : -Infinity));
}

/** Apply all rules in the order of generate/sampler.py. topK 0 and topP 1 are off. */
export function applyRules(logits, { temperature = 1, topK = 0, topP = 1, forbidden = [] } = {}) {
  let kept = forbid(logits, forbidden);
  if (temperature === 0) return keepGreedy(kept);
  if (temperature !== 1) kept = withTemperature(kept, temperature);
  if (topK > 0) kept = keepTopK(kept, topK);
  if (topP < 1) kept = keepTopP(kept, topP);
  return kept;
}

/** Draw an id from probabilities (V) with `random`, a function that returns a number in [0, 1). */
export function pick(probabilities, random) {
  let left = random() * probabilities.reduce((sum, probability) => sum + probability, 0);
  let last = 0;
  for (const [id, probability] of probabilities.entries()) {
    if (probability === 0) continue;
    last = id;
    left -= probability;
    if (left < 0) break;
  }
  return last;
}

/** Return a generator of numbers in [0, 1) that a seed determines (xorshift32, Marsaglia 2003). */
export function makeRandom(seed) {
  let state = (Math.imul(seed ^ 0x9e3779b9, 0x85ebca6b) ^ 0x27d4eb2f) | 1; // unlike for neighboring seeds, never 0
  const next = () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 2 ** 32;
  };
  for (let i = 0; i < 8; i++) next(); // the first numbers of neighboring seeds are alike
  return next;
}

function largestLogit(logits) {
  return logits.reduce((max, logit) => Math.max(max, logit), -Infinity);
}
