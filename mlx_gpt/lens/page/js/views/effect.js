// What the edits change: probabilities of the next token, and the loss of the text.

import { fmt, h, number, put, showToken } from "../dom.js";
import { lossOf, lossesOf } from "../distribution.js";
import { makeDifferenceTable } from "./difference.js";

export function makeEffect(store) {
  const none = h("p", { class: "muted" });
  const heading = h("p", { class: "muted" });
  const table = makeDifferenceTable(store, ["unchanged", "edited"], "effect");
  const losses = h("p", { "aria-live": "polite" });
  const found = h("div", {}, heading, table.element, losses);
  let drawn = null;
  const update = () => {
    const { run, edited, token } = store;
    found.hidden = edited === null;
    none.hidden = edited !== null;
    none.textContent = store.hasEdits() && store.busy ? "…" : "Nothing yet: switch off a head, scale an MLP or patch a position.";
    if (!edited) return;
    heading.textContent = `Next token after ${showToken(store.tokenAt(token))} at position ${token}, before the sampling rules`;
    table.update({ run, position: token }, { run: edited, position: token });
    if (drawn !== edited) put(losses, ...lossText(run, edited));
    drawn = edited;
  };
  return { element: h("section", { "aria-label": "What changed" }, h("h3", { text: "What changed" }), none, found), update };
}

function lossText(run, edited) {
  if (run.ids.length < 2) return ["A loss needs at least two tokens."];
  const [before, after] = [lossOf(run), lossOf(edited)];
  const minus = () => ({ formula: "loss edited − loss unchanged", filled: `${fmt(after)} − ${fmt(before)} = ${fmt(after - before)}` });
  return [
    "Loss of the text: ",
    number(before, { what: "loss-before" }, () => explainLoss(run, before)),
    " → ",
    number(after, { what: "loss-after" }, () => explainLoss(edited, after)),
    " nats per token (",
    number(after - before, { what: "loss-difference" }, minus, `${after > before ? "+" : ""}${fmt(after - before)}`),
    ")",
  ];
}

function explainLoss(run, loss) {
  const losses = lossesOf(run);
  const shown = losses.slice(0, 6).map(fmt).join(" + ");
  return {
    formula: "loss = mean of −log p(next token) over the text",
    filled: `(${shown}${losses.length > 6 ? " + …" : ""}) / ${losses.length} = ${fmt(loss)}`,
    note: "p is the probability, before the sampling rules, of the token that comes next.",
  };
}
