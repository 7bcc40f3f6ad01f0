// The state of the page and the runs of the model made from it. Views read the store and call ``set``.

import { clamp } from "./dom.js";

export const INITIAL = {
  text: "", //                 the text that is read
  other: "", //                a second text, to take activations from
  token: null, //              the selected position; null: the last
  layer: 0,
  head: 0,
  key: null, //                the key that the view of one head shows; null: the one with the largest weight
  step: 0, //                  of that view
  view: "attention",
  heads: {}, //                "layer.head": factor; 0 knocks the head out
  mlps: {}, //                 "layer": factor
  patch: null, //              {layer, position}: that residual stream is taken from the second text
  temperature: 0.8,
  topK: 0, //                  0: all tokens
  topP: 1,
  seed: 0,
  pins: [], //                 states A and B without pins, to compare; null: none
  target: null, //             the token whose logit is taken apart; null: the most probable one
  versus: null, //             a token whose logit is subtracted from that
  zoom: "", //                 the component or activation that the map shows; "": the whole model
  cell: null, //               [row, column] of a number in it
  tour: null, //               step of the guided tour
};
const LONGEST = 20000; // characters of a text in a link
export const OF_QUERY = ["text", "layer", "head", "token"];
const OF_RUN = ["text", "other", "heads", "mlps", "patch"];

export class Store {
  constructor(model, tokenizer, config, texts) {
    Object.assign(this, { model, tokenizer, config, texts, living: model.canCompute });
    this.initial = { ...INITIAL, text: texts[0] ?? "" };
    this.state = { ...this.initial };
    this.run = this.edited = this.otherRun = null;
    this.hover = {};
    this.busy = false;
    this.remark = "";
    this.listeners = [];
    this.turn = 0; // of the newest computation
    this.written = -Infinity; // when the link was written last
  }

  get shown() {
    return this.edited ?? this.run;
  }

  /** The selected position, also where none or one outside the text was chosen. */
  get token() {
    const last = (this.run?.ids.length ?? 1) - 1;
    return this.state.token === null ? last : clamp(this.state.token, 0, last);
  }

  /** Text of the token at a position. */
  tokenAt(position, run = this.run) {
    return this.tokenizer.tokenText(run.ids[position]);
  }

  subscribe(listener) {
    this.listeners.push(listener);
  }

  notify() {
    for (const listener of this.listeners) listener(this);
  }

  /** Change the state; write it to the address; compute what it needs. */
  set(changes) {
    const before = this.state;
    this.state = { ...before, ...changes };
    if ("text" in changes && changes.text !== before.text) this.state.token = changes.token ?? null;
    if (!("key" in changes) && OF_QUERY.some((name) => this.state[name] !== before[name])) this.state.key = null;
    this.writeLink();
    if (OF_RUN.some((name) => this.state[name] !== before[name])) this.compute();
    this.notify();
  }

  /** What the pointer is over: {token, key, layer, head}, each optional. Not part of the link. Leaving, {}, takes effect
   *  after the events at hand, so that going from one token to the next draws once. */
  point(hover) {
    clearTimeout(this.leaving);
    if (Object.keys(hover).length === 0) this.leaving = setTimeout(() => this.pointAt(hover));
    else this.pointAt(hover);
  }

  pointAt(hover) {
    if (JSON.stringify(hover) === JSON.stringify(this.hover)) return;
    this.hover = hover;
    this.notify();
  }

  /** Scale a head ("layer.head") or an MLP ("layer"); 1 removes the edit. */
  scale(kind, name, factor) {
    const factors = { ...this.state[kind] };
    if (factor === 1) delete factors[name];
    else factors[name] = factor;
    this.set({ [kind]: factors });
  }

  hasEdits({ heads, mlps, patch } = this.state) {
    return Object.keys(heads).length > 0 || Object.keys(mlps).length > 0 || patch !== null;
  }

  /** The ids of a text, at most as many as the context holds. */
  idsOf(text) {
    return this.tokenizer.encode(text).slice(0, this.config.n_positions);
  }

  /** Trace the text, the second text and, if there are edits, the text with them. A later call replaces an earlier one. */
  async compute(remark = "") {
    const turn = ++this.turn;
    const state = this.state;
    this.busy = true;
    try {
      const runs = await this.runsOf(state);
      if (turn !== this.turn) return;
      Object.assign(this, runs, { remark: remark || this.remarkOf(state) });
    } catch (error) {
      if (turn !== this.turn) return;
      this.remark = error.message;
      if (!["Superseded", "NotRecorded", "UnknownCharacter"].includes(error.name)) throw error;
    }
    this.busy = false;
    this.notify();
  }

  /** Trace what a state describes: {run, edited, otherRun}, null for what it has not. Lanes do not stop each other. */
  async runsOf(state, lane = "text") {
    const run = await this.traceText(state.text, lane);
    const otherRun = await this.traceText(state.other, lane);
    let edited = null;
    if (run && this.living && this.hasEdits(state)) {
      const edits = this.editsOf(state, otherRun);
      edited = await this.model.trace(run.ids, { edits, lane });
    }
    return { run, otherRun, edited };
  }

  async traceText(text, lane) {
    const ids = this.living ? this.idsOf(text) : this.model.idsOf(text);
    return ids.length ? this.model.trace(ids, { lane }) : null;
  }

