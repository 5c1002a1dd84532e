"""Take the picture of the README: a short conversation on a server that runs.

isoflop serve smollm2=SmolLM2.gguf --conversations none
python tests/infer/serve/page/picture.py http://127.0.0.1:8000/ docs/chat.png
"""

import json
import sys
import time

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

QUESTIONS = (
    "How do I reverse a list in Python? Show one line of code.",
    "In one sentence: why is the sky blue?",
)
SAMPLING = {"temperature": 0.3, "max_tokens": 200, "seed": 3}
LIKELY = """
const tokens = [...document.querySelectorAll('.token')];
const doubt = (token) => Number(token.style.getPropertyValue('--doubt'));
const end = tokens.filter((one) => one.getBoundingClientRect().top > tokens[0].getBoundingClientRect().top + 20);
(end.length ? end : tokens).sort((a, b) => doubt(b) - doubt(a))[0].dispatchEvent(new Event('pointerenter'));
"""


def main(url, file):
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    size = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def find(selector):
        return driver.find_elements("css selector", selector)

    def until(condition):
        while not condition():
            time.sleep(0.1)

    driver.get(url)
    driver.execute_script("localStorage.setItem('isoflop.sampling', arguments[0])", json.dumps(SAMPLING))
    driver.refresh()
    until(lambda: find("#send svg"))
    for number, question in enumerate(QUESTIONS, 1):
        find("#input")[0].send_keys(question + "\ue007")
        until(lambda number=number: len(find(".message")) == 2 * number and not find(".running"))
    find('.message.last button[aria-label="Token probabilities"]')[0].click()
    until(lambda: find(".token"))
    driver.execute_script("document.getElementById('messages').scrollTop = 1e6")
    time.sleep(0.5)
    driver.execute_script(LIKELY)
    driver.save_screenshot(file)
    driver.quit()


if __name__ == "__main__":
    main(*sys.argv[1:])
