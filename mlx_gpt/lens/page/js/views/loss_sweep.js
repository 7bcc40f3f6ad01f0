// How much the loss of the text rises without each head and each MLP alone, on request.

import { diverge, fmt, h, number, setNumber } from "../dom.js";
import { lossOf } from "../distribution.js";
import { withFactor } from "../edits.js";
import { makeSweep } from "./sweep.js";

/** The sweep of the model with its edits, which puts a number below the switch of each of the ``cells`` {part, td} (lens.ablate_heads). */
export function makeLossSweep(store, cells) {
  const shown = cells.map(({ part, td }) => lossCell(store, part, td));
  const found = new Map();
  return makeSweep({
    id: "sweep-parts",
    label: "Loss without each part",
    jobs: () => (store.run.ids.length > 1 ? shown : []),
    measure: async ({ part }) => {
      const { shown, state } = store;
      const edits = store.editsOf({ ...state, ...withFactor(state, part, 0) });
      return lossOf(await store.model.trace(shown.ids, { edits, lane: "sweep" })) - lossOf(shown);
    },
    show: (cell, rise) => {
      found.set(cell, rise);
      const most = Math.max(...[...found.values()].map(Math.abs), 1e-9);
      for (const [one, x] of found) one.show(x, most);
    },
    clear: () => {
      found.clear();
      for (const cell of shown) cell.show(null);
    },
    inputs: () => [store.shown],
  });
}

function lossCell(store, part, td) {
  const how = () => {
    const [loss, rise] = [lossOf(store.shown), Number(rise_.dataset.value)];
    return {
      formula: `loss without ${part.label} − loss`,
      filled: `${fmt(loss + rise)} − ${fmt(loss)} = ${fmt(rise)}`,
      note: `${store.edited ? "Both with the other edits. " : ""}Loss: mean of −log p(next token) over the text, in nats.`,
    };
  };
  const rise_ = number(0, { what: "ablated", kind: part.kind, name: part.name }, how, "");
  td.append(rise_);
  const show = (rise, most) => {
    rise_.hidden = rise === null;
    if (rise !== null) setNumber(rise_, rise, {}, `${rise > 0 ? "+" : ""}${fmt(rise)}`);
    td.style.background = rise === null ? "" : diverge((-0.6 * rise) / most); // a part that the text needs in the colour of a loss
  };
  show(null);
  return { part, show };
}