  /** The edits of a state as ``model.trace`` takes them. */
  editsOf({ heads, mlps, patch }, otherRun = this.otherRun) {
    const source = patch && otherRun && patch.position < otherRun.ids.length;
    const name = patch && `blocks.${patch.layer}.hook_resid_pre`;
    const { position } = patch ?? {};
    const C = this.config.n_embd;
    const value = source && otherRun.get(name).data.slice(position * C, (position + 1) * C);
    return { heads, mlps, patch: source ? { name, position, value } : null };
  }

  remarkOf({ text }) {
    if (!this.living) return "";
    const n = this.tokenizer.encode(text).length;
    const most = this.config.n_positions;
    return n > most ? `The text has ${n} tokens and the context holds ${most}: the first ${most} are read.` : "";
  }

  // The link: what differs from the initial state, as JSON behind the #.

  link(state = this.state) {
    const changed = this.changesOf(state);
    return Object.keys(changed).length ? `#${encodeURIComponent(JSON.stringify(changed))}` : "#";
  }

  changesOf({ pins, ...state }) {
    const entries = Object.entries(state).filter(([name, v]) => JSON.stringify(v) !== JSON.stringify(this.initial[name]));
    if (pins.length) entries.push(["pins", pins.map((pin) => pin && this.changesOf(pin))]);
    return Object.fromEntries(entries);
  }

  /** Write the link at once, but several within half a second as one: browsers limit how often a page may. */
  writeLink() {
    clearTimeout(this.writing);
    const wait = this.written + 500 - performance.now();
    if (wait > 0) {
      this.writing = setTimeout(() => this.writeLink(), wait);
      return;
    }
    this.written = performance.now();
    history.replaceState(null, "", this.link());
  }

  /** Take the state from the address. What does not fit the model is left out. */
  readLink() {
    clearTimeout(this.writing);
    let [given, remark] = [{}, ""];
    try {
      given = JSON.parse(decodeURIComponent(location.hash.slice(1)) || "{}");
    } catch {
      remark = "The link is damaged; the page starts from the beginning.";
    }
    const refused = new Set();
    this.state = this.checked(given, false, refused);
    if (refused.size) remark = `The link has values that do not fit this page and are left out: ${[...refused].join(", ")}.`;
    this.compute(remark);
    this.notify();
  }

  /** A state from untrusted JSON. A pin has no pins. The names of fields that do not fit are added to ``refused``. */
  checked(given, isPin = false, refused = new Set()) {
    const { n_layer: L, n_head: H, n_positions: T, vocab_size: V } = this.config;
    const state = { ...this.initial };
    const whole = (x, most) => Number.isInteger(x) && x >= 0 && x < most;
    const real = (x, low, high) => typeof x === "number" && x >= low && x <= high;
    const isHead = (name) => /^\d+\.\d+$/.test(name) && whole(+name.split(".")[0], L) && whole(+name.split(".")[1], H);
    const isLayer = (name) => /^\d+$/.test(name) && whole(+name, L);
    const tests = {
      text: (x) => typeof x === "string" && x.length < LONGEST,
      other: (x) => typeof x === "string" && x.length < LONGEST,
      token: (x) => x === null || whole(x, T),
      layer: (x) => whole(x, L),
      head: (x) => whole(x, H),
      key: (x) => x === null || whole(x, T),
      step: (x) => whole(x, 6),
      view: (x) => typeof x === "string",
      heads: isRecord,
      mlps: isRecord,
      patch: (x) => x === null || (isRecord(x) && whole(x.layer, L) && whole(x.position, T)),
      temperature: (x) => real(x, 0, 5),
      topK: (x) => whole(x, V + 1),
      topP: (x) => real(x, 0, 1),
      seed: (x) => whole(x, 2 ** 32),
      target: (x) => x === null || whole(x, V),
      versus: (x) => x === null || whole(x, V),
      zoom: (x) => typeof x === "string" && x.length < 80,
      cell: (x) => x === null || (Array.isArray(x) && x.length === 2 && whole(x[0], T) && whole(x[1], 2 ** 32)),
      tour: (x) => x === null || whole(x, 8),
    };
    if (!isRecord(given)) return state;
    for (const [name, test] of Object.entries(tests)) {
      if (!(name in given)) continue;
      if (test(given[name])) state[name] = given[name];
      else refused.add(given[name]?.length >= LONGEST ? `${name} of ${given[name].length} characters` : name);
    }
    for (const [kind, isPart] of [["heads", isHead], ["mlps", isLayer]]) {
      const all = Object.entries(state[kind]);
      const fit = all.filter(([name, factor]) => isPart(name) && real(factor, -10, 10));
      if (fit.length < all.length) refused.add(`some ${kind}`);
      state[kind] = Object.fromEntries(fit);
    }
    if (!this.living) Object.assign(state, { other: "", heads: {}, mlps: {}, patch: null }); // it cannot compute them
    if (isPin || !Array.isArray(given.pins)) return state;
    state.pins = given.pins.slice(0, 2).map((pin) => (isRecord(pin) ? this.checked(pin, true, refused) : null));
    return state;
  }
}

function isRecord(x) {
  return typeof x === "object" && x !== null && !Array.isArray(x);
}
