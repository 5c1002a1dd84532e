"""The page in a browser, as its users use it."""

import dataclasses
import json

import pytest

from infer.serve.served import Registry
from infer.serve.settings import Settings

pytestmark = pytest.mark.long

MARKDOWN = """# Title

Some *text* with `code` and a [link](https://example.org/a).

| left | right |
|---|--:|
| a | 1 |

```python
def f(x):
    return "y"
```

- [x] done
"""


def test_a_conversation_of_50_turns(page):
    page.set("max_tokens", 6)
    page.one("#show-settings").click()
    page.one("#system").send_keys("Be brief.")
    for number in range(50):
        page.say(f"turn {number}")
    texts = page.texts
    assert len(texts) == 100
    assert texts[::2] == [f"turn {number}" for number in range(50)]
    assert all("tokens" in one.text for one in page(".message.assistant .stats")[-1:])
    # The window is 96 tokens: the oldest turns were dropped, the page says which, and the last turn is kept.
    dropped = page(".message.dropped")
    assert 80 <= len(dropped) < 100
    assert len(dropped) % 2 == 0
    assert page.one(".dropped-note").text.startswith(f"The {len(dropped)} messages above are outside")
    assert page("#messages > *")[len(dropped)].get_attribute("class") == "dropped-note"
    page.driver.refresh()
    page.until(lambda: len(page(".message")) == 100)
    assert page.texts == texts
    assert page.one("#system").get_attribute("value") == "Be brief."
    assert page.one("#title").text == "turn 0"


def test_streams_and_stops_by_button_and_by_escape(page, script):
    words = " ".join(f"word{number}" for number in range(400))
    for stop in ("button", "escape"):
        page.open()
        page.write(script.add("long", words, pause=0.03))
        page.until(lambda: "word3" in page.texts[-1])
        early = page.texts[-1]
        page.until(lambda early=early: len(page.texts[-1]) > len(early))
        assert "tokens" in page.one(".running .stats").text
        if stop == "button":
            page.one("#send").click()
        else:
            page.one("#input").send_keys("\ue00c")
        page.idle()
        text = page.texts[-1]
        assert text.startswith(early)
        assert words.startswith(text.strip())
        assert len(text) < len(words)
        assert page.one(".end").text.startswith("Stopped.")
        page.driver.refresh()
        page.until(lambda: page.one("#title").text.startswith("say:"))
        assert page.texts[-1] == text
        # Continue appends to the answer.
        script.add("long", "and on", pause=0)
        page.one(".end button").click()
        page.until(lambda: not page.busy and page.texts[-1].endswith("and on"))
        assert page.texts[-1].startswith(text.strip())


def test_edit_regenerate_and_versions(page, script):
    page.say(script.add("first", "Alpha"))
    page.say(script.add("second", "Beta"))
    script.add("second", "Gamma")
    page.button("Regenerate")
    page.until(lambda: page.texts[-1] == "Gamma" and not page.busy)
    assert page("article:last-child .siblings")[0].text == "2/2"
    page.button("Previous version")
    page.until(lambda: page.texts[-1] == "Beta")
    assert page("article:last-child .siblings")[0].text == "1/2"
    page.button("Next version")
    page.until(lambda: page.texts[-1] == "Gamma")
    # Edit the first message: its answer and all below belong to the other version.
    page.button("Edit", 0)
    box = page.one(".edit textarea")
    assert box.get_attribute("value") == "say:first"
    box.clear()
    box.send_keys(script.add("other", "Delta") + "\ue007")
    page.until(lambda: page.texts == ["say:other", "Delta"] and not page.busy)
    page.button("Previous version", 0)
    page.until(lambda: page.texts == ["say:first", "Alpha", "say:second", "Gamma"])
    # Escape leaves the editor without a change.
    page.button("Edit", 0)
    page.one(".edit textarea").send_keys("x\ue00c")
    assert page.texts == ["say:first", "Alpha", "say:second", "Gamma"]
    # Shift+Enter is a line end.
    page.write("two", "\ue008\ue007\ue008lines")
    assert page.one("#input").get_attribute("value") == "two\nlines"


