// One head in six steps, from the query and the keys of a token to what the head adds to its residual stream.

import { onTheme } from "../canvas.js";
import { closePopover, fmt, h, put, showToken } from "../dom.js";
import { patternOf, quoted, scoresOf, strongestKey, vectorOf } from "../heads.js";
import { additionStep } from "./head_addition.js";
import { maskStep, productStep, scaleStep, softmaxStep, valueStep } from "./head_steps.js";

/** Steps: {title, show(store, at) -> elements, ofKey: whether it shows one key}. */
const HEAD_STEPS = [
  { title: "Queries ask, keys answer", show: productStep, ofKey: true },
  { title: "Scale", show: scaleStep, ofKey: true },
  { title: "Mask", show: maskStep },
  { title: "The pattern weighs", show: softmaxStep },
  { title: "Values move", show: valueStep },
  { title: "The head adds to the residual stream", show: additionStep },
];

export function makeHeadView(store) {
  const title = h("p", { "aria-live": "polite", "data-what": "read-head" });
  const controls = makeControls(store);
  const steps = HEAD_STEPS.map(({ title }) => ({
    content: h("div", { class: "step-content" }),
    title: h("h3", { tabindex: "-1", text: title }),
  }));
  const items = steps.map((step) => h("li", {}, step.title, step.content));
  const stepper = makeStepper(store, items, (i) => steps[i].title.focus({ preventScroll: true }));
  const element = h(
    "div",
    {},
    h("h2", { text: "One head" }),
    title,
    controls.element,
    stepper.element,
    h("ol", { class: "steps" }, ...items),
  );
  let shown = {};

  const update = () => {
    const at = readHead(store);
    stepper.update();
    const same = (name) => at[name] === shown[name];
    const sameQuery = ["run", "layer", "head", "query"].every(same);
    const { key } = store.state;
    at.key = key !== null && key <= at.query ? key : strongestKey(at.pattern, at.T, at.query);
    const before = shown;
    shown = at;
    if (sameQuery && at.key === before.key) return markKey(element, store.hover.key);
    closePopover();
    HEAD_STEPS.forEach(({ ofKey, show }, i) => (!sameQuery || ofKey) && put(steps[i].content, ...show(store, at)));
    controls.update(at);
    const place = `${quoted(store, at.query)} at position ${at.query}`;
    if (!sameQuery) title.textContent = `Layer ${at.layer}, head ${at.head}${scaled(at)}, read by ${place}.`;
  };
  onTheme(() => {
    const drawn = shown.run;
    shown = {};
    if (drawn) update();
  });
  return { id: "head", title: "One head", element, update };
}

/** What the steps show: a head, the selected token as its query, and its vectors; null for those that are not recorded. */
function readHead(store) {
  const { layer, head } = store.state;
  const run = store.shown;
  const query = Math.min(store.token, run.ids.length - 1);
  const [q, z, result] = ["q", "z", "result"].map((name) => vectorOf(run, layer, head, name, query));
  const of = (name) => (key) => vectorOf(run, layer, head, name, key);
  const factor = run.edits.heads?.[`${layer}.${head}`] ?? 1;
  const [pattern, scores] = [patternOf(run, layer, head), scoresOf(run, layer, head)];
  return { run, layer, head, query, T: run.ids.length, pattern, scores, q, z, result, k: of("k"), v: of("v"), factor };
}

function scaled({ factor }) {
  return factor === 1 ? "" : factor === 0 ? ", knocked out" : `, scaled by ${fmt(factor)}`;
}

/** Mark the rows of the key that is pointed at. */
function markKey(element, key) {
  for (const row of element.querySelectorAll("tr[data-key]"))
    row.classList.toggle("pointed", Number(row.dataset.key) === key);
}

/** Choices of layer, head and key. */
function makeControls(store) {
  const { n_layer: L, n_head: H } = store.config;
  const numbers = (n) => Array.from({ length: n }, (_, i) => h("option", { value: i, text: i }));
  const select = (label, id, options, choose) => {
    const input = h("select", { id, on: { change: () => choose(Number(input.value)) } }, ...options);
    return { input, element: h("label", { class: "choice", for: id }, label, input) };
  };
  const layer = select("Layer", "head-layer", numbers(L), (value) => store.set({ layer: value }));
  const head = select("Head", "head-head", numbers(H), (value) => store.set({ head: value }));
  const key = select("Key", "head-key", [], (value) => store.set({ key: value }));
  let listed = {};
  const update = (at) => {
    layer.input.value = at.layer;
    head.input.value = at.head;
    if (listed.run !== at.run || listed.query !== at.query) {
      listed = at;
      const keys = Array.from({ length: at.query + 1 }, (_, i) =>
        h("option", { value: i, text: `${i} ${showToken(store.tokenAt(i))}` }),
      );
      put(key.input, ...keys);
    }
    key.input.value = at.key;
  };
  return { element: h("div", { class: "row" }, layer.element, head.element, key.element), update };
}

/** Buttons that go through the items of a list, the steps; all are shown, and the present one is marked. */
function makeStepper(store, items, onStep) {
  const place = h("span", { class: "muted", role: "status" });
  const button = (text, by) => h("button", { type: "button", text, on: { click: () => go(store.state.step + by) } });
  const [back, next] = [button("Previous step", -1), button("Next step", 1)];
  let marked = null;
  const update = () => {
    const { step } = store.state;
    if (step === marked) return;
    items.forEach((item, i) =>
      i === step ? item.setAttribute("aria-current", "step") : item.removeAttribute("aria-current"),
    );
    [back.disabled, next.disabled] = [step === 0, step === items.length - 1];
    place.textContent = `Step ${step + 1} of ${items.length}`;
    if (marked !== null) items[step].scrollIntoView({ block: "nearest" });
    marked = step;
  };
  const go = (step) => {
    store.set({ step });
    onStep(step);
  };
  return { element: h("div", { class: "row stepper" }, back, next, place), update };
}
