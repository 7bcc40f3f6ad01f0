// Keyboard in a table of buttons.

/** Let the arrow keys move the focus in a table whose ``buttons()`` are listed row by row. One of them is in the tab order.
 *  ``onMove(index)`` is called after a move. */
export function moveByArrows(table, columns, buttons, onMove = () => {}) {
  table.setAttribute("data-keys", ""); // the page's own arrow keys stay out
  table.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    const list = buttons();
    const at = list.indexOf(event.target);
    if (!step || at < 0) return;
    event.preventDefault();
    const next = at + step;
    if (!list[next]) return;
    list[at].tabIndex = -1;
    list[next].tabIndex = 0;
    list[next].focus();
    onMove(next);
  });
}
