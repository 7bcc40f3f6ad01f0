// The diagram of the architecture (lens/diagram) as a map: its boxes lead to the components and activations of the run.

import { h } from "../dom.js";
import { isActivation, wayTo } from "../places.js";

const SCALE = 1.15; // at most, of the diagram's own size

/** The map. ``go(place)`` is called when a box is chosen; ``update(place)`` shows a place of the state's layer and head. */
export function makeDiagram(store, go) {
  if (!store.diagram) return { element: h("div"), update() {} };
  const parsed = new DOMParser().parseFromString(store.diagram, "image/svg+xml").documentElement;
  const drawing = document.importNode(parsed, true);
  const texts = [...drawing.querySelectorAll("text")].filter((text) => !text.closest('[data-part="blocks"]')).map((text) => ({ text, original: text.textContent }));
  const whole = drawing.getAttribute("viewBox");
  drawing.setAttribute("role", "group");
  for (const link of drawing.querySelectorAll("a")) makeBox(link, store, go);
  const element = h("div", { class: "map" }, drawing);
  const update = (place) => {
    const { layer, head } = store.state;
    for (const { text, original } of texts) text.textContent = original.replace(/\b(Block |h\.|blocks\.)0\b/g, `$1${layer}`).replace(/^Head 0/, `Head ${head}`);
    const box = boxOf(drawing, place, head, element.parentNode.clientWidth);
    drawing.setAttribute("viewBox", box ? [box.x - 6, box.y - 6, box.width + 12, box.height + 12].join(" ") : whole);
    element.style.setProperty("--width", `${Number(drawing.getAttribute("viewBox").split(" ")[2]) * SCALE}px`);
    for (const link of drawing.querySelectorAll("[data-activation]")) link.classList.toggle("chosen", named(link.dataset.activation, layer) === place);
    showShapes(drawing, store);
  };
  return { element, update };
}

/** Turn a link to code into a box that is clicked, or leave it as it is: parameters have no place in a run. */
function makeBox(link, store, go) {
  link.removeAttribute("href");
  const component = link.closest("[data-part]")?.dataset.part ?? "";
  const place = () => {
    const { layer, head } = store.state;
    const part = link.querySelector("[data-part]")?.dataset.part ?? component;
    if (link.dataset.activation) return named(link.dataset.activation, layer);
    if (/^blocks\.\d+$/.test(part) && link.querySelector("[data-part]")) return part;
    return named(part === "blocks" ? "" : part, layer).replace(/head\.0$/, `head.${link.querySelector("[data-part]") ? 0 : head}`);
  };
  if (link.dataset.parameter || ["mask", "tokens"].includes(link.dataset.activation) || component === "tokens" || place().includes("…")) return;
  link.setAttribute("role", "button");
  link.setAttribute("tabindex", "0");
  link.classList.add("box");
  link.addEventListener("click", () => go(place()));
  link.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    go(place());
  });
}

/** The name in another layer: the diagram opens layer 0; q, k and v read what their norm gives. */
function named(name, layer) {
  return name.replace(/^blocks\.0\b/, `blocks.${layer}`).replace(/attn\.[qkv]\.hook_in$/, "ln1.hook_out");
}

/** The part of the drawing that shows a place; null for all of it. */
function boxOf(drawing, place, head, width) {
  const part = (name) => [...drawing.querySelectorAll(`[data-part="${name}"]`)].at(-1);
  const way = wayTo(place, head).filter((step) => !isActivation(step));
  const name = way.at(-1).replace(/^blocks\.\d+/, "blocks.0").replace(/head\.\d+$/, "head.0");
  if (name === "") return width < 900 ? part("tokens").parentNode.getBBox() : null;
  return part(name)?.getBBox() ?? null;
}

/** Write the shapes of this run into the boxes. */
function showShapes(drawing, { shown: run, living, state }) {
  for (const link of drawing.querySelectorAll("[data-activation]")) {
    const name = named(link.dataset.activation, state.layer);
    const shape = living && run.names.includes(name) ? run.get(name).shape : shapeAt(link.dataset.shape, run.ids.length);
    const label = [...link.querySelectorAll("text")].at(-1);
    if (label && link.dataset.activation !== "mask") label.textContent = shape.join("×");
  }
}

/** A shape without the axis of the batch: the first axis of tokens has the text's length. */
function shapeAt(text, T) {
  const shape = text.split(",").map(Number).slice(1);
  return shape.length ? [T, ...shape.slice(1)] : [T];
}
