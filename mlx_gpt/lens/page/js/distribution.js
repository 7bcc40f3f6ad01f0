// The distribution of the next token: what the sampling rules leave of it, and how far two of them differ.

import { fmt } from "./dom.js";
import { keepTopK, keepTopP, makeRandom, pick, softmax, withTemperature } from "./sampling.js";

/** Logits after the token at a position: (V). */
export function logitsAt(run, position) {
  const V = run.logits.shape[1];
  return run.logits.data.subarray(position * V, (position + 1) * V);
}

/** The indices of the n largest values, the largest first. */
export function largest(values, n) {
  const found = [];
  for (let i = 0; i < values.length; i++) {
    if (found.length === n && !(values[i] > values[found[n - 1]])) continue;
    if (found.length === n) found.pop();
    let at = found.length;
    while (at > 0 && values[i] > values[found[at - 1]]) at--;
    found.splice(at, 0, i);
  }
  return found;
}

/** log Σ exp(logit). */
export function logSumExp(logits) {
  let most = -Infinity;
  for (const x of logits) if (x > most) most = x;
  let sum = 0;
  for (const x of logits) sum += Math.exp(x - most);
  return most + Math.log(sum);
}

/** What temperature, top-k and top-p make of logits: {scaled, probs, removedBy}.
 *  ``removedBy[i]`` names the rule that removed entry i; it is "" for one that is kept. */
export function applyRules(logits, { temperature, topK, topP }) {
  if (temperature === 0) {
    const [best] = largest(logits, 1);
    const probs = Float64Array.from(logits, (_, i) => (i === best ? 1 : 0));
    return { scaled: logits, probs, removedBy: (i) => (i === best ? "" : "temperature 0") };
  }
  const scaled = withTemperature(logits, temperature);
  const afterK = topK ? keepTopK(scaled, topK) : scaled;
  const afterP = topP < 1 ? keepTopP(afterK, topP) : afterK;
  const removedBy = (i) => (afterK[i] === -Infinity ? "top-k" : afterP[i] === -Infinity ? "top-p" : "");
  return { scaled, probs: softmax(afterP), removedBy };
}

const RECORDED = 50; // most probable tokens that a recorded run keeps for a position

/** The next token after a position of a run, before and after the sampling rules. */
export class NextToken {
  constructor(run, position, settings) {
    this.all = run.logits !== null && run.logits !== undefined;
    const top = this.all ? null : run.top(position, RECORDED);
    this.ids = top && top.map(({ id }) => id); // of the entries; null: all tokens
    this.logits = top ? Float64Array.from(top, ({ p }) => Math.log(p)) : logitsAt(run, position);
    this.logZ = top ? 0 : logSumExp(this.logits);
    this.temperature = settings.temperature;
    Object.assign(this, applyRules(this.logits, settings));
  }

  entryOf(id) {
    return this.ids ? this.ids.indexOf(id) : id;
  }

  /** The n most probable tokens: ids. */
  top(n) {
    return largest(this.logits, n).map((i) => (this.ids ? this.ids[i] : i));
  }

  /** {raw, p, removed} of a token; null where it is not recorded. */
  of(id) {
    const i = this.entryOf(id);
    return i < 0 ? null : { raw: Math.exp(this.logits[i] - this.logZ), p: this.probs[i], removed: this.removedBy(i) };
  }

  get kept() {
    return this.probs.reduce((n, p) => n + (p > 0), 0);
  }

  /** The probability of a token after the rules, as a formula with its values. */
  explain(id) {
    const i = this.entryOf(id);
    const { raw, p, removed } = this.of(id);
    const note = `Before the rules its probability is ${fmt(raw)}. ${this.kept} of ${this.logits.length} tokens are kept.`;
    if (removed) return { formula: `p = 0: removed by ${removed}`, filled: `logit z = ${fmt(this.logits[i])}`, note };
    if (this.temperature === 0) return { formula: "p = 1: temperature 0 takes the most probable token", filled: `logit z = ${fmt(this.logits[i])}`, note };
    const [best] = largest(this.logits, 1);
    const [z, most, t] = [this.logits[i], this.logits[best], this.temperature].map(fmt);
    return {
      formula: "p = exp((z − max z) / temperature) / sum of the same over the kept tokens",
      filled: `exp((${z} − ${most}) / ${t}) / ${fmt(1 / this.probs[best])} = exp(${fmt(this.scaled[i])}) / ${fmt(1 / this.probs[best])} = ${fmt(p)}`,
      note,
    };
  }
}

/** Random numbers for the tokens after the first n: the token at position n has the n-th number of the seed's sequence,
 *  so that a text sampled token by token equals one sampled at once. */
export function randomAfter(seed, n) {
  const random = makeRandom(seed);
  for (let i = 0; i < n; i++) random();
  return random;
}

/** A function from logits to the id that is sampled, for the tokens after the first n. */
export function makePicker(settings, n) {
  const random = randomAfter(settings.seed, n);
  return (logits) => pick(applyRules(logits, settings).probs, random);
}

/** Mean of −log p over the tokens of a text after the first, in nats; null for a text of one token. */
export function lossOf(run, logits = run.logits) {
  const n = run.ids.length - 1;
  let sum = 0;
  for (let t = 0; t < n; t++) {
    const row = logitsAt({ logits }, t);
    sum += logSumExp(row) - row[run.ids[t + 1]];
  }
  return n > 0 ? sum / n : null;
}

/** Kullback-Leibler divergence Σ p log(p / q) in nats, of the distributions with these logits. */
export function divergence(logitsOfP, logitsOfQ) {
  const zp = logSumExp(logitsOfP);
  const zq = logSumExp(logitsOfQ);
  let sum = 0;
  for (let i = 0; i < logitsOfP.length; i++) {
    const logP = logitsOfP[i] - zp;
    if (logP > -700) sum += Math.exp(logP) * (logP - logitsOfQ[i] + zq);
  }
  return Math.max(0, sum);
}
