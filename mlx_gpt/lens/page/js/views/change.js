// Change the model: knock out and scale parts of it, patch it from a second text, and see what becomes of the text.

import { h } from "../dom.js";
import { makeEditGrid } from "./edit_grid.js";
import { makeEffect } from "./effect.js";
import { makeGenerated } from "./generated.js";
import { makePatch } from "./patch.js";

export function makeChangeView(store) {
  if (!store.living) return { id: "change", title: "Change", element: insteadOfChanges(store), update() {} };
  const parts = [makeEditGrid, makeEffect, makeGenerated, makePatch].map((make) => make(store));
  const element = h("div", { class: "change", role: "group", "aria-label": "Changes of the model" }, ...parts.map((part) => part.element));
  const update = () => parts.forEach((part) => part.update());
  return { id: "change", title: "Change", element, update };
}

/** Why a recorded page changes nothing, and the views that show what its parts do. */
function insteadOfChanges(store) {
  const go = (view, text, what) => h("li", {}, h("button", { type: "button", text, on: { click: () => store.set({ view }) } }), ` ${what}`);
  return h(
    "div",
    {},
    h("p", { text: "Changing the model needs a living page: a recorded one shows what was traced and cannot run the model. It still shows:" }),
    h(
      "ul",
      { class: "instead" },
      go("stream", "Residual stream", "what each head and each MLP adds to the logit of a token"),
      go("lens", "Logit lens", "the layer at which a prediction appears"),
      store.texts.length > 1 ? go("compare", "Compare", "two of the recorded texts beside each other") : null,
    ),
  );
}
