// The attention patterns of all heads at once, and the chosen one large.

import { h, put } from "../dom.js";
import { describe, patternOf, strongestKey, summarize } from "../heads.js";
import { makeArcs } from "./arcs.js";
import { makePattern } from "./pattern.js";
import { makeThumbnails } from "./thumbnails.js";
import { makeWeights } from "./weights.js";

const INTRODUCTION =
  "Every head divides the attention of each token, its query, among the keys of that token and of those before it. " +
  "In a pattern each row is a query and each column a key. Point at a token to see where it looks in all heads; " +
  "choose a head here or with the arrow keys.";

export function makeAttentionView(store) {
  const title = h("h3", {});
  const summary = h("p", { class: "muted" });
  const chosen = h("div", { "aria-live": "polite", "aria-atomic": "true", "data-what": "chosen-head" }, title, summary);
  const parts = [makeArcs(store), makePattern(store), makeWeights(store)];
  const heads = makeThumbnails(store);
  const element = h(
    "div",
    {},
    h("h2", { text: "Attention" }),
    h("p", { text: INTRODUCTION }),
    h(
      "div",
      { class: "attention" },
      heads.element,
      h("div", { class: "chosen" }, chosen, ...parts.map((part) => part.element)),
    ),
  );
  let said = "";
  const update = () => {
    const at = lookedAt(store);
    const sentence = describe(summarize(patternOf(store.shown, at.layer, at.head), at.T), at.T);
    if (said !== (said = `${at.layer} ${at.head} ${sentence}`)) {
      title.textContent = `Layer ${at.layer}, head ${at.head}: L${at.layer}H${at.head}`;
      put(summary, sentence);
    }
    for (const part of [...parts, heads]) part.update(at);
  };
  return { id: "attention", title: "Attention", element, update };
}

/** What the view shows: a run, a head, the query that is pointed at or selected, the key pointed at or the strongest. */
function lookedAt(store) {
  const { layer, head } = store.state;
  const run = store.shown;
  const T = run.ids.length;
  const inText = (position) => (position < T ? position : undefined);
  const query = inText(store.hover.token) ?? store.token;
  const key = inText(store.hover.key) ?? strongestKey(patternOf(run, layer, head), T, query);
  return { run, T, layer, head, query, key };
}
