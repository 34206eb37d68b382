"""A real Chromium without a window, for pages that we make: no network, a profile of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_S = 120


class Browser:
    """One window of it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def script(self, source: str, *words: Any) -> Any:
        """What a function with this body gives back in the page."""
        return self.driver.execute_script(source, *words)

    def shows(self, width: int, dark: bool) -> None:
        """The size of its window, and what its user likes."""
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        likes = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [likes]})

    def open(self, page: Path) -> None:
        """Open a page, and wait until its pictures are drawn."""
        self.driver.get(page.as_uri())
        self.waits_for("return document.documentElement.dataset.ready === 'yes'")

    def waits_for(self, source: str) -> None:
        """Wait until a function with this body says yes."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, PATIENCE_S).until(lambda driver: driver.execute_script(source))

    def console(self) -> list[str]:
        """What stands in its console since it was asked last."""
        return [each["message"] for each in self.driver.get_log("browser")]

    def searched(self, query: str) -> list[str]:
        """Type into the search; the lines it finds."""
        field = self.driver.find_element("id", "query")
        field.clear()
        field.send_keys(query)
        return str(self.script("return document.getElementById('hits').innerText")).splitlines()


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Start it; the test is skipped, with a sentence, where it is not there."""
    if not CHROMIUM or not DRIVER:
        pytest.skip("pages are looked at in Chromium: install chromium and chromium-driver")
    pytest.importorskip("selenium", reason="Chromium is driven by selenium: pip install selenium")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        try:
            driver.set_page_load_timeout(PATIENCE_S)
            yield Browser(driver)
        finally:
            driver.quit()
