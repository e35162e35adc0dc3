"""A real browser to look at a report with."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chrome]:
    """A headless Chromium with a new, empty profile. Skips where there is none, unless KDBENCH_BROWSER_TESTS=required."""
    if BROWSER is None or DRIVER is None:
        how = "no Chromium here; on Debian: apt-get install chromium chromium-driver"
        if os.environ.get("KDBENCH_BROWSER_TESTS") == "required":
            pytest.fail(how)
        pytest.skip(how)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
        driver.set_page_load_timeout(60)
        yield driver
        driver.quit()


@pytest.fixture
def browser(chromium: Chrome) -> Iterator[Chrome]:
    """The browser at desktop size, in light colours; a test that leaves an error in its console fails."""
    chromium.get("about:blank")
    chromium.get_log("browser")
    look_at(chromium, width=1280)
    yield chromium
    severe = [entry["message"] for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []


def look_at(driver: Chrome, width: int, height: int = 900, scheme: str = "light", media: str = "") -> None:
    """Set the size of the page's window in CSS pixels, the colour scheme, and `print` or the screen."""
    phone = width < 600
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
    )
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [{"name": "prefers-color-scheme", "value": scheme}]})
