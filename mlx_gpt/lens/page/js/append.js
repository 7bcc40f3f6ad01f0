// Appending a token to the text. The text is what the page keeps, so it is split into tokens anew each time.

import { showToken } from "./dom.js";
import { NextToken, makePicker, randomAfter, settingsOf } from "./distribution.js";

/** Append tokens after the selected one, drop what follows it, and undo that. Each action returns what it did. */
export function makeAppender(store) {
  const undone = []; // {text, token, after} of each action
  const next = () => new NextToken(store.shown, store.token, settingsOf(store));

  const append = (id, how = "Appended") => {
    if (store.busy || reasonAgainst()) return reasonAgainst();
    const { text, same } = continued(store, store.token, id);
    if (text === null) return `${showToken(store.tokenizer.tokenText(id))} is only a part of a character and cannot stand in a text; choose another, or a new seed.`;
    undone.push({ text: store.state.text, token: store.state.token, after: text });
    store.set({ text, token: null });
    return `${how} ${showToken(store.tokenizer.tokenText(id))}${same ? "" : "; the new text is split into other tokens"}.`;
  };

  const sample = () => {
    const { settings, logits } = next();
    const n = store.token + 1;
    const random = randomAfter(settings.seed, n)().toFixed(3);
    return append(makePicker(settings, n)(logits), `The random number ${random} gives`);
  };

  const undo = () => {
    const { text, token } = undone.pop();
    store.set({ text, token });
    return "The text is as before.";
  };

  const reasonAgainst = () => {
    if (!store.living) return "A recorded page cannot read a longer text, so no token can be appended.";
    const n = store.config.n_positions;
    return store.token + 1 >= n ? `The context of ${n} tokens is full: no token can be appended.` : "";
  };

  const appendBest = () => append(next().top(1)[0]);
  const canUndo = () => undone.length > 0 && undone.at(-1).after === store.state.text;
  return { append, appendBest, sample, undo, canUndo, reasonAgainst };
}

/** The text up to a position with a token appended; text is null where the token is only a part of a character.
 *  ``same`` is false where the new text is split into other tokens. */
export function continued(store, position, id) {
  const { tokenizer, state } = store;
  const piece = tokenizer.decode([id]);
  if (piece.includes("\ufffd")) return { text: null, same: false };
  const ids = tokenizer.encode(state.text);
  const rest = tokenizer.decode(ids.slice(position + 1));
  const whole = state.text.endsWith(rest); // not where the position divides a character
  const kept = whole ? state.text.slice(0, state.text.length - rest.length) : tokenizer.decode(ids.slice(0, position + 1));
  const again = tokenizer.encode(kept + piece);
  const same = again.length === position + 2 && [...ids.slice(0, position + 1), id].every((x, i) => x === again[i]);
  return { text: kept + piece, same };
}
