/** The messages of a conversation as elements. Those that have not changed stay in place. */

import { $, copy, icon, iconButton, make } from "./dom.js";
import { render } from "./markdown.js";
import { hideTip, tokenView } from "./tokens.js";

const ENDS = {
  length: "The answer reached its longest length.",
  cancelled: "Stopped.",
  partial: "The answer was interrupted; what had been written is kept.",
  content_filter: "A filter of the server ended the answer.",
  error: "The engine failed; what had been written is kept.",
};
const shown = new Map(); // id of a message → {signature, element, records}

/**
 * Show messages. dropped: ids of those that the model no longer sees. busy: an answer is being written. actions:
 * functions edit(message, content), regenerate(message), resume(message), choose(id), logprobs(message).
 */
export function showMessages(messages, { dropped, busy, actions }) {
  const elements = messages.map((message, index) => {
    const last = index === messages.length - 1;
    const state = [message, dropped.has(message.id), busy, last];
    const signature = JSON.stringify(state);
    let known = shown.get(message.id);
    if (known?.signature !== signature) {
      const records = known?.records;
      known = { signature, records: message.running ? null : records, element: null };
      shown.set(message.id, known);
      known.element = element(known, message, { dropped: dropped.has(message.id), busy, last, actions });
    }
    return known.element;
  });
  const gone = messages.filter((message) => dropped.has(message.id));
  if (gone.length) elements.splice(gone.length, 0, dropNote(gone));
  const place = $("messages");
  const ids = new Set(messages.map(({ id }) => id));
  for (const id of shown.keys()) if (!ids.has(id)) shown.delete(id);
  if (elements.length !== place.children.length || elements.some((one, i) => one !== place.children[i]))
    place.replaceChildren(...elements);
}

function dropNote(gone) {
  const what = gone.length === 1 ? "The message above is" : `The ${gone.length} messages above are`;
  return make("p", { className: "dropped-note", role: "note" },
    `${what} outside of the model’s window: the answer was written without them.`);
}

function element(known, message, { dropped, busy, last, actions }) {
  const body = make("div", { className: "body" });
  const foot = make("footer");
  const article = make("article", { className: `message ${message.role}`, "data-id": message.id }, body, foot);
  article.classList.toggle("dropped", dropped);
  article.classList.toggle("last", last);
  article.setAttribute("aria-label", message.role === "user" ? "You" : message.model);
  if (message.role === "user") body.textContent = message.content;
  else if (known.records) body.append(tokenView(known.records));
  else body.append(render(message.content));
  if (message.running) {
    if (message.role === "user") return article;
    article.classList.add("running");
    article.setAttribute("aria-busy", "true");
    foot.append(make("span", { className: "stats" }, "Reading …"));
    return article;
  }
  if (message.siblings.length > 1) foot.append(siblings(message, busy, actions));
  const copying = iconButton("copy", "Copy", () => copy(message.content, copying));
  foot.append(copying);
  if (message.role === "user") {
    foot.append(iconButton("edit", "Edit", () => edit(article, message, actions), { disabled: busy }));
    return article;
  }
  foot.append(iconButton("again", "Regenerate", () => actions.regenerate(message), { disabled: busy }));
  const toggle = async () => {
    hideTip();
    if (known.records) {
      known.records = null;
      body.replaceChildren(render(message.content));
    } else {
      known.records = await actions.logprobs(message);
      if (!known.records) return;
      body.replaceChildren(tokenView(known.records));
    }
    tokens.setAttribute("aria-pressed", Boolean(known.records));
  };
  const tokens = iconButton("tokens", "Token probabilities", toggle, { "aria-pressed": Boolean(known.records) });
  if (message.settings.logprobs !== false) foot.append(tokens);
  foot.append(make("span", { className: "stats" }, stats(message)));
  const end = ENDS[message.finish_reason];
  if (end && last) {
    const again = make("button", { type: "button", disabled: busy, onclick: () => actions.resume(message) }, "Continue");
    const note = make("p", { className: "end" }, end, message.content.trim() && message.finish_reason !== "content_filter" ? again : null);
    article.insertBefore(note, foot);
  }
  return article;
}

function siblings({ id, siblings: all }, busy, actions) {
  const at = all.indexOf(id);
  const step = (name, label, to) =>
    iconButton(name, label, () => actions.choose(all[to]), { disabled: busy || all[to] === undefined });
  return make("span", { className: "siblings" },
    step("left", "Previous version", at - 1),
    make("span", {}, `${at + 1}/${all.length}`),
    step("right", "Next version", at + 1));
}

/** Return the numbers of tokens and the speed of an answer in words. */
export function stats({ prompt_tokens, completion_tokens, first_token_seconds, seconds, model }) {
  const parts = [model, `${prompt_tokens.toLocaleString("en")} → ${completion_tokens.toLocaleString("en")} tokens`];
  const writing = seconds - first_token_seconds;
  if (completion_tokens > 1 && writing > 0) parts.push(`${((completion_tokens - 1) / writing).toFixed(1)} tokens/s`);
  if (first_token_seconds !== null) parts.push(`first after ${first_token_seconds.toFixed(2)} s`);
  return parts.join(" · ");
}

/** Show more of the answer that is being written, without building the other messages again. */
export function showProgress(message, text) {
  const article = shown.get(message.id)?.element;
  if (!article) return;
  article.querySelector(".body").replaceChildren(render(message.content));
  article.querySelector(".stats").textContent = text;
}

function edit(article, message, actions) {
  const input = make("textarea", { value: message.content, "aria-label": "Edit the message" });
  const send = make("button", { type: "submit", className: "primary" }, "Send");
  const cancel = make("button", { type: "button" }, "Cancel");
  const form = make("form", { className: "edit" }, input, make("div", { className: "buttons" }, cancel, send));
  const hidden = [...article.children];
  const back = () => {
    form.remove();
    article.append(...hidden);
  };
  cancel.onclick = back;
  form.onsubmit = (event) => {
    event.preventDefault();
    if (!input.value.trim()) return;
    back();
    actions.edit(message, input.value);
  };
  input.onkeydown = (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      back();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  };
  article.replaceChildren(form);
  input.style.height = `${Math.min(input.scrollHeight + 4, innerHeight / 2)}px`;
  input.focus();
}

/** Show what there is before the first message. */
export function showWelcome(model) {
  shown.clear();
  if (!model) return $("messages").replaceChildren();
  const size = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(model.parameters);
  const facts = `${size} parameters · ${model.layers} layers · window of ${model.window.toLocaleString("en")} tokens · ${model.weights}`;
  const missing = "This model has no chat template, so it cannot answer messages; start the server with --chat-template chatml.";
  $("messages").replaceChildren(
    make("div", { className: "welcome" }, icon("send"), make("h2", {}, model.name),
      make("p", { className: "hint" }, facts), model.chats ? null : make("p", {}, missing)),
  );
}