def test_settings_reach_the_model_and_are_kept(page, url):
    assert "temperature 0.7" in page.one("#summary").text
    page.one("#show-settings").click()
    for name, value in {"temperature": 0, "max_tokens": 3, "top_k": 5, "seed": 11, "presence_penalty": 0.5}.items():
        page.set(name, value)
    assert page.one("#summary").text == (
        "temperature 0 · top-p 0.95 · top-k 5 · longest answer 3 · seed 11 · presence penalty 0.5"
    )
    page.set("top_p", 7)  # out of range: stays as it was
    assert page.one("#top_p").get_attribute("value") == "0.95"
    page.say("a")
    stored = page.js("return fetch('api/conversations/' + location.hash.slice(1)).then((one) => one.json())")
    settings = stored["messages"][-1]["settings"]
    expected = {"temperature": 0, "top_p": 0.95, "top_k": 5, "max_tokens": 3, "seed": 11, "presence_penalty": 0.5}
    assert {name: settings[name] for name in expected} == expected
    assert stored["messages"][-1]["completion_tokens"] <= 3
    page.driver.refresh()
    page.until(lambda: page.one("#temperature").get_attribute("value") == "0")
    page.one("#show-settings").click()
    page.one("#reset").click()
    assert page.one("#summary").text == "temperature 0.7 · top-p 0.95"


def test_markdown_code_and_tokens(page, script):
    page.say(script.add("markdown", MARKDOWN))
    assert page.one(".body h1").text == "Title"
    assert [one.text for one in page(".body td")] == ["a", "1"]
    assert page(".body pre .hljs-keyword")[0].text == "def"
    link = page.one(".body a")
    assert link.get_attribute("href") == "https://example.org/a"
    assert "noopener" in link.get_attribute("rel")
    assert "☑ done" in page.texts[-1]
    page.button("Token probabilities")
    page.until(lambda: page(".token"))
    assert "".join(page.js("return [...document.querySelectorAll('.token')].map((one) => one.textContent)")) == MARKDOWN
    page.js("document.querySelectorAll('.token')[3].dispatchEvent(new Event('pointerenter'))")
    assert "50 %" in page.one("#tip").text
    assert "22 %" in page.one("#tip").text
    page.button("Token probabilities")
    page.until(lambda: page(".body h1"))


def test_export_rename_search_and_delete(page, script, downloads):
    page.say(script.add("thing", "A **thing**."))

    def choose(name):
        page.one("#menu").click()
        page.one(f'[data-do="{name}"]').click()

    choose("rename")
    box = page.one("#dialog input")
    box.clear()
    box.send_keys("A conversation of things\ue007")
    page.until(lambda: page.one("#title").text == "A conversation of things")
    for form, suffix in (("json", "json"), ("markdown", "md")):
        choose(form)
        file = downloads / f"a-conversation-of-things.{suffix}"
        page.until(file.exists)
        page.until(lambda file=file: file.stat().st_size)
    exported = json.loads((downloads / "a-conversation-of-things.json").read_text())
    assert [one["content"] for one in exported["messages"]] == ["say:thing", "A **thing**."]
    assert "A **thing**." in (downloads / "a-conversation-of-things.md").read_text()
    page.one("#search").send_keys("of things")
    page.until(lambda: [one.text for one in page("#list a")] == ["A conversation of things"])
    choose("delete")
    page.until(lambda: page.one("#dialog").get_attribute("open"))
    page.one('#dialog button[value="yes"]').click()
    page.until(lambda: page(".welcome"))
    page.until(lambda: page.one("#list").text == "Nothing found.")


def test_errors_are_one_sentence_and_the_message_is_kept(page):
    page.say("a")
    page.write("z" * 120)
    page.until(lambda: page.one("#error").is_displayed())
    assert page.one("#error span").text.startswith("The last message has ")
    assert page.one("#error span").text.endswith("96 tokens; shorten the message.")
    page.until(lambda: page.one("#input").get_attribute("value") == "z" * 120)
    assert len(page.texts) == 2
    [complaint] = page.complaints
    assert "400" in complaint


