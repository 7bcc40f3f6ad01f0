// Patch one position from a second text: take the residual stream there before a layer, and see what it carries.

import { fmt, h, number, put, showToken } from "../dom.js";
import { row } from "../tensor.js";
import { logitDifference, makePatchGrid } from "./patch_grid.js";

export function makePatch(store) {
  const field = h("input", { type: "text", id: "other", spellcheck: "false", autocapitalize: "off", maxlength: 19999 });
  field.addEventListener("input", () => store.set({ other: field.value }));
  const status = h("p", { class: "note", role: "status", "aria-live": "polite", "data-what": "patch-status" });
  const result = h("p", { "aria-live": "polite" });
  const grid = makePatchGrid(store);
  const say = "Choose a token and a layer: the residual stream there, before the layer, is replaced by that of the second text.";
  const element = h(
    "section",
    { class: "wide", "aria-label": "Patch from a second text" },
    h("h3", { text: "Patch from a second text" }),
    h("p", { class: "muted", text: say }),
    h("div", { class: "input" }, h("label", { for: "other", text: "Second text" }), field),
    status,
    result,
    grid.element,
  );
  let drawn = [];
  const update = () => {
    const { run, edited, otherRun, token, state } = store;
    if (field.value !== state.other) field.value = state.other;
    status.textContent = statusOf(store);
    grid.element.hidden = result.hidden = !otherRun;
    if (!otherRun) return;
    grid.update();
    const key = [run, edited, otherRun, token, state.patch];
    if (key.every((x, i) => x === drawn[i])) return;
    drawn = key;
    put(result, ...resultOf(store));
  };
  return { element, update };
}

function statusOf({ run, otherRun, state }) {
  if (!otherRun) return state.other ? "…" : "Type a text that differs from the first in a word.";
  const [n, m] = [run.ids.length, otherRun.ids.length];
  if (state.patch && state.patch.position >= Math.min(n, m)) return `One text has no token at position ${state.patch.position}: nothing is patched.`;
  return n === m ? "" : `The texts have ${n} and ${m} tokens: equal positions may not mean the same.`;
}

/** The logit difference of the first text, of the second, and of the first with the edits. */
function resultOf(store) {
  const { run, edited, otherRun, state, token } = store;
  const { right, wrong, of } = logitDifference(store);
  const name = (id) => `“${showToken(store.tokenizer.tokenText(id))}”`;
  const values = [["first text", "first", run, token], ["second text", "second", otherRun, Math.min(token, otherRun.ids.length - 1)]];
  if (edited && state.patch) values.push(["with the edits", "edited", edited, token]);
  const shown = values.flatMap(([label, part, from, at], i) => {
    const logits = row(from.logits, at);
    const how = () => ({
      formula: `logit of ${name(right)} − logit of ${name(wrong)}`,
      filled: `${fmt(logits[right])} − ${fmt(logits[wrong])} = ${fmt(of(from, at))}`,
    });
    return [`${i ? ", " : ""}${label} `, number(of(from, at), { what: `logit-difference-${part}` }, how)];
  });
  return [`Logit of ${name(right)} minus logit of ${name(wrong)} after ${name(run.ids[token])}: `, ...shown, "."];
}
