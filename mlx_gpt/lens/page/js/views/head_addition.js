// The last step of one head: the vector that it adds to the residual stream, and the logits that it moves.

import { fmt, h, number, showToken } from "../dom.js";
import { explainResult, logitsOf, productsText, sumText, throughFinalNorm } from "../heads.js";
import { topTokens } from "../readings.js";
import { dot, norm, row } from "../tensor.js";
import { largest, placed, strip } from "./head_parts.js";

const MOVED = 5; // tokens that the head raises, and lowers, most

export function additionStep(store, at) {
  const { run, layer, head, query, result } = at;
  const say = h("p", { text: "The output matrix W_O takes z back to the width of the residual stream. The head adds this vector to the stream of its token, and later layers and the prediction read the sum." });
  const size = result ? norm(result) : run.norms(`blocks.${layer}.attn.hook_result`)?.[query * store.config.n_head + head];
  const length = () => ({ formula: "norm = √Σ resultᵢ²", filled: result ? `√(${sumText(Array.from(result, (x) => `${fmt(x)}²`))}) = ${fmt(size)}` : "" });
  const line = size === undefined ? null : h("p", { class: "result" }, "length of the vector: ", number(size, placed("result-norm", at, {}), length));
  if (!result) return [say, line, h("p", { class: "muted", text: "This page was recorded without the vector itself; a living page shows it and the logits that it moves." })];
  const vector = strip(store, at, "z × W_O", result, largest(result), (_, c) => explainResult(store, at, c), "--stream", "result");
  return [say, vector, line, cosineLine(at), store.living ? movedLogits(store, at) : null];
}

/** Cosine of the vector and the stream that it is added to. */
function cosineLine(at) {
  const { run, layer, query, result } = at;
  const stream = run.get(`blocks.${layer}.hook_resid_pre`);
  if (!stream || norm(result) === 0) return null;
  const x = row(stream, query);
  const cosine = dot(result, x) / (norm(result) * norm(x));
  const how = () => ({
    formula: "cosine = result · x / (length of result × length of x)",
    filled: `${fmt(dot(result, x))} / (${fmt(norm(result))} × ${fmt(norm(x))}) = ${fmt(cosine)}`,
    note: "x is the stream before this layer. 1: the head makes it longer; 0: it adds something new; −1: it takes away.",
  });
  return h("p", { class: "result" }, "cosine with the stream before: ", number(cosine, placed("result-cosine", at, {}), how));
}

/** The tokens whose logits the vector raises and lowers most, read by the final norm and the head of the model. */
function movedLogits(store, at) {
  const { run, query, result } = at;
  const logits = logitsOf(run, query, result);
  const read = throughFinalNorm(run, query, result);
  const raised = topTokens(logits, MOVED).map(({ id }) => id);
  const lowered = topTokens(logits.map((x) => -x), MOVED).map(({ id }) => id);
  const most = largest(logits) || 1;
  const explainLogit = (id) => () => ({
    formula: "change of the logit = (result − its mean) × w / scale · W_U",
    filled: `${productsText(read, row(run.model.head, id))} = ${fmt(logits[id])}`,
    note: `The final norm at the scale of this text, then the direction of ${showToken(store.tokenizer.tokenText(id))} in the head.`,
  });
  const entry = (id) =>
    h(
      "tr",
      {},
      h("th", { scope: "row", text: showToken(store.tokenizer.tokenText(id)) }),
      h("td", {}, number(logits[id], placed("moved-logit", at, { token: id }), explainLogit(id))),
      h("td", {}, h("span", { class: logits[id] < 0 ? "weight-bar lowered" : "weight-bar raised", "aria-hidden": "true", style: { "--share": Math.abs(logits[id]) / most } })),
    );
  const list = (caption, ids) => h("table", {}, h("caption", { text: caption }), h("tbody", {}, ...ids.map(entry)));
  return h("div", { class: "row moved" }, list("Logits raised most", raised), list("Logits lowered most", lowered));
}
