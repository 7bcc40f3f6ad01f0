// One token's vector on its way through the model: what each part adds to it, and to the logit of a predicted token.

import { onTheme } from "../canvas.js";
import { clamp, fmt, h, number, percent, put, showToken } from "../dom.js";
import { limitOf, makeRaster } from "../raster.js";
import { measures, readStream, vectorAt } from "../stream_reading.js";
import { norm } from "../tensor.js";

const COLUMNS = {
  norm: {
    title: "norm",
    show: (x) => fixed(x, 1),
    formula: "‖a‖ = √(Σ a²)",
    note: "The length of the vector.",
  },
  cosine: {
    title: "cosine",
    show: (x) => fixed(x, 2),
    formula: "a · x / (‖a‖ ‖x‖)",
    note: "Its direction against the stream x before it: 1 is the same, 0 a new one, −1 the opposite.",
  },
  share: {
    title: "share",
    show: (x) => `${fixed(100 * x, 1)} %`,
    formula: "a · x_last / ‖x_last‖²",
    note: "How much of the last vector it is, measured along it. All shares sum to 100 %.",
  },
  value: {
    title: "logit",
    show: (x) => fixed(x, 2),
    formula: "(a − mean a) ∘ w_LN · W_U[target] / scale",
    note: "What it adds to the logit of the target. The parts and the bias of the final norm sum to the logit.",
  },
};

export function makeStreamView(store) {
  const intro = h("p");
  const target = targetSelect("stream-target", (id) => store.set({ target: id }));
  const versus = targetSelect("stream-versus", (id) => store.set({ versus: id }));
  const body = h("div");
  const opened = new Set(); // layers whose heads are shown
  const strips = [];
  const element = h(
    "div",
    { class: "stream-view" },
    h("h2", { text: "Residual stream" }),
    intro,
    h("div", { class: "row choices" }, h("label", {}, "logit of ", target), h("label", {}, "minus that of ", versus)),
    body,
  );
  let drawn = [];
  const toggle = (layer) => {
    if (!opened.delete(layer)) opened.add(layer);
    drawn = [];
    update();
    body.querySelector(`[data-open="${layer}"]`).focus();
  };
  const update = () => {
    const seen = [store.shown, store.token, store.state.target, store.state.versus];
    if (seen.every((value, i) => value === drawn[i])) return;
    drawn = seen;
    const likely = targetsOf(store);
    const known = (id) => (id === null || store.living || likely.some((token) => token.id === id) ? id : null);
    const chosen = { target: known(store.state.target) ?? likely[0].id, versus: known(store.state.versus) };
    fillTargets(store, target, versus, likely);
    const reading = { ...chosen, ...readStream(store.shown, store.config, store.token, chosen.target, chosen.versus) };
    intro.textContent = introOf(store);
    strips.length = 0;
    put(body, tableOf(store, reading, strips, opened, toggle), h("p", { class: "muted", text: legend(store, reading) }));
  };
  onTheme(() => strips.forEach((strip) => strip.draw()));
  return { id: "stream", title: "Residual stream", element, update };
}

function introOf(store) {
  const token = showToken(store.tokenAt(store.token, store.shown));
  return (
    `The vector of “${token}” at position ${store.token}, from top to bottom. ` +
    "Attention and the MLP of each layer read it and add a vector to it. Select another token above."
  );
}

function legend({ config }, { stages }) {
  if (!stages[0].vector) return "The vectors, cosines and shares need a living page: this model is too large for one.";
  return (
    `Each strip is the vector, its ${config.n_embd} numbers from left to right: blue above zero, red below, ` +
    "one scale for all strips. Point at a number, or use the arrow keys, to see what it is made of."
  );
}

// The table: a row for each part, and for the stream after each layer a row and its strip.

