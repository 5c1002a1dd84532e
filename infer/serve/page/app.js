/** The chat page: which conversation is shown, which answers are being written, and what the buttons do. */

import * as api from "./api.js";
import { $, ask, icon, make } from "./dom.js";
import { showMessages, showProgress, showWelcome } from "./messages.js";
import { buildForm, sampling, summary } from "./settings.js";
import { hideTip } from "./tokens.js";

const THEMES = ["auto", "light", "dark"];
const NEAR_END = 80; // pixels from the end of the messages within which new text keeps them at the end

const state = {
  models: [],
  conversation: null, // the one that is shown; null for a new one
  answers: new Map(), // id of a conversation → its conversation while this page receives an answer
  stopped: new Set(), // ids of conversations whose answer is stopped as soon as it has begun
  loads: 0, // counts what was shown, so that a late response for another conversation is dropped
};

const busy = () => Boolean(state.conversation && (lastMessage()?.running || state.answers.has(state.conversation.id)));
const lastMessage = () => state.conversation?.messages.at(-1);
const modelNamed = (name) => state.models.find((one) => one.name === name);
const isNarrow = () => matchMedia("(max-width: 820px)").matches;

// What is shown

function show() {
  const { conversation } = state;
  const title = conversation?.title || "New conversation";
  $("title").textContent = title;
  document.title = conversation?.title ? `${title} – isoflop` : "isoflop";
  $("menu").disabled = !conversation;
  if (!conversation || !conversation.messages.length) showWelcome(modelNamed($("model").value));
  else {
    const dropped = new Set(lastMessage().dropped);
    showMessages(conversation.messages, { dropped, busy: busy(), actions });
  }
  const before = modelNamed($("model").value)?.system;
  $("server-system").textContent = `The server puts before it: ${before}`;
  $("server-system").hidden = !before;
  showSend();
}

function showSend() {
  const stops = busy();
  $("send").replaceChildren(icon(stops ? "stop" : "send"));
  $("send").setAttribute("aria-label", stops ? "Stop" : "Send");
  $("send").title = stops ? "Stop (Esc)" : "Send (Enter)";
  $("send").disabled = !stops && !$("input").value.trim();
}

function toEnd() {
  $("messages").scrollTop = $("messages").scrollHeight;
}

const isAtEnd = () => {
  const { scrollTop, scrollHeight, clientHeight } = $("messages");
  return scrollHeight - scrollTop - clientHeight < NEAR_END;
};

function showError(error) {
  const known = error instanceof api.ApiError;
  if (!known) console.error(error);
  $("error").firstElementChild.textContent = known ? error.message : `The page failed: ${error.message}.`;
  $("error").hidden = false;
}

const hideError = () => ($("error").hidden = true);

/** Return a handler of events that shows errors of an async function. */
const shown = (work) => async (...given) => {
  try {
    return await work(...given);
  } catch (error) {
    showError(error);
    return null;
  }
};

async function showList() {
  const search = $("search").value.trim();
  const found = await api.list(search);
  if (search !== $("search").value.trim()) return;
  const items = found.map(({ id, title }) => {
    const link = make("a", { href: `#${id}`, title }, title || "New conversation");
    if (id === state.conversation?.id) link.setAttribute("aria-current", "page");
    return link;
  });
  if (!items.length) items.push(make("p", { className: "hint" }, search ? "Nothing found." : "No conversations yet."));
  $("list").replaceChildren(...items);
}

/** Show the conversation that the address names. */
async function open() {
  const load = ++state.loads;
  const id = Number(location.hash.slice(1)) || null;
  hideTip();
  hideError();
  let conversation = state.answers.get(id) ?? null;
  if (id && !conversation) {
    try {
      conversation = await api.read(id);
    } catch (error) {
      if (error.status !== 404) throw error;
      history.replaceState(null, "", "#");
      showError(error);
    }
  }
  if (load !== state.loads) return;
  state.conversation = conversation;
  $("system").value = conversation?.system ?? "";
  if (conversation && modelNamed(conversation.model)) $("model").value = conversation.model;
  show();
  toEnd();
  if (isNarrow()) closePanels();
  else $("input").focus();
  await showList();
  if (lastMessage()?.running && !state.answers.has(id)) await follow(load);
}

/** Show an answer that another window receives, until it ends. */
async function follow(load) {
  while (load === state.loads && lastMessage()?.running) {
    await new Promise((resolve) => setTimeout(resolve, 1000));
    const conversation = await api.read(state.conversation.id);
    if (load !== state.loads) return;
    const end = isAtEnd();
    state.conversation = conversation;
    show();
    if (end) toEnd();
  }
}

// Answers

