// The places of a model, from the stack to an activation: a place is the name of a component or of an activation.

const OF_BLOCK = ["hook_resid_pre", "ln1", "attn", "hook_resid_mid", "ln2", "mlp", "hook_resid_post"];
const OF_HEAD = ["hook_q", "hook_k", "hook_v", "hook_attn_scores", "hook_pattern", "hook_z", "hook_result"];
const OF_NORM = ["hook_scale", "hook_normalized", "hook_out"];
const TITLES = {
  "": "Stack", embed: "Token embedding", pos_embed: "Position embedding", ln_final: "Final norm", unembed: "Unembedding",
  ln1: "Norm before attention", attn: "Attention", ln2: "Norm before MLP", mlp: "MLP",
};

/** The places that a place consists of. */
export function partsOfPlace(place, { n_layer, n_head }) {
  const list = (n, name) => Array.from({ length: n }, (_, i) => `${name}.${i}`);
  const block = place.match(/^blocks\.\d+/)?.[0];
  if (place === "") return ["embed", "pos_embed", ...list(n_layer, "blocks"), "ln_final", "unembed"];
  if (["embed", "pos_embed", "unembed"].includes(place)) return [`hook_${place}`];
  if (place === block) return OF_BLOCK.map((name) => `${block}.${name}`);
  if (/(ln1|ln2|ln_final)$/.test(place)) return OF_NORM.map((name) => `${place}.${name}`);
  if (place.endsWith(".attn")) return [...list(n_head, `${place}.head`), `${block}.hook_attn_out`];
  if (place.includes(".head.")) return OF_HEAD.map((name) => `${block}.attn.${name}`);
  if (place.endsWith(".mlp")) return [`${place}.hook_pre`, `${place}.hook_post`, `${block}.hook_mlp_out`];
  return [];
}

/** Where a place is: the places around it, from the stack on, and itself. ``head`` is the chosen one. */
export function wayTo(place, head) {
  const around = placeAround(place, head);
  return around === null ? [place] : [...wayTo(around, head), place];
}

function placeAround(place, head) {
  const block = place.match(/^blocks\.\d+/)?.[0];
  if (place === "") return null;
  if (place === "hook_embed" || place === "hook_pos_embed" || place === "hook_unembed") return place.slice(5);
  if (place.startsWith("ln_final.")) return "ln_final";
  if (!block || place === block) return "";
  if (place.includes(".head.")) return `${block}.attn`;
  if (place.endsWith("hook_attn_out")) return `${block}.attn`;
  if (place.endsWith("hook_mlp_out")) return `${block}.mlp`;
  if (place.includes(".attn.hook_")) return `${block}.attn.head.${head}`;
  const component = place.match(/^(blocks\.\d+\.(?:ln1|ln2|mlp))\./)?.[1];
  return component ?? block;
}

export function isActivation(place) {
  return /(^|\.)hook_\w+$/.test(place);
}

export function titleOfPlace(place) {
  if (isActivation(place)) return place.split(".").at(-1);
  const [, kind, i] = place.match(/(blocks|head)\.(\d+)$/) ?? [];
  if (kind) return `${kind === "head" ? "Head" : "Block"} ${i}`;
  return TITLES[place.split(".").at(-1)] ?? place;
}

/** Every place of a model, as a list. */
export function allPlaces(config, place = "") {
  return [place, ...partsOfPlace(place, config).flatMap((part) => allPlaces(config, part))];
}

/** The activation that a place gives to the residual stream or to what follows it, and the head if it is one. */
export function outputOf(place) {
  const block = place.match(/^blocks\.\d+/)?.[0];
  if (isActivation(place)) return place;
  if (place.includes(".head.")) return `${block}.attn.hook_result`;
  if (place === block) return `${block}.hook_resid_post`;
  if (place.endsWith(".attn") || place.endsWith(".mlp")) return `${block}.hook_${place.split(".").at(-1)}_out`;
  return place.includes("ln") ? `${place}.hook_out` : `hook_${place}`;
}