function tableOf(store, reading, strips, opened, toggle) {
  const { parts, stages, bias } = reading;
  const most = Math.max(...parts.map(({ value }) => Math.abs(value)), Math.abs(bias));
  const rows = [];
  const limit = stages[0].vector && limitOf(...stages.map(({ vector }) => vector));
  stages.forEach((stage, i) => {
    for (const part of parts.filter(({ layer }) => layer === i - 1)) {
      rows.push(partRow(part, most, openButton(part, opened, toggle)));
      if (part.kind === "attn" && opened.has(part.layer)) rows.push(...headRows(store, part, reading, most));
    }
    rows.push(stageRow(stage, i));
    if (limit) rows.push(stripRow(reading, i, strips, limit));
  });
  const titles = Object.values(COLUMNS).map(({ title, note }) => h("th", { scope: "col", title: note, text: title }));
  return h(
    "table",
    { class: "stream" },
    h("caption", { text: captionOf(store, reading) }),
    h("thead", {}, h("tr", {}, h("th", { scope: "col", text: "part" }), ...titles)),
    h("tbody", {}, ...rows, ...sumRows(reading, most)),
  );
}

function captionOf({ tokenizer }, { target, versus }) {
  const text = (id) => `“${showToken(tokenizer.tokenText(id))}”`;
  return `Parts of the logit of ${text(target)}${versus === null ? "" : ` minus that of ${text(versus)}`}`;
}

function tableRow(kind, label, title, ...cells) {
  const head = h("th", { scope: "row" }, typeof title === "string" ? h("span", { text: title }) : title);
  return h("tr", { class: kind, "data-row": label }, head, ...cells.map((cell) => h("td", {}, cell)));
}

function partRow(part, most, title = titleOf(part)) {
  const cell = (name) => {
    const value = part[name] ?? null;
    if (value === null) return "";
    const data = { what: `stream-${name}`, part: part.label };
    return number(value, data, () => explainMeasure(part, name), COLUMNS[name].show(value));
  };
  const cells = [cell("norm"), cell("cosine"), cell("share"), barred(part.value, most, cell("value"))];
  return tableRow(`part ${part.kind}`, part.label, title, ...cells);
}

function explainMeasure(part, name) {
  const { formula, note } = COLUMNS[name];
  const filled = `a = ${part.name ?? part.label}, ${name === "value" ? "adds" : name} = ${fmt(part[name])}`;
  return { formula, filled, note };
}

function titleOf({ kind, label, head }) {
  if (kind === "head") return head === null ? "output bias" : `head ${head}`;
  return { embed: "token", pos_embed: "position" }[label] ?? { mlp: "MLP", patch: "patch" }[kind];
}

/** Opens the heads of a layer. */
function openButton({ kind, layer }, opened, toggle) {
  if (kind !== "attn") return undefined;
  return h("button", {
    type: "button",
    class: "open",
    "data-open": layer,
    "aria-expanded": String(opened.has(layer)),
    "aria-label": `attention of layer ${layer}, its heads`,
    text: "attention",
    on: { click: () => toggle(layer) },
  });
}

function headRows(store, { layer, heads }, { stages }, most) {
  const { shown: run, token: position, model } = store;
  return heads.map((part) => {
    const name = `blocks.${layer}.attn.hook_result`;
    const bias = store.living && part.head === null ? model.weight(`h.${layer}.attn.c_proj.bias`).data : null;
    const vector = part.head === null ? bias : vectorAt(run, name, position, part.head);
    const sizes = measures(run, vector, `blocks.${layer}.hook_resid_pre`, stages.at(-1).vector, position);
    const size = part.head === null ? vector && norm(vector) : run.norms(name)[position * store.config.n_head + part.head];
    return partRow({ ...part, name: part.head === null ? null : name, norm: size, ...sizes }, most);
  });
}

function stageRow({ norm: size, value }, stage) {
  const ofLength = { formula: COLUMNS.norm.formula, note: `Length of the vector ${stageName(stage)}.` };
  const ofSum = { formula: "sum of the parts so far", note: "What the vector adds to the logit, at the scale of the final norm." };
  const length = number(size, { what: "stream-norm", stage }, () => ofLength, fixed(size, 1));
  const sum = number(value, { what: "stream-sum", stage }, () => ofSum, fixed(value, 2));
  return tableRow("stage", `stage-${stage}`, stageName(stage), length, "", "", sum);
}