/** Return a conversation as it will be when the server begins the answer that `body` requests. */
function expected(conversation, body) {
  const { messages } = conversation;
  const parent = body.parent === undefined ? messages.at(-1)?.id ?? null : body.parent;
  const kept = messages.slice(0, messages.findIndex(({ id }) => id === parent) + 1);
  const added = { siblings: [], settings: {}, dropped: [], running: true, content: "" };
  if (body.content) kept.push({ ...added, id: "question", role: "user", content: body.content });
  if (body.continue) kept.push({ ...kept.pop(), running: true });
  else kept.push({ ...added, id: "answer", role: "assistant", model: $("model").value });
  return { ...conversation, messages: kept };
}

/** Have an answer written into a conversation and show it as it arrives. Return whether it began. */
async function receive(id, body) {
  hideError();
  const shownNow = () => state.conversation?.id === id;
  let conversation = null;
  const before = state.conversation;
  state.conversation = expected(before, body);
  state.answers.set(id, state.conversation);
  show();
  toEnd();
  const begun = performance.now();
  const progress = { waiting: false, tokens: 0, first: 0 };
  const update = () => {
    progress.waiting = false;
    if (!shownNow() || !message.running) return;
    const start = performance.now();
    const end = isAtEnd();
    const seconds = (start - progress.first) / 1000;
    const speed = progress.tokens > 1 && seconds > 0.2 ? ` · ${(progress.tokens / seconds).toFixed(1)} tokens/s` : "";
    showProgress(message, `${message.completion_tokens} tokens${speed}`);
    if (end) toEnd();
    progress.cost = performance.now() - start;
  };
  let message = null;
  try {
    const request = { ...body, model: $("model").value || null, settings: { ...sampling(), logprobs: true } };
    for await (const event of api.answer(id, request)) {
      if (event.type === "start") {
        conversation = event.conversation;
        message = conversation.messages.at(-1);
        state.answers.set(id, conversation);
        if (shownNow()) {
          const end = isAtEnd();
          state.conversation = conversation;
          show();
          if (end) toEnd();
        }
        shown(showList)();
        if (state.stopped.delete(id)) shown(api.stop)(id);
      } else if (event.type === "text") {
        message.content += event.text;
        message.completion_tokens += event.tokens;
        if (progress.first) progress.tokens += event.tokens;
        else progress.first = performance.now();
        if (!progress.waiting) { // long answers are drawn less often, so that drawing takes a part of the time only
          progress.waiting = true;
          setTimeout(() => requestAnimationFrame(update), 3 * (progress.cost ?? 0));
        }
      } else Object.assign(message, event.message);
    }
  } catch (error) {
    showError(error);
  }
  state.answers.delete(id);
  state.stopped.delete(id);
  if (!shownNow()) return conversation !== null;
  if (!conversation || message.running) { // it was refused, failed, or the connection broke
    try {
      state.conversation = await api.read(id);
    } catch {
      if (message) Object.assign(message, { running: false, finish_reason: "partial" });
      else state.conversation = before;
    }
  }
  const end = isAtEnd();
  show();
  if (end) toEnd();
  return conversation !== null;
}

const send = shown(async () => {
  const content = $("input").value;
  if (!content.trim() || busy() || $("send").classList.contains("pending")) return;
  $("send").classList.add("pending");
  $("input").value = "";
  grow();
  showSend();
  try {
    if (!state.conversation) {
      const made = await api.create({ system: $("system").value, model: $("model").value });
      ++state.loads;
      state.conversation = made;
      history.pushState(null, "", `#${made.id}`);
    }
    const began = receive(state.conversation.id, { content });
    $("send").classList.remove("pending");
    if (!(await began) && !$("input").value) $("input").value = content;
  } catch (error) {
    $("input").value = content;
    throw error;
  } finally {
    $("send").classList.remove("pending");
    grow();
    showSend();
  }
});

const stop = shown(async () => {
  if (!busy()) return;
  const { id } = state.conversation;
  if (!(await api.stop(id)).done && state.answers.has(id)) state.stopped.add(id);
});

const actions = {
  edit: shown((message, content) => receive(state.conversation.id, { content, parent: message.parent })),
  regenerate: shown((message) => receive(state.conversation.id, { parent: message.parent })),
  resume: shown((message) => receive(state.conversation.id, { parent: message.id, continue: true })),
  logprobs: shown((message) => api.logprobs(state.conversation.id, message.id)),
  choose: shown(async (id) => {
    state.conversation = await api.choose(state.conversation.id, id);
    show();
  }),
};

// The menu of a conversation

