"""A headless Chromium for tests, and what it logged and asked the network for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def browser() -> Iterator[Any]:
    """Start Chromium, from Debian or wherever it is on the path; skip the test where there is none."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield opened
    finally:
        opened.quit()


def screen(opened: Any, width: int, *, dark: bool = False) -> None:
    """Give the page this width in CSS pixels, and the light or the dark scheme."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def requests(opened: Any) -> list[str]:
    """Return the addresses that the pages asked for since the last call."""
    messages = (json.loads(entry["message"])["message"] for entry in opened.get_log("performance"))
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("data:", "chrome:"))]


def errors(opened: Any) -> list[str]:
    """Return what the console was told of errors since the last call."""
    return [entry["message"] for entry in opened.get_log("browser") if entry["level"] == "SEVERE"]


def visible_lines(opened: Any) -> list[str]:
    """Return every text of the page, those inside shadow trees too."""
    return opened.execute_script(
        """
        const lines = [];
        (function walk(node) {
          if (node.shadowRoot) walk(node.shadowRoot);
          for (const child of node.childNodes) {
            const text = child.nodeType === Node.TEXT_NODE && child.textContent.trim();
            if (text && !['STYLE', 'SCRIPT', 'NOSCRIPT'].includes(node.nodeName)) lines.push(text);
            else if (child.nodeType === Node.ELEMENT_NODE) walk(child);
          }
        })(document.body);
        return lines;
        """
    )
