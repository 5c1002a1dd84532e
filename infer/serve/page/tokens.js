/** The tokens of an answer, coloured by their probability, with the most likely alternatives of each. */

import { $, make } from "./dom.js";

const percent = (logprob) => {
  const value = 100 * Math.exp(logprob);
  return value >= 9.95 ? `${value.toFixed(0)} %` : value >= 0.095 ? `${value.toFixed(1)} %` : "< 0.1 %";
};
const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ | $/g, "␣") || "∅";

/** Return an element of tokens [text, logprob, [[text, logprob], …]]. */
export function tokenView(records) {
  const total = records.reduce((sum, [, logprob]) => sum + logprob, 0);
  const perplexity = Math.exp(-total / Math.max(1, records.length));
  const note = `${records.length} tokens, perplexity ${perplexity.toFixed(2)}; point at one to see what else was likely.`;
  const text = make("div", { className: "tokens" });
  for (const record of records) {
    const [content, logprob] = record;
    const token = make("span", { className: "token", tabIndex: 0 }, content.startsWith("bytes:") ? "�" : content);
    token.style.setProperty("--doubt", Math.min(1, -logprob / 4).toFixed(3));
    token.onpointerenter = token.onfocus = token.onclick = () => showTip(token, record);
    token.onpointerleave = token.onblur = hideTip;
    text.append(token);
  }
  return make("div", {}, make("p", { className: "hint" }, note), text);
}

function showTip(token, [content, logprob, alternatives]) {
  const tip = $("tip");
  const rows = [...alternatives];
  if (!rows.some(([text]) => text === content)) rows.push([content, logprob]);
  tip.replaceChildren(
    ...rows.map(([text, value]) => {
      const bar = make("i");
      bar.style.width = `${100 * Math.exp(value)}%`;
      return make(
        "div",
        { className: text === content ? "row chosen" : "row" },
        make("code", {}, visible(text)),
        make("span", { className: "meter" }, bar),
        make("span", {}, percent(value)),
      );
    }),
  );
  tip.hidden = false;
  const at = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const left = Math.min(at.left, innerWidth - tip.offsetWidth - 12);
  const above = at.top - tip.offsetHeight - 6;
  tip.style.left = `${Math.max(12, left)}px`;
  tip.style.top = `${above > 8 ? above : at.bottom + 6}px`;
}

/** Hide the alternatives. */
export function hideTip() {
  $("tip").hidden = true;
}
