// The diagram of the architecture (lens/diagram) as a map: its boxes lead to the components and activations of the run.

import { h } from "../dom.js";
import { isActivation, wayTo } from "../places.js";

const SCALE = 1.15; // at most, of the diagram's own size

/** The map. ``go(place)`` is called when a box is chosen; ``update(place)`` shows a place of the state's layer and head. */
export function makeDiagram(store, go) {
  const parsed = new DOMParser().parseFromString(store.diagram, "image/svg+xml").documentElement;
  const drawing = document.importNode(parsed, true);
  const whole = drawing.getAttribute("viewBox");
  drawing.setAttribute("role", "group");
  const rows = [...drawing.querySelectorAll('[data-part="blocks"] [data-part]')];
  const heads = [...drawing.querySelectorAll('g[data-part*=".attn.head."]')].filter((group) => !group.querySelector("a"));
  const boxes = [...drawing.querySelectorAll('[data-activation*="hook_"]')];
  const names = [...drawing.querySelectorAll("text, title")].filter((node) => !node.closest('[data-part="blocks"]'));
  const here = (name) => inLayer(name, store.state.layer);

  drawing.querySelectorAll("a").forEach((link) => link.removeAttribute("href")); // the code is not beside the page
  rows.forEach((row, layer) => press(row, `Block ${layer}`, () => go(`blocks.${layer}`)));
  heads.forEach((group, head) => press(group, `Head ${head}`, () => go(`${here("blocks.0")}.attn.head.${head}`)));
  boxes.forEach((box) => press(box, box.dataset.activation.replace("blocks.0.", ""), () => go(here(box.dataset.activation))));
  for (const part of drawing.querySelectorAll("[data-part]")) {
    const heading = part.querySelector(":scope > a > text");
    const place = part.dataset.part.replace(/^(blocks|tokens)$/, "").replace(/head\.0$/, "head");
    const chosen = () => (place.endsWith(".head") ? `.${store.state.head}` : "");
    if (heading) press(heading, heading.textContent, () => go(here(place) + chosen()));
  }

  const element = h("div", { class: "map" }, drawing);
  const update = (place) => {
    const { layer, head } = store.state;
    for (const node of names) node.textContent = renamed(node.textContent, layer, head);
    markChosen(rows, layer, "d-outline d-stream");
    markChosen(heads, head, "d-outline d-value");
    followRow(drawing.querySelector(".d-zoom"), rows[layer].querySelector("rect"));
    for (const box of boxes) {
      box.classList.toggle("chosen", here(box.dataset.activation) === place);
      showShape(box, store, here(box.dataset.activation));
    }
    showShape(drawing.querySelector('[data-activation="tokens"]'), store, "tokens");
    const part = partAt(drawing, place, head, element.parentNode.clientWidth)?.getBBox();
    const view = part ? [part.x - 6, part.y - 6, part.width + 12, part.height + 12].join(" ") : whole;
    drawing.setAttribute("viewBox", view);
    element.style.setProperty("--width", `${Number(view.split(" ")[2]) * SCALE}px`);
  };
  return { element, update };
}

/** Make an element a button. */
function press(element, name, act) {
  const attributes = { role: "button", tabindex: 0, "aria-label": name };
  for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
  element.addEventListener("click", act);
  element.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    act();
  });
}

/** The name in another layer than 0, which is drawn; q, k and v read what their norm gives. */
function inLayer(name, layer) {
  return name.replace(/^blocks\.0\b/, `blocks.${layer}`).replace(/attn\.[qkv]\.hook_in$/, "ln1.hook_out");
}

/** A text of the opened block and head, for another block and head: all have the same shapes. */
function renamed(text, layer, head) {
  return text
    .replace(/\b(h|blocks)\.\d+/g, `$1.${layer}`)
    .replace(/\bBlock \d+/g, `Block ${layer}`)
    .replace(/\b([Hh]ead) \d+/g, `$1 ${head}`);
}

function markChosen(groups, chosen, look) {
  groups.forEach((group, i) => {
    group.querySelector("rect").setAttribute("class", i === chosen ? look : "d-frame");
    group.setAttribute("aria-pressed", i === chosen);
  });
}

/** Move the end of a zoom to a row. */
function followRow(zoom, row) {
  const [top, height] = ["y", "height"].map((name) => Number(row.getAttribute(name)));
  const path = zoom.getAttribute("d").replace(/^(M[\d.]+ )[\d.]+/, `$1${top}`).replace(/[\d.]+z$/, `${top + height}z`);
  zoom.setAttribute("d", path);
}

/** The part of the drawing that shows a place; null for all of it, where there is room. */
function partAt(drawing, place, head, width) {
  const part = (name) => [...drawing.querySelectorAll(`[data-part="${name}"]`)].at(-1);
  const component = wayTo(place, head).filter((step) => !isActivation(step)).at(-1);
  if (component === "") return width < 900 ? part("tokens").parentNode : null;
  return part(component.replace(/^blocks\.\d+/, "blocks.0").replace(/head\.\d+$/, "head.0")) ?? null;
}

/** Write an activation's shape in this run into its box. */
function showShape(box, { shown: run, living }, name) {
  const drawn = box.dataset.shape.split(",").slice(1); // without the axis of the batch
  const shape = living && run.names.includes(name) ? run.get(name).shape : [run.ids.length, ...drawn.slice(1)];
  [...box.querySelectorAll("text")].at(-1).textContent = shape.join("×");
}
