// Elements, numbers and colours. Text is always set as text, never as HTML.

/** An HTML element. Props: class, text, on: {event: listener}, style: {property: value}; others are attributes. */
export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** An SVG element, with the same props. */
export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "style") for (const [property, v] of Object.entries(value)) element.style.setProperty(property, v);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Replace the children of an element. */
export function put(element, ...children) {
  element.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
}

const VISIBLE = { " ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "\u00a0": "⍽" };

/** A token as a reader can see it: spaces and newlines as signs, control and bidirectional characters by their code. */
export function showToken(text) {
  const shown = [...text].map((c) => {
    if (VISIBLE[c]) return VISIBLE[c];
    if (/[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/u.test(c) && c !== "\u200d") {
      return `\\u{${c.codePointAt(0).toString(16)}}`;
    }
    return c;
  });
  return shown.join("") || "∅";
}

/** A number in three significant digits, with a real minus sign. */
export function fmt(x) {
  if (!Number.isFinite(x)) return x > 0 ? "∞" : x < 0 ? "−∞" : "not a number";
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text = size >= 1e5 || size < 5e-4 ? size.toExponential(1) : String(Number(size.toPrecision(3)));
  return x < 0 ? `−${text}` : text;
}

/** A probability in percent. */
export function percent(p) {
  return p >= 0.0995 ? `${Math.round(100 * p)} %` : p >= 0.001 ? `${(100 * p).toFixed(1)} %` : p > 0 ? "< 0.1 %" : "0 %";
}

/** Colour of x in 0..1 on one hue, and of x in -1..1 on two. ``hue`` is a variable of style.css. */
export function heat(x, hue = "--accent") {
  return `color-mix(in srgb, var(${hue}) ${Math.round(100 * clamp(x, 0, 1))}%, var(--bg))`;
}

export function diverge(x) {
  return heat(Math.abs(x), x < 0 ? "--neg" : "--pos");
}

export function clamp(x, low, high) {
  return Math.min(high, Math.max(low, x));
}

/** A number that explains itself: hover, focus or tap it to see its formula with the values filled in.
 *  ``how()`` returns {formula, filled, note}; ``data`` become data- attributes, so that what is shown can be found. */
export function number(value, data, how, text = fmt(value)) {
  const element = h("span", { class: "number" });
  setNumber(element, value, data, text);
  if (how) explain(element, how);
  return element;
}

/** Change what a number shows. */
export function setNumber(element, value, data = {}, text = fmt(value)) {
  for (const [name, v] of Object.entries({ value, ...data })) element.setAttribute(`data-${name}`, v);
  if (element.textContent !== text) element.textContent = text;
}

/** Let the page draw and react before a long computation goes on. */
export function letDraw() {
  return new Promise((resolve) => setTimeout(resolve));
}

const popover = { element: null, owner: null };

/** Show ``how()`` = {formula, filled, note} beside an element while it is hovered or focused, or after a tap. */
export function explain(element, how) {
  element.setAttribute("tabindex", "0");
  element.classList.add("explained");
  const show = () => openPopover(element, how());
  for (const event of ["pointerenter", "focus", "click"]) element.addEventListener(event, show);
  for (const event of ["pointerleave", "blur"]) element.addEventListener(event, closePopover);
  element.addEventListener("keydown", (event) => event.key === "Escape" && closePopover());
}

/** Show {formula, filled, content, note} beside an element, or beside a box in it, until ``closePopover``. */
export function openPopover(owner, { formula, filled, content, note }, at = owner.getBoundingClientRect()) {
  closePopover();
  popover.owner = owner;
  popover.element = h(
    "div",
    { id: "popover", class: "popover", role: "tooltip" },
    h("div", { class: "formula", text: formula }),
    filled ? h("div", { class: "formula filled", text: filled }) : null,
    content ?? null,
    note ? h("p", { text: note }) : null,
  );
  document.body.append(popover.element);
  owner.setAttribute("aria-describedby", "popover");
  const size = popover.element.getBoundingClientRect();
  const left = clamp(at.left, 8, Math.max(8, innerWidth - size.width - 8));
  const below = at.bottom + 6 + size.height < innerHeight;
  popover.element.style.left = `${left + scrollX}px`;
  popover.element.style.top = `${(below ? at.bottom + 6 : Math.max(4, at.top - size.height - 6)) + scrollY}px`;
}

export function closePopover() {
  popover.owner?.removeAttribute("aria-describedby");
  popover.element?.remove();
  popover.element = popover.owner = null;
}

/** A labelled <input type="range"> with its value shown beside it. ``onInput(number)`` is called while it moves. */
export function slider(label, { min, max, step, value, id, show = fmt }, onInput) {
  const shown = h("output", { for: id, text: show(value) });
  const input = h("input", { type: "range", id, min, max, step, value });
  input.addEventListener("input", () => onInput(Number(input.value)));
  const element = h("label", { class: "slider", for: id }, h("span", { text: label }), input, shown);
  const setValue = (x) => {
    if (Number(input.value) !== x) input.value = x;
    shown.textContent = show(x);
  };
  return { element, input, setValue };
}
