// The page's modules for tests that call them without a page.

import { decodeHalf } from "../../../mlx_gpt/lens/page/js/blob.js";
import { readPage } from "../../../mlx_gpt/lens/page/js/data.js";
import { NextToken } from "../../../mlx_gpt/lens/page/js/distribution.js";
import { applyRules, makeRandom, pick } from "../../../mlx_gpt/lens/page/js/sampling.js";
import { softmax } from "../../../mlx_gpt/lens/page/js/tensor.js";
import { makeTokenizer } from "../../../mlx_gpt/lens/page/js/tokenizer.js";

const opened = {};

globalThis.modules = {
  async open(data) {
    Object.assign(opened, await readPage(data));
  },

  async openRecorded(text) {
    opened.run = await opened.model.trace(opened.model.idsOf(text));
    return [...opened.run.ids];
  },

  /** Call a method of the recorded run; return arrays as lists and tensors as {shape, data}. */
  recorded: (method, ...given) => plain(opened.run[method](...given)),

  /** Return [id, probability] of the recorded tokens after the rules, for each settings, and how many are kept. */
  recordedAfterRules: (position, all) => all.map((settings) => {
    const next = new NextToken(opened.run, position, settings);
    return { next: next.ids.map((id) => [id, next.p(id)]), kept: next.kept };
  }),

  decodeHalf: (bits) => [...decodeHalf(Uint16Array.from(bits))],

  /** Let the model compute so many tokens in one go. */
  setRowsAtOnce(n) {
    opened.model.rowsAtOnce = n;
  },

  openTokenizer(data) {
    opened.tokenizer = makeTokenizer(data);
  },

  /** Texts come as UTF-16 code units: halves of surrogate pairs would not arrive otherwise. */
  encode: (units) => opened.tokenizer.encode(String.fromCharCode(...units)),

  decode: (ids) => opened.tokenizer.decode(ids),
  tokenTexts: (ids) => ids.map((id) => opened.tokenizer.tokenText(id)),

  /** Return names with shapes, and the values of all in base64. */
  async trace(ids, edits, names) {
    const run = await opened.model.trace(ids, { edits: withVector(edits) });
    const tensors = (names ?? [...run.names, "hook_unembed"]).map((name) => [name, run.get(name)]);
    return [tensors.map(([name, { shape }]) => [name, shape]), base64(tensors.map(([, { data }]) => data))];
  },

  /** Trace texts one after another without waiting; return what became of each. */
  async traceAll(texts, lanes) {
    const runs = texts.map((ids, i) => opened.model.trace(ids, { lane: lanes[i] }));
    return (await Promise.allSettled(runs)).map(({ status, reason }) => (status === "fulfilled" ? status : reason.name));
  },

  errorOf: async (ids) => opened.model.trace(ids).then(() => null, ({ message }) => message),

  generate: (ids, n, edits) => opened.model.generate(ids, n, (logits) => logits.indexOf(Math.max(...logits)), edits),

  next: async (ids, position, k) => (await opened.model.trace(ids)).next(position, k),

  logitLens: async (ids, position, k) => (await opened.model.trace(ids)).logitLens(position, k),

  attribution: async (ids, position, id) => (await opened.model.trace(ids)).attribution(position, id),

  norms: async (ids, name) => [...(await opened.model.trace(ids)).norms(name)],

  probabilities: (logits, all) => all.map((settings) => [...softmax(applyRules(Float32Array.from(logits), settings))]),

  /** Draw n ids from probabilities with each seed. */
  draw: (probabilities, seeds, n) => seeds.map((seed) => {
    const random = makeRandom(seed);
    return Array.from({ length: n }, () => pick(Float32Array.from(probabilities), random));
  }),
};

function plain(value) {
  if (ArrayBuffer.isView(value)) return Array.from(value, (x) => (x === -Infinity ? null : x));
  return value?.shape ? { shape: value.shape, data: plain(value.data) } : value;
}

function withVector(edits) {
  return edits.patch ? { ...edits, patch: { ...edits.patch, value: Float32Array.from(edits.patch.value) } } : edits;
}

function base64(arrays) {
  const bytes = arrays.flatMap((array) => [new Uint8Array(array.buffer, array.byteOffset, array.byteLength)]);
  const text = bytes.map((part) => Array.from(part, (byte) => String.fromCharCode(byte)).join("")).join("");
  return btoa(text);
}
