// A button that copies the address, which restores this state.

import { h } from "../dom.js";

export function makeCopyLink(store) {
  const status = h("span", { class: "note", role: "status", "aria-live": "polite", "data-what": "copied" });
  const field = h("input", { type: "text", id: "link", readonly: true, hidden: true, "aria-label": "Link to this state" });
  const address = () => location.href.split("#")[0] + store.link();
  const copy = async () => {
    field.value = address();
    try {
      await navigator.clipboard.writeText(field.value);
      field.hidden = true;
      status.textContent = "Copied.";
    } catch {
      field.hidden = false;
      field.focus();
      field.select();
      status.textContent = "The browser does not let this page copy: copy the selected link.";
    }
  };
  const button = h("button", { type: "button", id: "copy-link", text: "Copy link", on: { click: copy } });
  const update = () => {
    if (field.value === "" || field.value === address()) return;
    field.value = status.textContent = ""; // of another state
    field.hidden = true;
  };
  return { element: h("div", { class: "row copy" }, button, status, field), update };
}
