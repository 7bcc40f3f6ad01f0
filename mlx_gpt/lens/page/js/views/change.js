// Change the model: knock out and scale parts of it, patch it from a second text, and see what becomes of the text.

import { h } from "../dom.js";
import { makeEditGrid } from "./edit_grid.js";
import { makeEffect } from "./effect.js";
import { makeGenerated } from "./generated.js";
import { makePatch } from "./patch.js";

export function makeChangeView(store) {
  const note = store.living ? null : h("p", { class: "note", text: "This needs a living page: a recorded one cannot run the model with a change." });
  const parts = [makeEditGrid, makeEffect, makeGenerated, makePatch].map((make) => make(store));
  const controls = h("fieldset", { class: "change", "aria-label": "Changes of the model", disabled: !store.living }, ...parts.map(({ element }) => element));
  const update = () => parts.forEach((part) => part.update());
  return { id: "change", title: "Change", element: h("div", {}, note, controls), update };
}
