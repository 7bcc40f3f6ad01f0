// Bars of the most probable next tokens: before the rules (grey), after them, and those of the unchanged model.

import { fmt, h, number, percent, put, setNumber, showToken } from "../dom.js";
import { NextToken, settingsOf } from "../distribution.js";

const BARS = 10;
const SCALES = [0.05, 0.1, 0.2, 0.5, 1]; // probability at the full width of a bar

/** ``onPick(id)`` is called for a bar that is clicked. */
export function makeBars(store, onPick) {
  const rows = Array.from({ length: BARS + 2 }, () => makeBar(store, onPick));
  const legend = h("p", { class: "note legend" });
  const rest = h("p", { class: "note", "data-what": "kept" });
  let drawn = null;
  const update = () => {
    const { run, edited, state, token, shown } = store;
    const key = [run, edited, token, state.temperature, state.topK, state.topP];
    if (drawn && key.every((x, i) => x === drawn[i])) return;
    drawn = key;
    const settings = settingsOf(store);
    const now = new NextToken(shown, token, settings);
    const before = edited && new NextToken(run, token, settings);
    const ids = shownIds(now, before, run.ids[token + 1]);
    const most = Math.max(...ids.flatMap((id) => [now.raw(id), now.p(id), before?.p(id) ?? 0]));
    const scale = SCALES.find((x) => most <= x) ?? 1;
    rows.forEach((row, i) => row.update(i < ids.length ? { id: ids[i], now, before, scale, actual: run.ids[token + 1] } : null));
    put(legend, ...legendOf(before, scale));
    put(rest, ...restOf(now, ids));
  };
  return { element: h("div", {}, legend, h("ol", { class: "bars" }, ...rows.map(({ element }) => element)), rest), update };
}

/** The most probable tokens, that of the unchanged model, and the actual next one. */
function shownIds(now, before, actual) {
  const ids = [...now.top(BARS), ...(before?.top(1) ?? []), actual];
  return [...new Set(ids)].filter((id) => id !== undefined && now.has(id));
}

function legendOf(before, scale) {
  const sign = (name, text) => h("span", { class: `sign ${name}`, text });
  const signs = [sign("p", before ? "with edits" : "after the rules"), sign("raw", "before the rules"), before ? sign("before", "unchanged model") : null];
  return [...signs, h("span", { text: `full width: ${percent(scale)}` })];
}

/** How many tokens are kept, and what those without a bar hold. */
function restOf(now, ids) {
  const others = Math.max(0, 1 - ids.reduce((sum, id) => sum + now.p(id), 0));
  const named = now.ids === null ? "" : `, of which the ${now.ids.length} most probable are recorded by name`;
  const how = () => ({ formula: "1 − the probabilities of the tokens shown", filled: `1 − ${fmt(1 - others)} = ${fmt(others)}` });
  return [`Tokens kept: ${now.kept} of ${now.logits.length}${named}. All others than those shown: `, number(others, { what: "others" }, how, percent(others)), "."];
}

/** One bar, a button with its numbers beside it. It is updated in place, which keeps the focus. */
function makeBar(store, onPick) {
  let entry = null;
  const token = h("span", { class: "bar-token" });
  const bar = (name) => h("span", { class: name });
  const [raw, p, before, mark] = [bar("bar-raw"), bar("bar-p"), bar("bar-before"), h("span", { class: "bar-mark" })];
  const pick = h("button", { type: "button", class: "bar", on: { click: () => onPick(entry.id) } }, token, h("span", { class: "bar-track" }, raw, p, before, mark));
  const ruled = number(0, { what: "next" }, () => entry.now.explain(entry.id));
  const unchanged = number(0, { what: "next-unchanged" }, () => entry.before.explain(entry.id));
  const element = h("li", {}, pick, h("span", { class: "bar-numbers" }, ruled, unchanged));
  const update = (next) => {
    entry = next;
    element.hidden = entry === null;
    if (entry) draw();
  };
  const draw = () => {
    const { id, now, scale, actual } = entry;
    const [rawP, newP, oldP] = [now.raw(id), now.p(id), entry.before?.p(id)];
    const removed = now.removedBy(id);
    const width = (part, x) => part.style.setProperty("--width", `${(100 * Math.min(x / scale, 1)).toFixed(2)}%`);
    token.textContent = showToken(store.tokenizer.tokenText(id));
    width(raw, rawP);
    width(p, newP);
    width(before, oldP ?? 0);
    setNumber(raw, rawP, { what: "next-raw", id }, "");
    setNumber(ruled, newP, { id }, removed || percent(newP));
    unchanged.hidden = before.hidden = oldP === undefined;
    if (oldP !== undefined) setNumber(unchanged, oldP, { id }, entry.before.removedBy(id) || percent(oldP));
    mark.textContent = id === actual ? "actual" : "";
    element.classList.toggle("removed", removed !== "");
    pick.disabled = !store.living;
    pick.title = `Append token ${id}`;
    pick.setAttribute("aria-label", `${token.textContent}: ${removed ? `removed by ${removed}` : percent(newP)}${id === actual ? ", the actual next token" : ""}. Append it.`);
  };
  return { element, update };
}
