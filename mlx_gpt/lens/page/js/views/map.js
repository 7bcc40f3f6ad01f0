// The map: the architecture as Python drew it, where one chooses a layer, a head or a view.

import { h } from "../dom.js";

// The view that shows a component, by the end of its name in the diagram.
const VIEWS_OF = { tokens: "stream", embed: "stream", pos_embed: "stream", ln1: "stream", attn: "attention", ln2: "stream", mlp: "stream", ln_final: "lens", unembed: "lens" };

export function makeMapView(store) {
  const map = document.importNode(document.getElementById("page-map").content, true).querySelector("svg");
  const note = h("p", { class: "muted", text: "Choose a layer, one of its heads, or the heading of a part to see what it computes." });
  if (!map) return { id: "map", title: "Map", element: note, update() {} };
  map.setAttribute("role", "group");
  map.querySelectorAll("a").forEach((link) => link.removeAttribute("href")); // the code is not beside the page
  const rows = [...map.querySelectorAll('[data-part="blocks"] [data-part]')];
  const heads = [...map.querySelectorAll("g[data-part*='.attn.head.']")].filter((group) => !group.querySelector("a"));
  rows.forEach((row, layer) => press(row, `Layer ${layer}`, () => store.set({ layer })));
  heads.forEach((group, head) => press(group, `Head ${head}`, () => store.set({ head, view: "head" })));
  for (const part of map.querySelectorAll("[data-part]")) {
    const name = part.dataset.part.includes(".attn.head.") ? "head" : part.dataset.part.split(".").at(-1);
    const heading = part.querySelector(":scope > a > text");
    const view = name === "head" ? "head" : VIEWS_OF[name];
    if (view && heading) press(heading, `${heading.textContent}: open the view`, () => store.set({ view }));
  }
  const names = [...map.querySelectorAll("text, title")].filter((node) => !node.closest('[data-part="blocks"]'));
  const [zoom] = map.querySelectorAll(".d-zoom");
  const update = () => {
    const { layer, head } = store.state;
    for (const node of names) node.textContent = renamed(node.textContent, layer, head);
    mark(rows, layer, "d-outline d-stream", "d-frame");
    mark(heads, head, "d-outline d-value", "d-frame");
    follow(zoom, rows[layer].querySelector("rect"));
  };
  return { id: "map", title: "Map", element: h("div", {}, note, h("div", { class: "scroll map" }, map)), update };
}

/** Make an element a button. */
function press(element, name, act) {
  for (const [attribute, value] of Object.entries({ role: "button", tabindex: 0, "aria-label": name })) element.setAttribute(attribute, value);
  element.addEventListener("click", act);
  element.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    act();
  });
}

/** A text of the opened block and head, for another block and head: all have the same shapes. */
function renamed(text, layer, head) {
  return text
    .replace(/\b(h|blocks)\.\d+/g, `$1.${layer}`)
    .replace(/\bBlock \d+/g, `Block ${layer}`)
    .replace(/\b([Hh]ead) \d+/g, `$1 ${head}`);
}

function mark(groups, chosen, on, off) {
  groups.forEach((group, i) => {
    group.querySelector("rect").setAttribute("class", i === chosen ? on : off);
    group.setAttribute("aria-pressed", i === chosen);
  });
}

/** Move the end of a zoom to a row. */
function follow(zoom, row) {
  const [top, height] = ["y", "height"].map((name) => Number(row.getAttribute(name)));
  const path = zoom.getAttribute("d").replace(/^(M[\d.]+ )[\d.]+/, `$1${top}`).replace(/[\d.]+z$/, `${top + height}z`);
  zoom.setAttribute("d", path);
}