function stripRow(reading, stage, strips, limit) {
  const strip = makeRaster({
    label: `The vector ${stageName(stage)}`,
    data: { what: "stream-vector", stage },
    describe: (_, c) => describeNumber(reading, stage, c),
    onPoint: (_, c) => strips.forEach((other) => other !== strip && other.mark(0, c)),
  });
  strips.push(strip);
  const { vector } = reading.stages[stage];
  strip.show({ rows: 1, columns: vector.length, data: vector, limit });
  return h("tr", { class: "strip" }, h("td", { colspan: 5 }, strip.element));
}

/** One number of the stream as the sum that it is. */
function describeNumber({ stages, parts }, stage, c) {
  const added = parts.filter(({ layer }) => layer === stage - 1);
  const before = stage > 0 ? [{ title: "before", value: stages[stage - 1].vector[c] }] : [];
  const terms = [...before, ...added.map((part) => ({ title: titleOf(part) ?? "attention", value: part.vector[c] }))];
  return {
    formula: `x[${c}] ${stageName(stage)} = ${terms.map(({ title }) => title).join(" + ")}`,
    filled: `${fmt(stages[stage].vector[c])} = ${termsText(terms.map(({ value }) => value))}`,
  };
}

function termsText(values) {
  return values.map(fmt).join(" + ").replaceAll("+ −", "− ");
}

function sumRows({ bias, sum, logit, versus }, most) {
  const what = versus === null ? "logit" : "difference of the logits";
  const biasPart = { label: "ln_final_bias", kind: "embed", name: "b_LN", value: bias };
  const ofTotal = { formula: "parts + bias", filled: `${fmt(sum)} = ${termsText([sum - bias, bias])}` };
  const ofModel = { formula: "W_U[target] · LN_f(x)", note: "Computed by the forward pass. The sum equals it." };
  const total = number(sum, { what: "stream-total" }, () => ofTotal, fixed(sum, 2));
  const model = number(logit, { what: "stream-model" }, () => ofModel, fixed(logit, 2));
  return [
    partRow(biasPart, most, "final norm's bias"),
    tableRow("total", "sum", "sum of all parts", "", "", "", total),
    tableRow("total", "logit", `${what} of the model`, "", "", "", model),
  ];
}

/** A number with a bar from zero, to the left for a negative one. */
function barred(value, most, cell) {
  const style = { "--x": clamp(value / most, -1, 1) };
  const bar = h("span", { class: value < 0 ? "signed negative" : "signed", "aria-hidden": "true", style });
  return h("span", { class: "barred" }, bar, cell);
}

/** A number with a fixed number of decimals, so that columns align. */
function fixed(x, decimals) {
  return x.toFixed(decimals).replace("-", "−");
}

function stageName(stage) {
  return stage === 0 ? "at the start" : `after layer ${stage - 1}`;
}

// The choice of the target.

function targetSelect(id, choose) {
  return h("select", { id, on: { change: ({ target }) => choose(target.value === "" ? null : Number(target.value)) } });
}

/** The tokens to choose from: the most probable ones, in a recorded page those whose parts were recorded. */
function targetsOf({ shown: run, token, living }) {
  const likely = run.next(token, 10);
  return living ? likely : likely.filter(({ id }) => run.targets(token).includes(id));
}

function fillTargets({ state, tokenizer }, target, versus, likely) {
  const text = (id) => showToken(tokenizer.tokenText(id));
  const fill = (select, first, chosen) => {
    const ids = likely.map(({ id }) => id);
    const named = ({ id, probability }) => h("option", { value: id, text: `${text(id)}  ${percent(probability)}` });
    const options = likely.map(named);
    if (chosen !== null && !ids.includes(chosen)) options.push(h("option", { value: chosen, text: text(chosen) }));
    put(select, h("option", { value: "", text: first }), ...options);
    select.value = chosen ?? "";
  };
  fill(target, `the most probable, ${text(likely[0].id)}`, state.target);
  fill(versus, "nothing", state.versus);
}
