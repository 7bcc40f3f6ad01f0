// Text generated with the edits beside that of the unchanged model: the same seed, the same sampling rules.

import { h, letDraw, put } from "../dom.js";
import { makePicker, settingsOf } from "../distribution.js";
import { NO_EDITS } from "../edits.js";

const LENGTHS = [20, 40, 80, 160];

export function makeGenerated(store) {
  const [unchanged, edited] = [makeColumn(store, "Unchanged"), makeColumn(store, "With the edits")];
  const length = h("select", { id: "length", "aria-label": "Length" }, ...LENGTHS.map((n) => h("option", { value: n, text: `${n} tokens` })));
  const button = h("button", { type: "button", id: "generate", class: "primary", on: { click: () => (current?.running ? end("Stopped.") : start()) } });
  const status = h("span", { class: "note", role: "status", "aria-live": "polite", "data-what": "generation" });
  let current = null; // {inputs, running} of the texts that are shown
  const inputs = () => [store.run, store.edited, ...["temperature", "topK", "topP", "seed"].map((name) => store.state[name])];

  const end = (text) => {
    if (current) current.running = false;
    button.textContent = "Generate";
    status.textContent = text;
  };
  const clear = () => [unchanged, edited].forEach((column) => column.clear());
  const start = async () => {
    const job = (current = { inputs: inputs(), running: true });
    const wanted = () => current === job && job.running;
    const n = Number(length.value);
    clear();
    end("");
    job.running = true;
    button.textContent = "Stop";
    const texts = [generateInto(unchanged, store, NO_EDITS, "generate", n, wanted)];
    if (store.edited) texts.push(generateInto(edited, store, store.editsOf(store.state), "generate-edited", n, wanted));
    await Promise.all(texts);
    if (wanted()) end("Done.");
  };
  const update = () => {
    edited.element.hidden = store.edited === null;
    const room = store.config.n_positions - store.run.ids.length;
    button.disabled = room < 1;
    if (current && inputs().every((x, i) => x === current.inputs[i])) return;
    current = null;
    clear();
    end(room < 1 ? `The context of ${store.config.n_positions} tokens is full.` : "");
  };
  const say = "Continues the text with the temperature, top-k, top-p and seed of the next token. Tokens that differ are marked.";
  const element = h(
    "section",
    { class: "wide", "aria-label": "Generated text" },
    h("h3", { text: "Generated text" }),
    h("p", { class: "muted", text: say }),
    h("div", { class: "row" }, button, length, status),
    h("div", { class: "columns" }, unchanged.element, edited.element),
  );
  for (const [column, other] of [[unchanged, edited], [edited, unchanged]]) column.compareWith(other);
  return { element, update };
}

/** One text, token by token; those that differ from the other column's are marked. */
function makeColumn(store, title) {
  const text = h("p", { class: "generated", "data-what": "generated", "data-title": title });
  const tokens = []; // {id, element}
  let other = null;
  const add = (id) => {
    const element = h("span", { text: store.tokenizer.tokenText(id), "data-id": id });
    const beside = other.tokens[tokens.length];
    tokens.push({ id, element });
    text.append(element);
    if (beside && beside.id !== id) for (const one of [element, beside.element]) one.classList.add("differs");
  };
  const clear = () => {
    tokens.length = 0;
    put(text);
  };
  return { element: h("div", {}, h("h4", { text: title }), text), tokens, add, clear, compareWith: (column) => (other = column) };
}

/** Generate a text into a column until an end token, n tokens, a full context, or until it is not ``wanted()`` any more. */
async function generateInto(column, store, edits, lane, n, wanted) {
  const { run, tokenizer, model } = store;
  const choose = makePicker(settingsOf(store), run.ids.length);
  let last = null;
  const pick = (logits) => {
    if (!wanted() || tokenizer.ends.includes(last)) return null;
    return (last = choose(logits));
  };
  const add = (id) => {
    if (wanted()) column.add(id);
    return letDraw();
  };
  try {
    await model.generate(run.ids, n, pick, edits, add, lane);
  } catch (error) {
    if (error.name !== "Superseded") throw error;
  }
}