const inMenu = {
  async rename() {
    const title = await ask({ title: "Rename", value: state.conversation.title, yes: "Rename" });
    if (title === null) return;
    state.conversation.title = (await api.update(state.conversation.id, { title })).title;
    show();
    await showList();
  },
  json: () => save("json"),
  markdown: () => save("markdown"),
  async delete() {
    const { id, title } = state.conversation;
    const text = `“${title || "New conversation"}” and all its versions will be gone.`;
    if (!(await ask({ title: "Delete this conversation?", text, yes: "Delete", danger: true }))) return;
    await api.remove(id);
    location.hash = "";
    await open();
  },
};

async function save(format) {
  const { name, blob } = await api.exported(state.conversation.id, format);
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function openMenu(opened) {
  $("menu-items").hidden = !opened;
  $("menu").setAttribute("aria-expanded", opened);
}

// Panels, theme, keyboard

function closePanels() {
  document.body.classList.remove("list-open");
  if (isNarrow()) openSettings(false);
  $("scrim").hidden = true;
}

function openList() {
  document.body.classList.add("list-open");
  $("scrim").hidden = false;
}

function openSettings(opened) {
  $("settings").hidden = !opened;
  $("show-settings").setAttribute("aria-expanded", opened);
  $("scrim").hidden = !(opened && isNarrow());
}

function setTheme(theme) {
  if (theme === "auto") localStorage.removeItem("isoflop.theme");
  else localStorage.setItem("isoflop.theme", theme);
  document.documentElement.dataset.theme = theme;
  const label = { auto: "Theme of the system", light: "Light theme", dark: "Dark theme" }[theme];
  $("theme").replaceChildren(icon(theme === "auto" ? "system" : theme));
  $("theme").title = label;
  $("theme").setAttribute("aria-label", label);
}

function grow() {
  $("input").style.height = "auto";
  $("input").style.height = `${Math.min($("input").scrollHeight, innerHeight * 0.4)}px`;
}

function prepare() {
  setTheme(localStorage.getItem("isoflop.theme") ?? "auto");
  const icons = {
    "show-sidebar": "list", "hide-sidebar": "close", menu: "more", "show-settings": "settings", "hide-settings": "close",
  };
  for (const [id, name] of Object.entries(icons)) $(id).append(icon(name));
  $("new").prepend(icon("edit"));
  $("error").lastElementChild.append(icon("close"));
  $("error").lastElementChild.onclick = hideError;
  $("theme").onclick = () =>
    setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
  $("new").onclick = () => {
    if (location.hash.length > 1) location.hash = "";
    else shown(open)();
  };
  let typing = 0;
  $("search").oninput = () => {
    clearTimeout(typing);
    typing = setTimeout(shown(showList), 200);
  };
  $("show-sidebar").onclick = openList;
  $("list").onclick = () => isNarrow() && closePanels();
  $("hide-sidebar").onclick = $("scrim").onclick = closePanels;
  $("show-settings").onclick = $("summary").onclick = () => openSettings($("settings").hidden);
  $("hide-settings").onclick = () => openSettings(false);
  $("menu").onclick = () => openMenu($("menu-items").hidden);
  $("menu-items").onclick = (event) => {
    const name = event.target.dataset.do;
    if (name) shown(inMenu[name])();
  };
  document.addEventListener("click", (event) => {
    if (!event.target.closest("#menu")) openMenu(false);
  });
  buildForm(() => ($("summary").textContent = summary()));
  $("system").onchange = shown(async () => {
    if (state.conversation) {
      state.conversation.system = (await api.update(state.conversation.id, { system: $("system").value })).system;
    }
  });
  $("model").onchange = shown(async () => {
    if (state.conversation) await api.update(state.conversation.id, { model: $("model").value });
    else show();
  });
  $("composer").onsubmit = (event) => {
    event.preventDefault();
    if (busy()) stop();
    else send();
  };
  $("input").oninput = () => {
    grow();
    showSend();
  };
  $("input").onkeydown = (event) => {
    const touch = matchMedia("(pointer: coarse)").matches; // keyboards on glass have no Shift+Enter
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || touch) return;
    event.preventDefault();
    send();
  };
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || $("dialog").open) return;
    hideTip();
    if (!$("menu-items").hidden) openMenu(false);
    else if (busy()) stop();
    else closePanels();
  });
  $("messages").addEventListener("scroll", hideTip, { passive: true });
  addEventListener("hashchange", shown(open));
}

async function begin() {
  prepare();
  api.onMissingKey((text) =>
    ask({ title: "API key", text: text || "This server wants a key; it is kept until the tab is closed.", value: "",
      type: "password", yes: "Use it" }));
  const { models, stored } = await api.models();
  state.models = models;
  $("not-stored").hidden = stored;
  $("model").replaceChildren(
    ...models.map(({ name, chats }) => make("option", { value: name }, chats ? name : `${name} (no chat template)`)),
  );
  $("model").disabled = models.length < 2;
  await open();
}

shown(begin)();
