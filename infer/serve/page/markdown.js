/**
 * Markdown of a model as elements that run nothing and load nothing.
 *
 * HTML in the text is shown as text. What is made of the Markdown passes DOMPurify with a short list of elements, none
 * of which loads anything; the page's Content-Security-Policy is a third wall.
 */

import purify from "./vendor/purify.es.mjs";
import hljs from "./vendor/highlight.min.js";
import { Marked } from "./vendor/marked.esm.js";
import { copy, iconButton, make } from "./dom.js";

const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};
const LONGEST_HIGHLIGHTED = 50_000; // characters; longer code stays plain

const escape = (text) =>
  text.replace(/[&<>"']/g, (one) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" })[one]);

const marked = new Marked({
  gfm: true,
  renderer: {
    code({ text, lang }) {
      const name = (lang ?? "").trim().split(/\s/)[0].toLowerCase();
      const known = hljs.getLanguage(name) && text.length < LONGEST_HIGHLIGHTED;
      const inner = known ? hljs.highlight(text, { language: name, ignoreIllegals: true }).value : escape(text);
      return `<pre><code class="language-${escape(name)}">${inner}</code></pre>`;
    },
    html({ text }) {
      return /^<br\s*\/?>$/i.test(text.trim()) ? "<br>" : escape(text);
    },
    image({ href, text }) {
      return `<a href="${escape(href)}">${escape(text || href)}</a>`;
    },
    checkbox({ checked }) {
      return checked ? "☑ " : "☐ ";
    },
  },
});

/** Return the elements of a text in Markdown, in which code can be copied. */
export function render(text) {
  const fragment = purify.sanitize(marked.parse(text), ALLOWED);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const table of fragment.querySelectorAll("table")) {
    const scroller = make("div", { className: "scroller", tabIndex: 0 });
    table.replaceWith(scroller);
    scroller.append(table);
  }
  for (const pre of fragment.querySelectorAll("pre")) {
    const code = pre.firstElementChild;
    const language = code.className.replace("language-", "");
    const button = iconButton("copy", "Copy the code", () => copy(code.textContent, button));
    const block = make("div", { className: "code" }, make("div", { className: "code-bar" }, language, button));
    pre.replaceWith(block);
    pre.tabIndex = 0; // so that the keyboard can scroll it
    block.append(pre);
  }
  return fragment;
}
