// Heat maps in which the pointer and the arrow keys choose a number.

import { drawVector, onCells } from "./canvas.js";
import { clamp, closePopover, fmt, h, openPopover } from "./dom.js";

/**
 * A heat map. ``describe(row, column)`` returns {formula, filled, note} of a number, for the popover; ``data`` become
 * data- attributes; ``onPoint(row, column)`` is called when a number is chosen, ``onPick`` when it is clicked or
 * confirmed with Enter. ``show({rows, columns, data, limit})`` sets the numbers, row by row; ``limit`` has the full
 * colour. ``draw`` draws again.
 */
export function makeRaster({ label, data = {}, describe, onPoint = () => {}, onPick = () => {} }) {
  const canvas = h("canvas", { "aria-hidden": "true" });
  const mark = h("div", { class: "mark", hidden: true });
  const attributes = Object.fromEntries(Object.entries(data).map(([name, value]) => [`data-${name}`, value]));
  const props = { class: "raster", role: "slider", tabindex: "0", "data-keys": "", ...attributes };
  const element = h("div", props, canvas, mark);
  const raster = { element, canvas, grid: null, cell: [0, 0] };

  raster.draw = () => drawVector(canvas, raster.grid.data, raster.grid.limit, null, raster.grid.rows);

  raster.show = (grid) => {
    raster.grid = grid;
    raster.cell = [clamp(raster.cell[0], 0, grid.rows - 1), clamp(raster.cell[1], 0, grid.columns - 1)];
    element.setAttribute("aria-label", typeof label === "function" ? label() : label);
    element.setAttribute("aria-valuemin", 0);
    element.setAttribute("aria-valuemax", grid.rows * grid.columns - 1);
    raster.draw();
    raster.mark(...raster.cell, !mark.hidden);
  };

  /** Choose a number: it is marked and becomes the value of the element. */
  raster.mark = (row, column, visible = true) => {
    const { rows, columns, data: numbers } = raster.grid;
    raster.cell = [row, column];
    const value = numbers[row * columns + column];
    mark.hidden = !visible;
    mark.style.left = `${(100 * column) / columns}%`;
    mark.style.top = `${(100 * row) / rows}%`;
    mark.style.width = `${100 / columns}%`;
    mark.style.height = `${100 / rows}%`;
    Object.assign(element.dataset, { value, row, column });
    element.setAttribute("aria-valuenow", row * columns + column);
    const where = rows > 1 ? `row ${row}, column ${column}` : `number ${column}`;
    element.setAttribute("aria-valuetext", `${where}: ${fmt(value)}`);
  };

  const point = (row, column) => {
    raster.mark(row, column);
    onPoint(row, column);
    openPopover(element, describe(row, column), mark.getBoundingClientRect());
  };
  const enter = (column, row) => {
    const same = row === raster.cell[0] && column === raster.cell[1] && !mark.hidden;
    if (!same || !element.hasAttribute("aria-describedby")) point(row, column);
  };
  onCells(canvas, { enter, leave: closePopover, choose: () => onPick(...raster.cell) });
  element.addEventListener("focus", () => element.matches(":focus-visible") && point(...raster.cell));
  element.addEventListener("blur", closePopover);
  element.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return closePopover();
    if (event.key === "Enter") return onPick(...raster.cell);
    const moved = moveCell(event.key, raster);
    if (!moved) return;
    event.preventDefault();
    point(...moved);
  });
  return raster;
}

/** The number that a key leads to, [row, column], or null. */
function moveCell(key, { grid: { rows, columns }, cell: [row, column] }) {
  const moved = {
    ArrowLeft: [row, column - 1],
    ArrowRight: [row, column + 1],
    ArrowUp: [row - 1, column],
    ArrowDown: [row + 1, column],
    Home: [row, 0],
    End: [row, columns - 1],
    PageUp: [row - 10, column],
    PageDown: [row + 10, column],
  }[key];
  return moved ? [clamp(moved[0], 0, rows - 1), clamp(moved[1], 0, columns - 1)] : null;
}

/** The size that gets the full colour: 99 % of the numbers are at most as large. */
export function limitOf(...arrays) {
  const sizes = [];
  for (const numbers of arrays) {
    const step = Math.max(1, Math.floor((numbers.length * arrays.length) / 5000));
    for (let i = 0; i < numbers.length; i += step) if (Number.isFinite(numbers[i])) sizes.push(Math.abs(numbers[i]));
  }
  const sorted = Float32Array.from(sizes).sort();
  return sorted[Math.floor(0.99 * (sorted.length - 1))] || sorted.at(-1) || 1;
}
