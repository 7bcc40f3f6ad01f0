// Matrices and vectors as coloured cells on canvases, in the colours of the theme.

const palettes = new Map();
const redraws = [];

/** Call ``redraw`` when the reader's theme changes: canvases do not follow it by themselves. */
export function onTheme(redraw) {
  redraws.push(redraw);
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  palettes.clear();
  for (const redraw of redraws) redraw();
});

/** Colours as pixels, from the background (0) to a variable of style.css (255). */
function palette(hue) {
  if (!palettes.has(hue)) {
    const [from, to] = [rgb("--bg"), rgb(hue)];
    const mix = (i) => from.map((low, channel) => Math.round(low + ((to[channel] - low) * i) / 255));
    palettes.set(hue, Uint32Array.from({ length: 256 }, (_, i) => pixel(mix(i))));
  }
  return palettes.get(hue);
}

function rgb(variable) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(variable).trim();
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}

function pixel([red, green, blue]) {
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

/** Depth of the colour of a weight: its square root, so that 0.01 can still be seen. */
export function shade(weight) {
  return Math.sqrt(weight);
}

/** Draw rows of attention weights, (rows, T), one pixel a cell. Keys after ``last`` of a row are left transparent. */
export function drawWeights(canvas, weights, rows, T, lastOf) {
  const colours = palette("--key");
  paintCells(canvas, T, rows, (pixels) => {
    for (let row = 0; row < rows; row++) {
      const last = lastOf(row);
      for (let key = 0; key <= last; key++) pixels[row * T + key] = colours[(255 * shade(weights[row * T + key]) + 0.5) | 0];
    }
  });
}

/** Draw a vector as rows of cells, one by default: positive and negative numbers in two hues, or all on one; ``most`` is
 *  full colour. Infinite numbers are left transparent. */
export function drawVector(canvas, vector, most, hue = null, rows = 1) {
  const [positive, negative] = hue ? [palette(hue), palette(hue)] : [palette("--pos"), palette("--neg")];
  paintCells(canvas, vector.length / rows, rows, (pixels) => {
    vector.forEach((x, i) => {
      const colours = x < 0 ? negative : positive;
      if (Number.isFinite(x)) pixels[i] = colours[Math.min(255, Math.round((255 * Math.abs(x)) / (most || 1)))];
    });
  });
}

function paintCells(canvas, width, height, draw) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  draw(new Uint32Array(image.data.buffer));
  context.putImageData(image, 0, 0);
}

/** Report the cell of a canvas that the pointer is over: enter(column, row), leave(), choose(column, row). */
export function onCells(canvas, { enter, leave, choose }) {
  const cell = (event) => {
    const box = canvas.getBoundingClientRect();
    const index = (at, from, size, n) => Math.min(n - 1, Math.max(0, Math.floor(((at - from) / size) * n)));
    return [index(event.clientX, box.left, box.width, canvas.width), index(event.clientY, box.top, box.height, canvas.height)];
  };
  for (const event of ["pointermove", "pointerdown"]) canvas.addEventListener(event, (e) => enter(...cell(e)));
  canvas.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && leave()); // a tap stays until the next
  canvas.addEventListener("pointercancel", leave);
  if (choose) canvas.addEventListener("click", (event) => choose(...cell(event)));
}

/** Make a function that does ``work(item)`` for each item of a list, about 10 ms at a time, so that the page stays
 *  responsive. A later list replaces what is left of an earlier one. */
export function inSlices(work) {
  let items = [];
  let waiting = false;
  const slice = () => {
    waiting = false;
    const end = performance.now() + 10;
    while (items.length && performance.now() < end) work(items.shift());
    if (items.length) later();
  };
  const later = () => {
    waiting = true;
    setTimeout(slice);
  };
  return (list) => {
    items = [...list];
    if (!waiting) slice();
  };
}
