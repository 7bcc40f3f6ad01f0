// A grid of small attention patterns, a row for each layer and a column for each head.

import { drawWeights, inSlices, onTheme } from "../canvas.js";
import { clamp, fmt, h, percent, showToken } from "../dom.js";
import { patternOf, strongestKey, summarize } from "../heads.js";

export function makeThumbnails(store) {
  const { n_layer: L, n_head: H } = store.config;
  const few = H <= 4; // there is room beside each pattern
  const heads = Array.from({ length: L * H }, (_, i) => makeThumbnail(store, Math.floor(i / H), i % H, few));
  const grid = h(
    "div",
    {
      class: few ? "thumbnails beside" : "thumbnails",
      role: "group",
      "aria-label": "Heads; choose one",
      style: { "--heads": H },
    },
    ...heads.map(({ element }) => element),
  );
  let shown = {};
  const draw = inSlices((thumbnail) => thumbnail.draw(shown));
  const look = inSlices((thumbnail) => thumbnail.look(shown));
  onTheme(() => shown.run && (draw(heads), look(heads)));
  const update = (at) => {
    const chosen = at.layer * H + at.head;
    grid.style.setProperty("--query-at", at.query);
    grid.style.setProperty("--rows", at.T);
    const before = shown;
    shown = { ...at, chosen };
    const order = [heads[chosen], ...heads.filter((_, i) => i !== chosen)];
    if (at.run !== before.run) draw(order);
    if (at.run !== before.run || at.query !== before.query) look(order);
    heads.forEach((thumbnail, i) => thumbnail.mark(i === chosen, store.state.heads));
    if (chosen !== before.chosen) reveal(element, heads[chosen].element);
    if (chosen !== before.chosen && grid.contains(document.activeElement)) heads[chosen].element.focus();
  };
  const element = h("div", { class: "scroll all-heads" }, grid);
  return { element, update };
}

/** Scroll an element so that a part of it is seen; the page does not move. */
function reveal(element, { offsetTop, offsetLeft, offsetHeight, offsetWidth }) {
  const { scrollTop, scrollLeft, clientHeight, clientWidth } = element;
  element.scrollTop = clamp(scrollTop, offsetTop + offsetHeight - clientHeight, offsetTop);
  element.scrollLeft = clamp(scrollLeft, offsetLeft + offsetWidth - clientWidth, offsetLeft);
}

/** One head: its pattern, the row of the query, and what it attends to. */
function makeThumbnail(store, layer, head, few) {
  const [pattern, row] = [h("canvas", { class: "cells" }), h("canvas", { class: "cells query-row" })];
  const [name, kind, looks] = [h("span", { class: "name" }), h("span", {}), h("span", { class: "looks" })];
  const element = h(
    "button",
    {
      type: "button",
      class: "thumbnail",
      "data-layer": layer,
      "data-head": head,
      on: { click: () => store.set({ layer, head }) },
    },
    h("span", { class: "frame" }, pattern),
    row,
    h("span", { class: "captions" }, name, kind, looks),
  );
  const numbers = (span, what, value, text, more = {}) => {
    span.textContent = span.title = text;
    Object.assign(span.dataset, { what, value, layer, head, ...more });
  };

  const draw = ({ run, T }) => {
    const weights = patternOf(run, layer, head);
    drawWeights(pattern, weights, T, T, (query) => query);
    pattern.classList.toggle("fine", T > 60); // more rows than can be drawn sharply
    const { first, share, offset, text } = summarize(weights, T);
    numbers(kind, "summary", Math.max(first, share), text, { first, share, offset });
  };

  const look = ({ run, T, query }) => {
    const weights = patternOf(run, layer, head);
    drawWeights(row, weights.subarray(query * T, (query + 1) * T), 1, T, () => T - 1);
    const key = strongestKey(weights, T, query);
    const weight = weights[query * T + key];
    numbers(looks, "strongest", weight, `→ ${showToken(store.tokenAt(key))}${few ? ` ${percent(weight)}` : ""}`, {
      query,
      key,
    });
  };

  let marked = "";
  const mark = (chosen, factors) => {
    const factor = factors[`${layer}.${head}`];
    const scaled = factor === undefined ? "" : ` ×${fmt(factor)}`;
    if (marked === (marked = `${chosen}${scaled}`)) return;
    name.textContent = `L${layer}H${head}${scaled}`;
    element.classList.toggle("edited", factor !== undefined);
    element.setAttribute("aria-pressed", chosen);
    element.setAttribute("tabindex", chosen ? "0" : "-1");
  };
  return { element, draw, look, mark };
}
