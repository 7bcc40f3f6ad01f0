// The next token: how probable each is, what temperature, top-k and top-p leave of it, and drawing one.

import { h, showToken, slider } from "../dom.js";
import { makeAppender } from "../append.js";
import { makeBars } from "./next_bars.js";

export function makeNextView(store) {
  const appender = makeAppender(store);
  const heading = h("p", { class: "muted" });
  const result = h("p", { class: "note", role: "status", "aria-live": "polite", "data-what": "appended" });
  const say = (text) => (result.textContent = text);
  const parts = [samplingRules(store), samplingActions(store, appender, say), makeBars(store, (id) => say(appender.append(id)))];
  const [rules, actions, bars] = parts.map(({ element }) => element);
  const element = h("section", { class: "next", "aria-label": "Next token" }, h("h2", { text: "Next token" }), heading, rules, actions, result, bars);
  const update = () => {
    heading.textContent = `after ${showToken(store.tokenAt(store.token))} at position ${store.token}`;
    for (const part of parts) part.update();
  };
  return { id: "next", title: "Next token", element, update };
}

/** Sliders for temperature, top-k and top-p. The right end of top-k and of top-p keeps all tokens. */
function samplingRules(store) {
  const V = store.config.vocab_size;
  const most = Math.min(V, 100);
  const all = (end) => (x) => (x >= end ? "all" : String(x));
  const temperature = slider("Temperature", { id: "temperature", min: 0, max: 2, step: 0.05, value: 1 }, (x) => store.set({ temperature: x }));
  const topK = slider("Top-k", { id: "top-k", min: 1, max: most, step: 1, value: most, show: all(V) }, (k) => store.set({ topK: k === most ? 0 : k }));
  const topP = slider("Top-p", { id: "top-p", min: 0, max: 1, step: 0.01, value: 1, show: all(1) }, (x) => store.set({ topP: x }));
  const update = () => {
    temperature.setValue(store.state.temperature);
    topK.setValue(store.state.topK || V);
    topP.setValue(store.state.topP);
  };
  return { element: h("div", {}, temperature.element, topK.element, topP.element), update };
}

/** Buttons that append a token, the seed, and why no token can be appended. */
function samplingActions(store, appender, say) {
  const press = (id, text, action, props = {}) => h("button", { type: "button", id, text, ...props, on: { click: action } });
  const sample = press("sample", "Sample", () => say(appender.sample()), { class: "primary" });
  const greedy = press("greedy", "Most probable", () => say(appender.appendBest()));
  const undo = press("undo", "Undo", () => say(appender.undo()));
  const another = press("new-seed", "New seed", () => store.set({ seed: Math.floor(Math.random() * 1e6) }));
  const seed = h("input", { id: "seed", type: "number", min: 0, max: 2 ** 32 - 1, step: 1 });
  seed.addEventListener("input", () => isSeed(seed.value) && store.set({ seed: Number(seed.value) }));
  seed.addEventListener("blur", () => (seed.value = store.state.seed));
  const why = h("p", { class: "note", "data-what": "why-not" });
  const seeds = h("div", { class: "row seed", hidden: !store.living }, h("label", { for: "seed", text: "Seed" }), seed, another);
  const element = h("div", { class: "actions" }, h("div", { class: "row" }, sample, greedy, undo), seeds, why);
  const update = () => {
    why.textContent = appender.reasonAgainst();
    for (const button of [sample, greedy]) button.disabled = why.textContent !== "";
    undo.hidden = !appender.canUndo();
    if (document.activeElement !== seed) seed.value = store.state.seed;
  };
  return { element, update };
}

function isSeed(text) {
  return /^\d{1,10}$/.test(text) && Number(text) < 2 ** 32;
}