def test_the_key_is_asked_for_and_kept_in_the_tab(page_at, serving, url):
    with serving(Settings(api_keys=("open sesame",))) as address:
        page = page_at(address)
        page.driver.get(address)
        page.until(lambda: page.one("#dialog").get_attribute("open"))
        page.one("#dialog input").send_keys("wrong\ue007")
        page.until(lambda: page.one("#dialog p").text == "That key is wrong.")
        page.one("#dialog input").send_keys("open sesame\ue007")
        page.until(lambda: page(".welcome"))
        page.set("max_tokens", 3)
        page.say("Hello")
        page.driver.refresh()
        page.until(lambda: len(page(".message")) == 2)
        assert page.js("return sessionStorage.getItem('isoflop.key')") == "open sesame"
        assert page.js("return JSON.stringify(localStorage)").count("sesame") == 0
        page.js("sessionStorage.clear(); localStorage.clear()")
        assert all("401" in one for one in page.complaints)


def test_themes_and_a_phone(page, script):
    page.say(script.add("markdown", MARKDOWN))
    backgrounds = []
    for _ in range(3):
        backgrounds.append(page.js("return getComputedStyle(document.documentElement).backgroundColor"))
        page.one("#theme").click()
    assert len(set(backgrounds)) == 2  # the system's is one of the others
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        assert page.js("return document.documentElement.scrollWidth") <= 390
        page.until(lambda: not page.one("#sidebar").is_displayed())
        page.one("#show-sidebar").click()
        page.until(lambda: page.one("#sidebar").is_displayed())
        page("#list a")[0].click()
        page.until(lambda: not page.one("#sidebar").is_displayed())
        page.one("#show-settings").click()
        assert page.one("#temperature").is_displayed()
        page.one("#hide-settings").click()
        assert not page.one("#settings").is_displayed()
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_reload_in_mid_answer_keeps_what_was_shown(page, script):
    page.write(script.add("slow", " ".join(f"word{number}" for number in range(400)), pause=0.03))
    page.until(lambda: "word9" in page.texts[-1])
    text = page.texts[-1]
    page.driver.refresh()
    page.until(lambda: page(".end"))
    assert page.texts[-1].startswith(text)
    assert "interrupted" in page.one(".end").text


def test_a_server_that_ends_in_mid_answer_and_starts_again(page_at, serving, script, url, tmp_path):
    settings = Settings(conversations=tmp_path / "c.sqlite")
    with serving(settings) as address:
        page = page_at(address).open()
        page.write(script.add("slow", " ".join(f"word{number}" for number in range(400)), pause=0.03))
        page.until(lambda: "word9" in page.texts[-1])
        place = page.driver.current_url.rpartition("/")[2]
    page.until(lambda: page.one("#error").is_displayed())
    page.idle()
    text = page.texts[-1]
    assert "word9" in text
    assert page.one("#input").get_attribute("value") == ""
    with serving(settings) as address:
        page = page_at(address).open(f"/{place}")
        page.until(lambda: page(".end"))
        assert page.texts[-1].startswith(text)
    assert all("ERR_" in one for one in page.complaints)


def test_the_model_is_chosen_and_remembered(page_at, serving, served):
    without = served.tokenizer.with_chat_template(None)
    others = [dataclasses.replace(served, name="other"), dataclasses.replace(served, name="base", tokenizer=without)]
    with serving(Settings(), Registry([served, *others])) as address:
        page = page_at(address).open()
        assert [one.text for one in page("#model option")] == ["tiny", "other", "base (no chat template)"]
        assert page.one("#not-stored").is_displayed()
        page.set("max_tokens", 3)
        page.set("model", "other")
        assert page.one(".welcome h2").text == "other"
        page.say("a")
        assert page.one(".message.last .stats").text.startswith("other · ")
        page.set("model", "tiny")
        page.button("Regenerate")
        page.until(lambda: page.one(".message.last .stats").text.startswith("tiny · "))
        page.button("Previous version")
        page.until(lambda: page.one(".message.last .stats").text.startswith("other · "))
        page.driver.refresh()
        page.until(lambda: page(".message.last"))
        assert page.one("#model").get_attribute("value") == "tiny"
        page.js("localStorage.clear()")
        assert page.complaints == []
