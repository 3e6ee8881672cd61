"""A headless Chromium with a profile of its own in the working directory."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait


@contextlib.contextmanager
def browsing(url: str) -> Iterator[Chrome]:
    """A browser that shows `url`."""
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in (
        "--headless=new",
        "--no-sandbox",  # which root, in a container, cannot have
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-proxy-server",
        "--window-size=1200,900",
        f"--user-data-dir={Path('profile').absolute()}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options, ChromeService(shutil.which("chromedriver")))
    try:
        browser.set_page_load_timeout(60)
        browser.get(url)
        yield browser
    finally:
        browser.quit()


def shows(browser: Chrome, text: str, selector: str = "body", seconds: float = 60) -> str:
    """Wait until an element has `text` in it; its whole text. TimeoutException that says what the
    page and the console have where it has not in `seconds`."""

    def found(_: Chrome) -> str | bool:
        for element in browser.find_elements(By.CSS_SELECTOR, selector):
            with contextlib.suppress(Exception):  # it may be gone by now
                if text in element.text:
                    return element.text
        return False

    try:
        return str(WebDriverWait(browser, seconds).until(found))
    except Exception as error:
        page = browser.find_element(By.CSS_SELECTOR, "body").text
        raise AssertionError(f"no {text!r} in {page!r}; console: {console(browser)}") from error


def element(browser: Chrome, xpath: str, seconds: float = 60) -> WebElement:
    """Wait for an element: a page may load what draws it later than the text beside it.
    TimeoutException that says which, where it has not come in `seconds`."""
    wait = WebDriverWait(browser, seconds)
    return wait.until(lambda _: browser.find_element(By.XPATH, xpath), f"no {xpath}")


def console(browser: Chrome) -> list[str]:
    """What the page has written into its console at the level of a warning or above, so far."""
    lines = browser.get_log("browser")
    return [line["message"] for line in lines if line["level"] in ("WARNING", "SEVERE")]
