// The weights of the selected token's query in the chosen head as a table.

import { h, number, put, showToken } from "../dom.js";
import { explainScore, explainWeight, patternOf, quoted, scoresOf } from "../heads.js";

export function makeWeights(store) {
  const caption = h("caption", {});
  const body = h("tbody", {});
  const columns = ["Position", "Key", "Score", "Weight"].map((text) => h("th", { scope: "col", text }));
  const table = h("table", { class: "weights" }, caption, h("thead", {}, h("tr", {}, ...columns)), body);
  const element = h(
    "div",
    { class: "scroll low", tabindex: "0", role: "region", "aria-label": "Weights of the query" },
    table,
  );
  let shown = {};
  const update = (looked) => {
    const at = { ...looked, query: Math.min(store.token, looked.T - 1) };
    if (["run", "layer", "head", "query"].some((name) => at[name] !== shown[name])) {
      caption.textContent = `Where ${quoted(store, at.query)} at ${at.query} looks in layer ${at.layer}, head ${at.head}`;
      put(body, ...weightRows(store, at));
    }
    shown = at;
    body.querySelector(".pointed")?.classList.remove("pointed");
    if (looked.query === at.query) body.children[at.key]?.classList.add("pointed");
  };
  return { element, update };
}

function weightRows(store, at) {
  const { run, layer, head, query, T } = at;
  const [weights, scores] = [patternOf(run, layer, head), scoresOf(run, layer, head)];
  return Array.from({ length: query + 1 }, (_, key) => {
    const cell = { ...at, key };
    const data = { layer, head, query, key };
    const score = number(scores[query * T + key], { what: "score", ...data }, () => explainScore(store, cell));
    const weight = number(weights[query * T + key], { what: "weight", ...data }, () => explainWeight(store, cell));
    const token = h("th", { scope: "row", text: showToken(store.tokenAt(key)) });
    return h(
      "tr",
      { on: { pointerenter: () => store.point({ token: query, key }), pointerleave: () => store.point({}) } },
      h("td", { text: key }),
      token,
      h("td", {}, score),
      h("td", {}, weight),
    );
  });
}
