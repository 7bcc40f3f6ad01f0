// The distribution of the next token: what the sampling rules leave of it, and how far two of them differ.

import { fmt } from "./dom.js";
import { topTokens } from "./readings.js";
import { applyRules, makeRandom, pick } from "./sampling.js";
import { row, softmax } from "./tensor.js";

const RECORDED = 50; // most probable tokens that a recorded run has for a position
const RAW = { temperature: 1, topK: 0, topP: 1 };

/** The next token after a position of a run, before and after the sampling rules {temperature, topK, topP, forbidden}.
 *  In a recorded run it knows all logits, but only of the most probable ones which tokens they are of. */
export class NextToken {
  constructor(run, position, settings = RAW) {
    const recorded = run.logits ? null : run.next(position, RECORDED);
    this.ids = recorded && recorded.map(({ id }) => id); // of the first entries; null: entry i is token i
    this.logits = recorded ? run.sortedLogits(position) : row(run.logits, position);
    this.logZ = recorded ? recorded[0].logit - Math.log(recorded[0].probability) : logSumExp(this.logits);
    this.settings = settings;
    this.allowed = applyRules(this.logits, settings);
    this.probabilities = softmax(this.allowed);
  }

  /** The n most probable tokens. */
  top(n) {
    return topTokens(this.logits, n).map(({ id }) => this.ids?.[id] ?? id);
  }

  /** Whether the probability of a token is known. */
  has(id) {
    return this.entryOf(id) >= 0;
  }

  entryOf(id) {
    return this.ids ? this.ids.indexOf(id) : id;
  }

  /** Probability before the rules. */
  raw(id) {
    return Math.exp(this.logits[this.entryOf(id)] - this.logZ);
  }

  /** Probability after the rules. */
  p(id) {
    return this.probabilities[this.entryOf(id)];
  }

  /** The rule that removes a token; "" for one that is kept. */
  removedBy(id) {
    const i = this.entryOf(id);
    if (this.allowed[i] !== -Infinity) return "";
    const { temperature, topK, forbidden } = this.settings;
    if (forbidden?.includes(i)) return "no token";
    if (temperature === 0) return "greedy";
    if (topK) this.ofTopK ??= applyRules(this.logits, { ...this.settings, topP: 1 });
    return this.ofTopK?.[i] === -Infinity ? "top-k" : "top-p";
  }

  /** Number of tokens that the rules keep. */
  get kept() {
    return this.allowed.reduce((n, logit) => n + (logit !== -Infinity), 0);
  }

  /** The probability of a token after the rules: {formula, filled, note}. */
  explain(id) {
    const z = this.logits[this.entryOf(id)];
    const most = this.logits.reduce((a, b) => Math.max(a, b));
    const t = this.settings.temperature;
    const note = `Before the rules: ${fmt(this.raw(id))}. Tokens kept: ${this.kept} of ${this.logits.length}.`;
    const removed = this.removedBy(id);
    if (removed) return { formula: `p = 0, removed by ${removed}`, filled: `logit z = ${fmt(z)}`, note };
    if (t === 0) return { formula: "p = 1: temperature 0 takes the largest logit", filled: `logit z = ${fmt(z)}`, note };
    const exp = Math.exp((z - most) / t);
    const sum = exp / this.p(id);
    return {
      formula: "p = exp((z − max) / temperature) / sum over the kept tokens",
      filled: `exp((${fmt(z)} − ${fmt(most)}) / ${fmt(t)}) / ${fmt(sum)} = ${fmt(exp)} / ${fmt(sum)} = ${fmt(this.p(id))}`.replace("− −", "+ "),
      note,
    };
  }
}

/** The sampling rules of the state. Ids that no token has are forbidden. */
export function settingsOf({ state, tokenizer, config, living }) {
  const { temperature, topK, topP, seed } = state;
  const forbidden = [];
  if (living) for (let id = 0; id < config.vocab_size; id++) if (!tokenizer.has(id)) forbidden.push(id);
  return { temperature, topK, topP, seed, forbidden };
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
  return (logits) => pick(softmax(applyRules(logits, settings)), random);
}

/** log Σ exp(logit). */
export function logSumExp(logits) {
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  let sum = 0;
  for (const x of logits) sum += Math.exp(x - most);
  return most + Math.log(sum);
}

/** −log p of each token of a text after the first, in nats. */
export function lossesOf(run) {
  return run.ids.slice(1).map((id, t) => logSumExp(row(run.logits, t)) - row(run.logits, t)[id]);
}

/** Loss of a text: the mean of −log p over its tokens after the first; null for a text of one token. */
export function lossOf(run) {
  const losses = lossesOf(run);
  return losses.length ? losses.reduce((a, b) => a + b, 0) / losses.length : null;
}

/** Kullback-Leibler divergence Σ p log(p / q) in nats, of the distributions with these logits. */
export function divergence(logitsOfP, logitsOfQ) {
  const [zp, zq] = [logSumExp(logitsOfP), logSumExp(logitsOfQ)];
  let sum = 0;
  for (let i = 0; i < logitsOfP.length; i++) {
    const logP = logitsOfP[i] - zp;
    const logQ = logitsOfQ[i] - zq;
    if (logP > -700) sum += Math.exp(logP) * (logP - logQ); // a smaller p adds 0
  }
  return Math.max(0, sum);
}
