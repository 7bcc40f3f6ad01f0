// The text, shaded by the weights of one query, with an arc from the query to each key that it looks at.

import { shade } from "../canvas.js";
import { h, heat, put, showToken, svg } from "../dom.js";
import { patternOf } from "../heads.js";

const MOST_ARCS = 12; // the strongest keys

export function makeArcs(store) {
  const lines = svg("svg", { class: "arcs", "aria-hidden": "true" });
  const text = h("div", {
    class: "read",
    role: "group",
    "aria-label": "The text, shaded by the weights of a query; select a token",
    "data-keys": true,
  });
  const element = h("div", { class: "shaded" }, lines, text);
  let shown = {};
  let tokens = [];
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) tokens[tokens.indexOf(document.activeElement) + step]?.focus();
  });
  const drawArcs = () => put(lines, ...(shown.run ? arcPaths(shown, tokens) : []));
  new ResizeObserver(drawArcs).observe(text);

  const update = (at) => {
    const before = shown;
    shown = at;
    if (at.run !== before.run) {
      tokens = [...at.run.ids].map((_, position) => readToken(store, position));
      put(text, ...tokens);
    }
    const same = ["run", "layer", "head", "query", "key"].every((name) => at[name] === before[name]);
    if (same) return;
    const weights = patternOf(at.run, at.layer, at.head).subarray(at.query * at.T, (at.query + 1) * at.T);
    tokens.forEach((token, position) => shadeToken(token, weights[position], at, position));
    drawArcs();
  };
  return { element, update };
}

function readToken(store, position) {
  const enter = () => store.point({ token: position });
  const leave = () => store.point({});
  return h("button", {
    type: "button",
    class: "token",
    text: showToken(store.tokenAt(position)),
    "data-position": position,
    on: {
      click: () => store.set({ token: position }),
      pointerenter: enter,
      focus: enter,
      pointerleave: leave,
      blur: leave,
    },
  });
}

function shadeToken(token, weight, { layer, head, query, key }, position) {
  token.style.background = heat(0.6 * shade(weight), "--key");
  Object.assign(token.dataset, { what: "shade", value: weight, layer, head, query, key: position });
  token.classList.toggle("hover", position === query);
  token.classList.toggle("key", position === key && position !== query);
  token.classList.toggle("future", position > query);
  token.tabIndex = position === query ? 0 : -1;
}

/** Curves from the query to its strongest keys; their width and depth are the weight. */
function arcPaths({ run, layer, head, T, query }, tokens) {
  const weights = patternOf(run, layer, head).subarray(query * T, query * T + query);
  const keys = [...weights.keys()]
    .sort((a, b) => weights[b] - weights[a])
    .slice(0, MOST_ARCS)
    .filter((key) => weights[key] >= 0.02);
  const top = (token) => [token.offsetLeft + token.offsetWidth / 2, token.offsetTop];
  const [x, y] = top(tokens[query]);
  return keys.map((key) => {
    const [toX, toY] = top(tokens[key]);
    const height = Math.min(26, 8 + Math.abs(toX - x) / 8);
    return svg("path", {
      d: `M${x} ${y}C${x} ${y - height} ${toX} ${toY - height} ${toX} ${toY}`,
      "data-key": key,
      "stroke-width": 1 + 3 * weights[key],
      "stroke-opacity": Math.min(1, 0.15 + shade(weights[key])),
    });
  });
}
