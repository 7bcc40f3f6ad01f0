// The last step of one head: the vector that it adds to the residual stream, and the logits that it moves.

import { fmt, h, number, showToken } from "../dom.js";
import { explainResult, logitsOf, productsText, sumText, throughFinalNorm } from "../heads.js";
import { topTokens } from "../readings.js";
import { dot, norm, row } from "../tensor.js";
import { notRecorded, paragraph, placed, labelledRow, vectorStrip, weightBar } from "./head_parts.js";

const MOVED = 5; // tokens that the head raises, and lowers, most

export function additionStep(store, at) {
  const { run, layer, head, query, result } = at;
  const say = paragraph(
    "The output matrix W_O takes z back to the width of the residual stream. The head adds this vector to the stream",
    "of its token; later layers and the prediction read the sum.",
  );
  const size = run.norms(`blocks.${layer}.attn.hook_result`)[query * store.config.n_head + head];
  const squares = () => sumText(Array.from(result, (x) => `${fmt(Math.abs(x))}²`));
  const how = () => ({ formula: "length = √Σ resultᵢ²", filled: result ? `√(${squares()}) = ${fmt(size)}` : "" });
  const length = h("p", { class: "result" }, "length of the vector: ", number(size, placed("result-norm", at), how));
  const leftOut = "the vector itself; a living page shows it, and all logits that it moves";
  if (!result) return [say, length, movedLogits(store, at), notRecorded(leftOut)];
  const describe = (_, c) => explainResult(store, at, c);
  const strip = vectorStrip("z × W_O", result, placed("result", at), { describe, hue: "--stream" });
  return [say, strip, length, cosineLine(at), movedLogits(store, at)];
}

/** Cosine of the vector and the stream that it is added to. */
function cosineLine(at) {
  const { run, layer, query, result } = at;
  if (norm(result) === 0) return null; // knocked out
  const x = row(run.get(`blocks.${layer}.hook_resid_pre`), query);
  const cosine = dot(result, x) / (norm(result) * norm(x));
  const how = () => ({
    formula: "cosine = result · x / (length of result × length of x)",
    filled: `${fmt(dot(result, x))} / (${fmt(norm(result))} × ${fmt(norm(x))}) = ${fmt(cosine)}`,
    note: "x is the stream before this layer. 1: the head makes it longer; 0: it adds something new; −1: it takes away.",
  });
  const shown = number(cosine, placed("result-cosine", at), how);
  return h("p", { class: "result" }, "cosine with the stream before: ", shown);
}

/** The tokens whose logits the vector raises and lowers most, read by the final norm and the head of the model. */
function movedLogits(store, at) {
  const { raised, lowered, explainLogit } = store.living ? movedOfAll(at) : movedOfRecorded(at);
  const most = Math.max(...[...raised, ...lowered].map(({ value }) => Math.abs(value))) || 1;
  const entry = ({ id, value }) =>
    labelledRow(showToken(store.tokenizer.tokenText(id)), [
      number(value, placed("moved-logit", at, { token: id }), () => explainLogit(id, value)),
      weightBar(Math.abs(value) / most, value < 0 ? "lowered" : "raised"),
    ]);
  const list = (caption, tokens) =>
    tokens.length ? h("table", {}, h("caption", { text: caption }), h("tbody", {}, ...tokens.map(entry))) : null;
  return h("div", { class: "row moved" }, list("Logits raised most", raised), list("Logits lowered most", lowered));
}

function movedOfAll({ run, query, result }) {
  const logits = logitsOf(run, query, result);
  const read = throughFinalNorm(run, query, result);
  const withValue = ({ id }) => ({ id, value: logits[id] });
  const explainLogit = (id, value) => ({
    formula: "change of the logit = (result − its mean) × w / scale · W_U",
    filled: `${productsText(read, row(run.model.head, id))} = ${fmt(value)}`,
    note: "The final norm at the scale of this text, then the token's direction in the model's head.",
  });
  const raised = topTokens(logits, MOVED).map(withValue);
  const negated = logits.map((x) => -x);
  const lowered = topTokens(negated, MOVED).map(withValue);
  return { raised, lowered, explainLogit };
}

/** Of the tokens whose attribution was recorded. */
function movedOfRecorded({ run, query, layer, head }) {
  const of = (id) => run.attribution(query, id).find(({ label }) => label === `L${layer}H${head}`).value;
  const moved = [...new Set(run.targets(query))].map((id) => ({ id, value: of(id) }));
  moved.sort((a, b) => b.value - a.value);
  const explainLogit = (id, value) => ({ formula: "change of the logit, as recorded", filled: fmt(value) });
  const raised = moved.filter(({ value }) => value > 0).slice(0, MOVED);
  const lowered = moved.reverse().filter(({ value }) => value < 0).slice(0, MOVED);
  return { raised, lowered, explainLogit };
}
