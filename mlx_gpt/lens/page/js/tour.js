// The guided tour: the explanation of attention in eight steps, told with the numbers of this model and this text.

import { h, put, fmt, percent, showToken } from "./dom.js";

/** Each step: title, the state that it sets, and what it says. ``look`` is a query, a key and a head worth showing. */
const STEPS = [
  {
    title: "A text becomes numbers",
    state: () => ({ view: "stream" }),
    say: ({ tokens, ids, store }) =>
      `The model reads ${tokens.length} tokens, pieces of text that it knows by number: ${quote(tokens[0])} is ${ids[0]}. ` +
      `Each number fetches a vector of ${store.config.n_embd} numbers, its embedding; a second vector, for the position, is added. ` +
      "This sum starts the residual stream, the line that runs through the whole model.",
  },
  {
    title: "Queries ask, keys answer",
    state: ({ look }) => ({ view: "head", ...look.state, step: 0 }),
    say: ({ look, tokens }) =>
      `In head ${look.head} of layer ${look.layer}, every token sends out a query, what it looks for, and a key, what it can be found by. ` +
      `The query of ${quote(tokens[look.query])} meets the key of ${quote(tokens[look.key])}: their dot product, ` +
      "divided by the square root of the head's width, is the score.",
  },
  {
    title: "The mask hides the future",
    state: ({ look }) => ({ view: "head", ...look.state, step: 2 }),
    say: ({ tokens, look }) =>
      `${quote(tokens[look.query])} may look at itself and at the ${look.query} tokens before it. The scores of later tokens become −∞, ` +
      "so that the model cannot learn to copy the word that it has to predict.",
  },
  {
    title: "The pattern weighs",
    state: ({ look }) => ({ view: "attention", ...look.state }),
    say: ({ tokens, look }) =>
      `Softmax turns each row of scores into weights that sum to 1. Here ${quote(tokens[look.query])} gives ${percent(look.weight)} ` +
      `of its attention to ${quote(tokens[look.key])}. Point at a token to see where it looks, in all heads at once.`,
  },
  {
    title: "Values move",
    state: ({ look }) => ({ view: "head", ...look.state, step: 4 }),
    say: ({ tokens, look }) =>
      `What is moved is the value, a third vector of each token. ${quote(tokens[look.query])} receives the values weighted by its row of the pattern` +
      `${look.norm === null ? "" : `, and the head adds a vector of length ${fmt(look.norm)} to its residual stream`}.`,
  },
  {
    title: "Many heads, many blocks",
    state: () => ({ view: "attention" }),
    say: ({ store }) =>
      `Each of the ${store.config.n_layer} layers has ${store.config.n_head} heads that look for different things, and an MLP that works on each token alone. ` +
      "All of them read from the residual stream and add to it. The arrow keys step through heads and layers.",
  },
  {
    title: "A prediction takes shape",
    state: () => ({ view: "lens", token: null }),
    say: ({ tokens, store }) =>
      `If the model stopped after an early layer, what would it say next? The logit lens shows it for each layer and token. ` +
      `At the end of the last row, after ${quote(tokens.at(-1))}, stands the prediction: ${quote(top(store).text)} with ${percent(top(store).p)}.`,
  },
  {
    title: "Now change something",
    state: ({ look }) => ({ view: "change", layer: look.layer, head: look.head, token: null }),
    say: ({ store }) =>
      "The bars show the next token: temperature sharpens or flattens them, top-k and top-p cut them off. " +
      (store.living
        ? "Knock out a head, and compare the text that the model writes with and without it. Then type your own."
        : "This page was recorded; one made for a model of up to about 3 million parameters also lets you knock out heads and type your own text."),
  },
];
export const TOUR_LENGTH = STEPS.length;

export function makeTour(store) {
  const start = h("button", { type: "button", class: "tour-start", text: "Guided tour", on: { click: () => goTo(store, 0) } });
  const panel = h("section", { class: "tour", "aria-label": "Guided tour", "aria-live": "polite" });
  let drawn = "";
  const update = () => {
    const step = store.state.tour;
    start.hidden = step !== null;
    panel.hidden = step === null || store.run === null;
    if (panel.hidden) return;
    const facts = factsOf(store);
    const text = STEPS[step].say(facts);
    if (drawn === `${step} ${text}`) return; // keeps the focus, and does not read the same again
    drawn = `${step} ${text}`;
    const focused = panel.contains(document.activeElement) ? document.activeElement.dataset.go : null;
    put(panel, h("h2", { text: `${step + 1}. ${STEPS[step].title}` }), h("p", { "data-what": "tour", text }), buttons(store, step));
    if (focused) (panel.querySelector(`[data-go="${focused}"]:enabled`) ?? panel.querySelector("button:enabled")).focus();
  };
  return { start, element: panel, update };
}

function buttons(store, step) {
  const button = (go, text, target, primary) =>
    h("button", {
      type: "button", "data-go": go, text, class: primary ? "primary" : null, disabled: target === undefined,
      on: { click: () => goTo(store, target) },
    });
  const last = step === STEPS.length - 1;
  return h(
    "div",
    { class: "row" },
    button("back", "Back", step > 0 ? step - 1 : undefined),
    button("next", last ? "Finish" : "Next", last ? null : step + 1, true),
    last ? null : button("end", "End the tour", null),
    h("span", { class: "muted", text: `step ${step + 1} of ${STEPS.length}` }),
  );
}

/** Go to a step, which chooses the view, head and token that it speaks of; null ends the tour. */
function goTo(store, step) {
  store.set(step === null ? { tour: null } : { tour: step, ...(store.run ? STEPS[step].state(factsOf(store)) : {}) });
}

function factsOf(store) {
  const ids = [...store.run.ids];
  return { store, ids, tokens: ids.map((id, position) => store.tokenAt(position)), look: worthALook(store) };
}

/** The query, key and head with the largest weight on an earlier token that is not the first one, where many heads rest. */
function worthALook(store) {
  const { run, config } = store;
  const T = run.ids.length;
  let best = { weight: -1, layer: 0, head: 0, query: T - 1, key: T - 1 };
  for (let layer = 0; layer < config.n_layer; layer++) {
    const { data } = run.get(`blocks.${layer}.attn.hook_pattern`);
    for (let head = 0; head < config.n_head; head++) {
      for (let query = Math.min(2, T - 1); query < T; query++) {
        for (let key = Math.min(1, query); key < Math.max(query - 1, 1); key++) {
          const weight = data[(head * T + query) * T + key];
          if (weight > best.weight) best = { weight, layer, head, query, key };
        }
      }
    }
  }
  const state = { layer: best.layer, head: best.head, token: best.query, key: best.key };
  return { ...best, weight: Math.max(best.weight, 0), state, norm: normOfResult(run, best) };
}

/** Length of the vector that a head adds to a token; null where it is not recorded. */
function normOfResult(run, { layer, head, query }) {
  const result = run.get(`blocks.${layer}.attn.hook_result`);
  if (!result) return null;
  const [, H, C] = result.shape;
  const start = (query * H + head) * C;
  return Math.hypot(...result.data.subarray(start, start + C));
}

/** The most probable next token after the text. */
function top(store) {
  const [{ id, probability }] = store.run.next(store.run.ids.length - 1, 1);
  return { text: store.tokenizer.tokenText(id), p: probability };
}

function quote(token) {
  return `“${showToken(token)}”`;
}
