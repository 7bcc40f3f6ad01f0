// Many runs of the model one after another, on request, with progress.

import { h, letDraw } from "../dom.js";

/** A button that starts and stops a sweep: {element, update}. ``jobs()`` lists what to run, ``measure(job)`` resolves to a
 *  value, ``show(job, value)`` shows it. When one of ``inputs()`` changes, the sweep stops and ``clear()`` is called. */
export function makeSweep({ id, label, jobs, measure, show, clear, inputs }) {
  let current = null; // {inputs, running} of the results that are shown
  const button = h("button", { type: "button", id, on: { click: () => (current?.running ? stop("Stopped.") : start()) } });
  const progress = h("progress", { max: 1, value: 0, "aria-label": label });
  const status = h("span", { class: "note", role: "status", "aria-live": "polite" });

  const draw = (text) => {
    progress.hidden = !current?.running;
    button.textContent = current?.running ? "Stop" : label;
    status.textContent = text;
  };
  const stop = (text) => {
    current.running = false;
    draw(text);
  };
  const start = async () => {
    const sweep = (current = { inputs: inputs(), running: true });
    const list = jobs();
    clear();
    progress.value = 0;
    draw("");
    for (const [i, job] of list.entries()) {
      const value = await measure(job);
      await letDraw();
      update();
      if (current !== sweep || !sweep.running) return;
      show(job, value);
      progress.value = (i + 1) / list.length;
    }
    stop("Done.");
  };
  const update = () => {
    if (!current || inputs().every((x, i) => x === current.inputs[i])) return;
    current = null;
    clear();
    draw("");
  };
  draw("");
  return { element: h("div", { class: "row" }, button, progress, status), update };
}
