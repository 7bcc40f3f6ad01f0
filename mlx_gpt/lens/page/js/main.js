// The page: reads its data, builds the store and the views, and keeps them up to date.

import { h, put, showToken } from "./dom.js";
import { Store } from "./store.js";
import { readPage } from "./data.js";
import { makeCopyLink } from "./views/copy_link.js";
import { makeCompareView } from "./views/compare.js";
import { makeChangeView } from "./views/change.js";
import { makeNextView } from "./views/next.js";
import { makeTour } from "./tour.js";
import { makeAttentionView } from "./views/attention.js";
import { makeHeadView } from "./views/head.js";
import { makeLogitLensView } from "./views/logitlens.js";
import { makeMapView } from "./views/map.js";
import { makeStreamView } from "./views/stream.js";

// In the order of the navigation: make functions, (store) -> {id, title, element, update}.
const VIEWS = [
  makeAttentionView,
  makeHeadView,
  makeStreamView,
  makeLogitLensView,
  makeMapView,
  makeChangeView,
  makeCompareView,
];
const ASIDE = [makeNextView]; // always beside the chosen view

async function start() {
  const page = document.getElementById("page");
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const { model, tokenizer, config } = await readPage(data);
  const store = new Store(model, tokenizer, config, data.texts);
  store.diagram = data.diagram;
  const views = VIEWS.map((make) => make(store));
  const asides = ASIDE.map((make) => make(store));
  const tour = makeTour(store);
  const parts = [header(store, data), input(store, tour.start), tour, tokens(store), navigation(store, views)];
  put(page, ...parts.map(({ element }) => element), h("main", { id: "views" }, ...views.map(panel)), aside(asides));
  store.subscribe(() => {
    parts.forEach((part) => part.update());
    const chosen = views.find(({ id }) => id === store.state.view) ?? views[0];
    page.classList.toggle("empty", store.run === null);
    page.classList.toggle("busy", store.busy);
    for (const view of views) view.panel.hidden = view !== chosen;
    if (store.run) for (const view of [chosen, ...asides]) view?.update();
  });
  addEventListener("hashchange", () => store.readLink());
  addEventListener("keydown", (event) => steer(event, store));
  globalThis.mlxGptPage = store; // for the console, and for the tests
  store.readLink();
}

/** The section of a view. */
function panel(view) {
  const { id, element } = view;
  const props = { id: `view-${id}`, role: "tabpanel", "aria-labelledby": `tab-${id}`, class: "view" };
  view.panel = h("section", props, element);
  return view.panel;
}

function aside(views) {
  return h("aside", { "aria-label": "Next token" }, ...views.map(({ element }) => element));
}

/** Name and size of the model, and what kind of page this is. */
function header(store, data) {
  const { n_layer, n_head, n_embd, vocab_size, n_positions } = store.config;
  const size = data.parameters.toLocaleString("en-US");
  const how = store.living
    ? "It runs in this page: type a text and everything is computed again. Its weights are rounded to float16."
    : `Recorded: ${size} parameters are too many to run in this page, so it shows the texts that were traced.`;
  const shape = `${size} parameters: ${n_layer} layer${n_layer === 1 ? "" : "s"} of ${n_head} head${n_head === 1 ? "" : "s"}, width ${n_embd}, ${vocab_size} tokens, context ${n_positions}.`;
  const element = h("header", {}, h("h1", { text: data.name }), h("p", { class: "muted", text: `${shape} ${how}` }));
  return { element, update() {} };
}

/** The text, or the choice of a recorded one. */
function input(store, startTour) {
  const note = h("p", { class: "note", role: "status", "aria-live": "polite" });
  const field = store.living
    ? h("textarea", { id: "text", rows: 2, spellcheck: "false", autocapitalize: "off", maxlength: 19999 })
    : h("select", { id: "text" }, ...store.texts.map(textOption));
  field.addEventListener("input", () => store.set({ text: field.value }));
  const copy = makeCopyLink(store);
  const buttons = h("div", { class: "row" }, startTour, copy.element, note);
  const element = h("div", { class: "input" }, h("label", { for: "text", text: "Text" }), field, buttons);
  const update = () => {
    if (field.value !== store.state.text) field.value = store.state.text;
    copy.update();
    note.textContent = store.remark || (store.run || store.busy ? "" : "Type a text.");
  };
  return { element, update };
}

function textOption(text) {
  return h("option", { value: text, text: showToken(text).replaceAll("␣", " ") });
}

/** The tokens of the text, to select one. */
function tokens(store) {
  const element = h("div", { class: "tokens", role: "group", "aria-label": "Tokens of the text; select one" });
  let drawn = null;
  const update = () => {
    if (store.run !== drawn) {
      drawn = store.run;
      put(element, ...(drawn ? [...drawn.ids].map((id, position) => tokenButton(store, position)) : []));
    }
    [...element.children].forEach((button, position) => {
      button.setAttribute("aria-pressed", position === store.token);
      button.classList.toggle("hover", position === store.hover.token);
      button.classList.toggle("key", position === store.hover.key);
    });
  };
  return { element, update };
}

function tokenButton(store, position) {
  const text = showToken(store.tokenAt(position));
  const id = store.run.ids[position];
  const [enter, leave] = [() => store.point({ token: position }), () => store.point({})];
  return h("button", {
    class: "token", type: "button", "data-position": position, "data-id": id, title: `token ${id} at position ${position}`, text,
    on: { click: () => store.set({ token: position }), pointerenter: enter, focus: enter, pointerleave: leave, blur: leave },
  });
}

/** The tabs of the views. */
function navigation(store, views) {
  const tabs = views.map(({ id, title }) =>
    h("button", { id: `tab-${id}`, type: "button", role: "tab", "aria-controls": `view-${id}`, text: title, on: { click: () => store.set({ view: id }) } }),
  );
  const element = h("nav", { role: "tablist", "aria-label": "Views" }, ...tabs);
  element.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.stopPropagation(); // not a step through the heads
    const next = tabs[(tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length];
    next.focus();
    next.click();
  });
  const update = () => {
    for (const [i, { id }] of views.entries()) {
      tabs[i].setAttribute("aria-selected", id === store.state.view);
      tabs[i].setAttribute("tabindex", id === store.state.view ? "0" : "-1");
    }
  };
  return { element, update };
}

/** Outside of fields: arrows step through heads and layers, [ and ] through tokens. */
function steer(event, store) {
  const { target } = event;
  if (event.altKey || event.ctrlKey || event.metaKey || target.closest?.("input, textarea, select, [data-keys]")) return;
  const { layer, head } = store.state;
  const { n_layer: L, n_head: H } = store.config;
  const last = (store.run?.ids.length ?? 1) - 1;
  const changes = {
    ArrowRight: { head: (head + 1) % H },
    ArrowLeft: { head: (head + H - 1) % H },
    ArrowDown: { layer: (layer + 1) % L },
    ArrowUp: { layer: (layer + L - 1) % L },
    "]": { token: Math.min(store.token + 1, last) },
    "[": { token: Math.max(store.token - 1, 0) },
  }[event.key];
  if (!changes) return;
  event.preventDefault();
  store.set(changes);
}

start();
