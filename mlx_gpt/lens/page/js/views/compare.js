// Two states beside each other: A and B are pinned, or the page as it is.

import { clamp, h, put, showToken } from "../dom.js";
import { describeEdits } from "../edits.js";
import { OF_RUN } from "../store.js";
import { makeDifferenceTable } from "./difference.js";
import { makeNormTable } from "./norms.js";
import { makePatterns } from "./patterns.js";

export function makeCompareView(store) {
  const sides = ["A", "B"].map((name, i) => makeSide(store, name, i, () => update()));
  const tokens = makeTokenPairs(store);
  const heading = h("p", { class: "muted" });
  const next = makeDifferenceTable(store, ["A", "B"], "compare");
  const patterns = makePatterns(store);
  const norms = makeNormTable(store);
  const section = (title, ...children) => h("section", {}, h("h3", { text: title }), ...children);
  const found = h(
    "div",
    { class: "compare" },
    h("section", { class: "wide" }, h("h3", { text: "Tokens" }), tokens.element),
    section("Next token", heading, next.element),
    section("Length of the residual stream", norms.element),
    h("section", { class: "wide" }, h("h3", { text: "Attention pattern" }), patterns.element),
  );
  const say = "Pin a state, change the text or the model, and compare. A side without a pin is the page as it is.";
  const element = h("div", {}, h("p", { class: "muted", text: say }), h("div", { class: "columns sides" }, ...sides.map((side) => side.element)), found);

  const update = () => {
    sides.forEach((side) => side.update());
    const runs = sides.map((side) => side.run);
    found.hidden = runs.includes(null);
    if (found.hidden) return;
    const at = runs.map((run) => ({ run, position: positionIn(run, store.state.token) }));
    heading.textContent = at.map(({ run, position }, i) => `${"AB"[i]}: after ${showToken(store.tokenAt(position, run))} at position ${position}`).join("; ");
    tokens.update(runs);
    next.update(...at);
    norms.update(...at);
    patterns.update(...at);
  };
  return { id: "compare", title: "Compare", element, update };
}

/** The selected position, the last where none is selected or the text is shorter. */
function positionIn(run, token) {
  const last = run.ids.length - 1;
  return token === null ? last : clamp(token, 0, last);
}

/** One side: its pin, in words, and the run to show; null while it is computed. */
function makeSide(store, name, i, onRun) {
  const text = h("p", { class: "pinned" });
  const edits = h("p", { class: "muted", "data-what": `edits-${name}` });
  const press = (label, action) => h("button", { type: "button", text: label, "data-pin": name, "aria-label": `${label} ${name}`, on: { click: action } });
  const setPin = (pin) => {
    const pins = [0, 1].map((j) => (j === i ? pin : (store.state.pins[j] ?? null)));
    store.set({ pins: pins.some(Boolean) ? pins : [] });
  };
  const pin = press("Pin", () => setPin({ ...store.state, pins: [] }));
  const restore = press("Restore", () => store.set({ ...store.state.pins[i], pins: store.state.pins, view: "compare" }));
  const unpin = press("Unpin", () => setPin(null));
  const element = h("section", { "aria-label": name }, h("div", { class: "row" }, h("h3", { text: name }), pin, restore, unpin), text, edits);
  const side = { element, run: null };
  let key = null; // what the run was computed from

  const compute = async (state, wanted) => {
    side.run = null;
    try {
      const { run, edited } = await store.runsOf(state, `pin ${name}`);
      if (wanted !== key) return;
      side.run = edited ?? run;
      if (!side.run) edits.textContent = "An empty text.";
      onRun();
    } catch (error) {
      if (error.name !== "Superseded" && wanted === key) edits.textContent = error.message;
    }
  };
  side.update = () => {
    const pinned = store.state.pins[i] ?? null;
    const shown = pinned ?? store.state;
    text.textContent = shown.text;
    restore.hidden = unpin.hidden = pinned === null;
    const now = pinned && JSON.stringify(OF_RUN.map((field) => pinned[field]));
    if (!pinned) side.run = store.shown;
    if (!pinned || now !== key) edits.textContent = `${pinned ? "" : "not pinned; "}${describeEdits(shown) || "no edits"}`;
    if (now === key) return;
    key = now;
    if (pinned) compute(pinned, now);
  };
  return side;
}

/** The tokens of both texts, one above the other by position. Pressing a pair selects its position. */
function makeTokenPairs(store) {
  const element = h("div", { class: "pairs", role: "group", "aria-label": "Tokens of A above those of B; select a position" });
  let drawn = [];
  const update = ([a, b]) => {
    if (a !== drawn[0] || b !== drawn[1]) {
      drawn = [a, b];
      put(element, ...Array.from({ length: Math.max(a.ids.length, b.ids.length) }, (_, position) => tokenPair(store, a, b, position)));
    }
    [...element.children].forEach((button, position) => button.setAttribute("aria-pressed", position === store.state.token));
  };
  return { element, update };
}

function tokenPair(store, a, b, position) {
  const [above, below] = [a, b].map((run) => (position < run.ids.length ? showToken(store.tokenAt(position, run)) : "–"));
  const same = a.ids[position] === b.ids[position];
  return h(
    "button",
    {
      type: "button", class: `token pair${same ? "" : " differs"}`, "data-position": position,
      "aria-label": same ? `${above} at position ${position}` : `A ${above}, B ${below} at position ${position}`,
      on: { click: () => store.set({ token: position }) },
    },
    h("span", { text: above }),
    h("span", { text: below }),
  );
}
