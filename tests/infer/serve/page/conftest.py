"""The page in headless Chromium, on a server whose model says what a test has written down."""

import asyncio
import contextlib
import json
import re
import shutil
import socket
import threading
import time

import pytest
import uvicorn

from infer.completion import Update
from infer.serve import conversations
from infer.serve.app import create_app
from infer.serve.settings import Settings

DRIVER = "/usr/bin/chromedriver"
SECONDS = 30  # that something on the page may take on a busy machine


class Script:
    """Answers by the name after the last "say:" of a prompt; other prompts go to the model."""

    def __init__(self, served):
        self.served, self.answers = served, {}
        self.run = conversations.run

    def add(self, name, text, pause=0.0):
        """Have "say:name" answered with a text, with `pause` seconds between its words."""
        self.answers[name] = (text, pause)
        return f"say:{name}"

    async def __call__(self, served, prompts, sampling, room):
        """Take the place of `generation.run`."""
        said = re.findall(r"say:(\w+)", self.served.tokenizer.decode(prompts[0]))
        if said and said[-1] in self.answers:
            return Saying(served, *self.answers[said[-1]])
        return await self.run(served, prompts, sampling, room)


class Saying:
    """A generation of a text that is known."""

    def __init__(self, served, text, pause):
        self.served, self.text, self.pause, self.closed = served, text, pause, False

    def close(self):
        self.closed = True

    async def __aiter__(self):
        size = 3 if self.pause else 16
        for start in range(0, len(self.text), size):
            part = self.text[start : start + size]
            ids = self.served.tokenizer.encode(part)
            count = len(ids)
            yield [(0, Update(part, ids, [-0.7] * count, [{token: -0.7, 65: -1.5} for token in ids], None))]
            await asyncio.sleep(self.pause)
            if self.closed:
                return
        yield [(0, Update("", [], [], [], "stop"))]


@pytest.fixture(scope="session")
def serving(registry):
    """(settings, models) → a context with the URL of a server in a thread."""

    @contextlib.contextmanager
    def serve(settings, models=registry):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            config = uvicorn.Config(create_app(models, settings), log_level="error", timeout_graceful_shutdown=1)
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
            thread.start()
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                server.should_exit = True
                thread.join(10)

    return serve


@pytest.fixture(scope="session")
def script(served):
    return Script(served)


@pytest.fixture(scope="session")
def url(serving, script, tmp_path_factory):
    """The address of a server whose model follows `script`."""
    path = tmp_path_factory.mktemp("conversations") / "c.sqlite"
    with pytest.MonkeyPatch.context() as patch, serving(Settings(conversations=path)) as url:
        patch.setattr(conversations, "run", script)
        yield url


@pytest.fixture(scope="session")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="session")
def browser(downloads):
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which(DRIVER)):
        pytest.skip("chromium and chromedriver are not installed: apt install chromium-driver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,800"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.set_capability("unhandledPromptBehavior", "ignore")
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a user does on the page."""

    def __init__(self, driver, url):
        self.driver, self.url = driver, url

    def open(self, path="/"):
        self.driver.get("about:blank")
        self.driver.get(self.url + path)
        self.until(lambda: self("#send svg"))
        return self

    def __call__(self, selector):
        """The elements of a selector."""
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        (element,) = self(selector)
        return element

    def js(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def until(self, condition, seconds=SECONDS):
        """Wait for a condition and return its value."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(StaleElementReferenceException):
                if value := condition():
                    return value
            assert time.monotonic() < end, f"not reached:\n{self.one('body').text[-2000:]}"
            time.sleep(0.02)

    def write(self, text, keys="\ue007"):
        """Type a message and press Enter."""
        box = self.one("#input")
        box.clear()
        box.send_keys(text + keys)

    @property
    def busy(self):
        return self.one("#send").get_attribute("aria-label") == "Stop"

    def idle(self):
        self.until(lambda: not self.busy)

    def say(self, text):
        """Send a message and return the text of the whole answer."""
        before = len(self(".message"))
        self.write(text)
        self.until(lambda: len(self(".message")) == before + 2)
        self.idle()
        return self.texts[-1]

    @property
    def texts(self):
        """The texts of all messages."""
        return self.js("return [...document.querySelectorAll('.message .body')].map((one) => one.innerText)")

    def button(self, label, number=-1):
        """Press the button with this name of a message."""
        self.js(
            "const all = document.querySelectorAll(arguments[0]); all[arguments[1] < 0 ? all.length - 1 :"
            " arguments[1]].click()",
            f'.message button[aria-label="{label}"]',
            number,
        )

    def set(self, name, value):
        """Write a number into the form of settings."""
        self.js(
            "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
            " field.dispatchEvent(new Event('change'))",
            name,
            str(value),
        )

    @property
    def complaints(self):
        """Errors in the browser's console since the last call; a refused API key is expected to be there."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    @property
    def requested(self):
        """The addresses of all requests since the last call, but for those that the policy of the page has stopped."""
        found = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        stopped = {
            one["params"]["requestId"]
            for one in found
            if one["method"] == "Network.loadingFailed" and one["params"].get("blockedReason") == "csp"
        }
        sent = [one["params"] for one in found if one["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent if one["requestId"] not in stopped]


@pytest.fixture
def page(browser, url):
    """The page without a conversation, and without settings of an earlier test."""
    one = Page(browser, url).open()
    one.js("localStorage.clear(); sessionStorage.clear()")
    one.open()
    yield one
    assert one.complaints == []


@pytest.fixture
def page_at(browser):
    return lambda url: Page(browser, url)
