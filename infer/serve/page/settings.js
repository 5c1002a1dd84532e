/** How answers are drawn: kept in this browser, changed in the panel of settings. */

import { $, make } from "./dom.js";

const PLACE = "isoflop.sampling";
const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, initial: 0.7,
    hint: "0 takes the most likely token every time; higher is more varied." },
  { name: "top_p", label: "Top-p", min: 0.05, max: 1, step: 0.01, initial: 0.95,
    hint: "Draw from the fewest tokens with this probability; 1 is off." },
  { name: "top_k", label: "Top-k", min: 0, step: 1, initial: 0, hint: "Draw from so many tokens; 0 is off." },
  { name: "max_tokens", label: "Longest answer", min: 1, step: 1, initial: 1024,
    hint: "In tokens; empty for what fits the window.", optional: true },
  { name: "seed", label: "Seed", min: 0, step: 1, initial: null, optional: true,
    hint: "The same seed gives the same answer; empty for another every time." },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.01, initial: 1,
    hint: "Divides the scores of tokens seen before; 1 is off." },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, initial: 0,
    hint: "Lowers tokens that are in the answer; 0 is off." },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, initial: 0,
    hint: "Lowers them by how often they are; 0 is off." },
];
const DEFAULTS = Object.fromEntries(FIELDS.map(({ name, initial }) => [name, initial]));

let values = load();

function load() {
  try {
    const stored = JSON.parse(localStorage.getItem(PLACE)) ?? {};
    return { ...DEFAULTS, ...Object.fromEntries(Object.entries(stored).filter(([name]) => name in DEFAULTS)) };
  } catch {
    return { ...DEFAULTS };
  }
}

/** Return the settings of a request. */
export const sampling = () => Object.fromEntries(Object.entries(values).filter(([, value]) => value !== null));

/** Return the settings in a few words: those that are always of interest, and all that were changed. */
export function summary() {
  const shown = FIELDS.filter(
    ({ name, initial }) => ["temperature", "top_p"].includes(name) || values[name] !== initial,
  );
  return shown.map(({ name, label }) => `${label.toLowerCase()} ${values[name] ?? "none"}`).join(" · ");
}

/** Build the form; changed: called after each change. */
export function buildForm(changed) {
  const form = $("sampling");
  const show = () => {
    for (const field of FIELDS) {
      const { number, range, row } = form.fields[field.name];
      number.value = values[field.name] ?? "";
      if (range) range.value = values[field.name];
      row.classList.toggle("changed", values[field.name] !== field.initial);
    }
    changed();
  };
  const set = (field, given) => {
    const value = given === "" && field.optional ? null : Number(given);
    if (value !== null && (given === "" || value < field.min || value > (field.max ?? Infinity))) return show();
    values[field.name] = field.step === 1 && value !== null ? Math.round(value) : value;
    localStorage.setItem(PLACE, JSON.stringify(values));
    show();
  };
  form.fields = {};
  for (const field of FIELDS) {
    const { name, label, hint, min, max = "", step } = field;
    const number = make("input", { type: "number", id: name, min, max, step, inputMode: "decimal" });
    number.onchange = () => set(field, number.value);
    let range = null;
    if (step < 1 && ["temperature", "top_p"].includes(name)) {
      range = make("input", { type: "range", min, max, step, "aria-label": label });
      range.oninput = () => set(field, range.value);
    }
    const head = make("div", { className: "setting-head" }, make("label", { htmlFor: name }, label), number);
    const row = make("div", { className: "setting" }, head, range, make("span", { className: "hint" }, hint));
    form.fields[name] = { number, range, row };
    form.append(row);
  }
  form.onsubmit = (event) => event.preventDefault();
  $("reset").onclick = () => {
    values = { ...DEFAULTS };
    localStorage.removeItem(PLACE);
    show();
  };
  show();
}
