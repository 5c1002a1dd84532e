/** Small helpers to build and find elements. Text is always set as text, never as HTML. */

const ICONS = {
  close: "M6 6l12 12M18 6L6 18",
  copy: "M9 9h10v11H9zM5 15V4h10",
  dark: "M20 14.500A8.500 8.500 0 0 1 9.500 4a8.500 8.500 0 1 0 10.500 10.500z",
  edit: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  left: "M14 6l-6 6 6 6",
  light: "M12 8a4 4 0 1 0 .01 0M12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.500 1.500M17.500 17.500L19 19M19 5l-1.500 1.500M6.500 17.500L5 19",
  list: "M4 7h16M4 12h16M4 17h10",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  right: "M10 6l6 6-6 6",
  again: "M19 12a7 7 0 1 1-2-5l2 2M19 4v5h-5",
  send: "M12 19V5M6 11l6-6 6 6",
  settings: "M4 8h9M19 8h1M4 16h1M11 16h9M16 5.500v5M8 13.500v5",
  stop: "M7 7h10v10H7z",
  system: "M12 4a8 8 0 1 0 .01 0M12 4v16",
  tokens: "M4 6h6v5H4zM13 6h7v5h-7zM4 14h9v5H4zM16 14h4v5h-4z",
};

/** Return the element with this id. */
export const $ = (id) => document.getElementById(id);

/** Return a new element. props: properties of it, or attributes where the name has a hyphen or is "role". */
export function make(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Return an icon that screen readers skip. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(svg.namespaceURI, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** Return a button with an icon and a name. */
export function iconButton(name, label, onclick, props = {}) {
  return make("button", { type: "button", className: "icon", title: label, "aria-label": label, onclick, ...props }, icon(name));
}

/** Put text on the clipboard, and show on the button that it is there. */
export async function copy(text, button) {
  await navigator.clipboard.writeText(text);
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 1200);
}

/**
 * Ask in a dialog: a question with an input if `value` is given. Return the input's text, or true; null if cancelled.
 */
export function ask({ title, text = "", value = null, type = "text", yes = "OK", danger = false }) {
  const dialog = $("dialog");
  const form = dialog.querySelector("form");
  const input = form.querySelector("input");
  const [no, ok] = form.querySelectorAll("button");
  form.querySelector("h2").textContent = title;
  form.querySelector("p").textContent = text;
  input.hidden = value === null;
  input.type = type;
  input.value = value ?? "";
  input.setAttribute("aria-label", title);
  ok.textContent = yes;
  ok.classList.toggle("danger", danger);
  return new Promise((resolve) => {
    let result = null;
    form.onsubmit = (event) => {
      event.preventDefault();
      result = value === null ? true : input.value;
      dialog.close();
    };
    no.onclick = () => dialog.close();
    dialog.onclose = () => resolve(result);
    dialog.showModal();
    (value === null ? ok : input).focus();
    if (value) input.select();
  });
}
