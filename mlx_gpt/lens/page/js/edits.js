// The edits of a state: in words, and changed by one factor.

import { fmt } from "./dom.js";

export const NO_EDITS = { heads: {}, mlps: {}, patch: null };

/** The parts that a factor can scale, by layer: heads, then the MLP. ``kind`` is the state's field, ``name`` its key. */
export function partsOf({ n_layer, n_head }) {
  return Array.from({ length: n_layer }, (_, layer) => [
    ...Array.from({ length: n_head }, (_, head) => ({ kind: "heads", name: `${layer}.${head}`, layer, head, label: `L${layer}H${head}` })),
    { kind: "mlps", name: String(layer), layer, head: null, label: `MLP ${layer}` },
  ]);
}

export function factorOf(state, { kind, name }) {
  return state[kind][name] ?? 1;
}

/** The change of a state that gives a part a factor; a factor of 1 is no edit. */
export function withFactor(state, { kind, name }, factor) {
  const factors = { ...state[kind], [name]: factor };
  if (factor === 1) delete factors[name];
  return { [kind]: factors };
}

/** "L3H1 knocked out, MLP 2 × 0.5", or "" for none. */
export function describeEdits({ heads, mlps, patch }) {
  const factor = (label) => ([name, x]) => `${label(name)} ${x === 0 ? "knocked out" : `× ${fmt(x)}`}`;
  const edits = [...Object.entries(heads).map(factor((name) => `L${name.replace(".", "H")}`)), ...Object.entries(mlps).map(factor((name) => `MLP ${name}`))];
  if (patch) edits.push(`layer ${patch.layer} patched at position ${patch.position}`);
  return edits.join(", ");
}
