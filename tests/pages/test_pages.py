"""The pages for browsers, in a real one: Chromium without a window."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import axe_core_python
import pytest
from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support import expected_conditions

from services import browser as pages
from tests.harness import (
    Databases,
    ScriptedUpstream,
    Seen,
    Service,
    call,
    create_user,
    pw_migrate,
    wait_for,
)

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
AXE = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text()
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
HOSTILE = [
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\"><svg onload=document.title='owned'>",
    "javascript:document.title='owned'",
    "{{7*7}} ${7*7} </textarea></td><h1>",
]

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="chromium and chromium-driver are not installed"
)


class Browser:
    """A browser window, and what a person does in it."""

    def __init__(self, folder: Path, *, width: int = 1200, dark: bool = False) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM or ""
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.add_argument(f"--window-size={width},900")
        options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.folder = folder
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        if width < 500:
            metrics = {"width": width, "height": 800, "deviceScaleFactor": 2, "mobile": True}
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        try:
            return str(self.find(selector).text)
        except StaleElementReferenceException:
            return ""

    def sees(self, selector: str, words: str) -> None:
        wait_for(lambda: words in self.text(selector), 10, f"{words!r} in {selector}")

    def click(self, selector: str) -> None:
        wait_for(lambda: self._clicked(selector), 10, f"{selector} to click")

    def _clicked(self, selector: str) -> bool:
        """Whether it was there, to be seen, and enabled; a list may be drawn again meanwhile."""
        try:
            found = self.find(selector)
            if ready := found.is_enabled() and found.is_displayed():
                found.click()
            return bool(ready)
        except (
            NoSuchElementException,
            StaleElementReferenceException,
            ElementClickInterceptedException,
        ):
            return False

    def fill(self, selector: str, text: str) -> None:
        wait_for(lambda: self.find(selector).is_displayed(), 10, f"{selector} to be shown")
        self.find(selector).send_keys(Keys.CONTROL + "a" + Keys.NULL, text or Keys.BACKSPACE)

    def names(self) -> list[str]:
        script = "return [...document.querySelectorAll('#rows tr')].map(r => r.cells[1].innerText)"
        return list(self.driver.execute_script(script))

    def shows(self, *names: str) -> None:
        wait_for(lambda: self.names() == list(names), 10, f"{names}, not {self.names()}")

    def wait(self, script: str) -> None:
        """Wait until a JavaScript expression is true."""
        wait_for(lambda: self.driver.execute_script(f"return {script}"), 10, script)

    def value(self, selector: str) -> str:
        return str(self.find(selector).get_attribute("value"))

    def press(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def answer(self, yes: bool) -> None:
        """Answer the question that the browser asks."""
        wait_for(lambda: expected_conditions.alert_is_present()(self.driver), 10, "a question")
        asked = self.driver.switch_to.alert
        asked.accept() if yes else asked.dismiss()

    def asks_before_leaving(self) -> bool:
        script = "const e = new Event('beforeunload', {cancelable: true});"
        return bool(self.driver.execute_script(script + "return !dispatchEvent(e)"))

    def act(self, action: str, email: str) -> None:
        """Click a user's button, by the name that a screen reader says."""
        self.click(f'button[aria-label^="{action} "][aria-label$="{email}"]')

    def findings(self) -> list[str]:
        """What axe-core finds wrong with the page as it is."""
        self.driver.execute_script(AXE)
        result = self.driver.execute_async_script("axe.run().then(arguments[0])")
        return [f"{one['id']}: {one['nodes'][0]['html']}" for one in result["violations"]]

    def complaints(self) -> list[str]:
        """Errors in the console but those of answers, which the pages tell in words."""
        lines = [line["message"] for line in self.driver.get_log("browser")]
        return [line for line in lines if "Failed to load resource" not in line]


class Front:
    """Stands between browsers and Gatehouse, and holds answers back until a test lets them go."""

    def __init__(self, service: Service, path: str = "") -> None:
        self.service = service
        self.path = path  # the path below which it serves Gatehouse
        self.server = ScriptedUpstream(self._answer)
        self.url = self.server.url
        self.asked: list[str] = []  # method and target, as they arrived
        self.status = 0  # what it answers in Gatehouse's place to all but pages, if it is not 0
        self._held: list[tuple[str, threading.Event, bool]] = []

    def hold(self, words: str, *, lose: bool = False) -> threading.Event:
        """Hold the next answer to a request whose method and target contain the words, until the
        event is set; then give it, or lose it. Gatehouse has then done what was asked."""
        event = threading.Event()
        self._held.append((words, event, lose))
        return event

    def lose(self, words: str) -> None:
        """Lose the next answer to such a request, after Gatehouse has done what was asked."""
        self.hold(words, lose=True).set()

    def arrived(self, words: str, times: int = 1) -> None:
        """Wait until that many requests have arrived whose method and target contain the words."""
        wait_for(lambda: sum(words in one for one in self.asked) >= times, 10, words)

    def _answer(self, sock: socket.socket, seen: Seen) -> bool:
        line = f"{seen.method} {seen.target.decode()}"
        if self.status and "text/html" not in dict(seen.headers).get("Accept", ""):
            self.asked.append(line)
            head = f"HTTP/1.1 {self.status} -\r\nContent-Type: text/html\r\nContent-Length: 12"
            sock.sendall(f"{head}\r\n\r\n<h1>Bad</h1>".encode())
            return True
        held = next((one for one in self._held if one[0] in line), None)
        if held:
            self._held.remove(held)
        names = {"connection", "host", "content-length"}
        headers = {name: value for name, value in seen.headers if name.lower() not in names}
        target = seen.target.decode().removeprefix(self.path)
        reply = self.service.call(seen.method, target, seen.body or None, headers, timeout=60)
        self.asked.append(line)
        if held:
            held[1].wait(20)
        if held and held[2]:
            # Not just an end: a browser sends a request again whose connection ends without a byte.
            sock.sendall(b"?")
            return False
        lines = [f"{name}: {value}" for name, value in reply.headers if name != "Transfer-Encoding"]
        if reply.status != 204:
            lines = [line for line in lines if not line.startswith("Content-Length")]
            lines.append(f"Content-Length: {len(reply.body)}")
        head = "\r\n".join([f"HTTP/1.1 {reply.status} {reply.reason}", *lines, "", ""])
        sock.sendall(head.encode("latin-1") + reply.body)
        return True


@pytest.fixture
def front(fresh: Service) -> Iterator[Front]:
    one = Front(fresh)
    yield one
    one.server.close()


@pytest.fixture
def fresh(databases: Databases, upstream: ScriptedUpstream) -> Iterator[Service]:
    with Service(POSTGRES_URI=databases.create(), UPSTREAM_URL=upstream.url) as running:
        yield running


@pytest.fixture
def window(tmp_path: Path) -> Iterator[Callable[..., Browser]]:
    """Open windows; none of them may end with a complaint in its console."""
    opened: list[Browser] = []

    def open_one(**options: Any) -> Browser:
        opened.append(Browser(tmp_path, **options))
        return opened[-1]

    yield open_one
    try:
        assert [line for one in opened for line in one.complaints()] == []
    finally:
        for one in opened:
            one.driver.quit()


@pytest.mark.parametrize("name", ["users", "health"])
def test_a_page_is_one_file_that_needs_nothing_else(name: str) -> None:
    page = pages.load(name)
    assert len(page.html) < 60_000
    text = page.html.decode()
    assert "innerHTML" not in text and "eval(" not in text and "on" + "click=" not in text
    for other in ("http://", "https://", "@import", "url("):
        assert other not in text
    assert "unsafe" not in page.policy and page.policy.startswith("default-src 'none'")


@pytest.mark.parametrize("path", ["/users", "/users/", "/health"])
def test_a_browser_gets_a_page_and_curl_json(service: Service, path: str) -> None:
    page = service.call("GET", path, headers={"Accept": BROWSER})
    assert page.status == 200
    assert page.get("Content-Type") == "text/html; charset=utf-8"
    assert page.get("Cache-Control") == "no-store"
    policy = page.get("Content-Security-Policy") or ""
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    head = service.call("HEAD", path, headers={"Accept": BROWSER})
    assert (head.status, head.body, head.get("Content-Length")) == (200, b"", str(len(page.body)))
    for accept in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
        reply = service.call("GET", path, headers=accept)
        assert reply.get("Content-Type") == "application/json" and reply.body.endswith(b"}\n")
        assert reply.get("Vary") == page.get("Vary") == "Accept"


def test_the_page_needs_no_token_and_all_else_does(start: Callable[..., Service]) -> None:
    service = start(USERS_TOKEN="t0ken")
    assert service.call("GET", "/users", headers={"Accept": BROWSER}).status == 200
    nobody = "/users/00000000-0000-0000-0000-000000000000"
    for method, path in (("GET", nobody), ("POST", "/users"), ("DELETE", nobody)):
        assert service.call(method, path, headers={"Accept": BROWSER}).status == 401


@needs_chromium
def test_a_user_is_created_edited_and_deleted(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    page = window()
    page.driver.get(f"{fresh.url}/users")
    page.sees("#found", "There are no users yet")
    page.click("#new")
    page.fill("#field-email", "nobody")
    page.fill("#field-metadata", "{")
    page.find("#field-metadata").send_keys(Keys.TAB)
    page.click("#save")
    page.sees("#error-metadata", "is not JSON")
    page.fill("#field-metadata", '{"plan": "pro", "big": 12345678901234567890}')
    page.click("#save")
    page.sees("#error-email", "@-sign")
    page.sees("#error-name", "1 to 200 characters")
    assert page.find("#field-email").get_attribute("aria-invalid") == "true"
    assert page.driver.switch_to.active_element.get_attribute("id") == "field-email"
    page.fill("#field-email", "\u00a0ann@example.com ")  # as it may be pasted
    page.fill("#field-name", "Ann" + Keys.ENTER)
    page.sees("#said", "Ann is created")
    page.shows("Ann")
    [user] = fresh.call("GET", "/users").json()["users"]
    assert user["metadata"] == {"plan": "pro", "big": 12345678901234567890}
    page.click("#new")
    page.fill("#field-email", "ANN@example.com")
    page.fill("#field-name", "Bob")
    page.click("#save")
    page.sees("#error-email", "Another user has this email address")
    page.click("#edit [data-close]")
    page.answer(True)
    page.act("Edit", "ann@example.com")
    page.sees("#edit-title", "Edit Ann")
    page.fill("#field-name", "Anna")
    page.click("#save")
    page.shows("Anna")
    page.act("Delete", "ann@example.com")
    page.sees("#remove-who", "Anna, ann@example.com")
    page.click("#remove [data-close]")
    page.shows("Anna")
    page.act("Delete", "ann@example.com")
    page.click("#remove-yes")
    page.sees("#said", "Anna is deleted")
    page.sees("#found", "There are no users yet")


@needs_chromium
def test_the_pages_work_below_a_path_of_a_proxy_in_front(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    """They asked for /users, which is another application's there."""
    front = Front(fresh, "/gate")
    page = window()
    page.driver.get(f"{front.url}/gate/users")
    page.sees("#found", "There are no users yet")
    page.click("#new")
    page.fill("#field-email", "ann@example.com")
    page.fill("#field-name", "Ann" + Keys.ENTER)
    page.sees("#said", "Ann is created")
    page.act("Edit", "ann@example.com")
    page.fill("#field-name", "Anna" + Keys.ENTER)
    page.shows("Anna")
    page.fill("#q", "ann")
    page.wait("location.pathname + location.search === '/gate/users?q=ann'")
    page.driver.get(f"{front.url}/gate/health")
    page.sees("#status", "ok")
    assert [one for one in front.asked if " /gate/" not in one] == []
    front.server.close()


@needs_chromium
def test_one_searches_as_one_types_and_turns_pages_both_ways(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    for number in range(120):
        create_user(fresh, f"u{number}@example.com", f"User {number:03}")
    page = window()
    page.driver.get(f"{fresh.url}/users")
    wait_for(lambda: page.names()[:1] == ["User 000"])
    assert not page.find("#previous").is_enabled()
    for first in ("User 050", "User 100"):
        page.click("#next")
        wait_for(lambda first=first: page.names()[:1] == [first])
    assert not page.find("#next").is_enabled()
    page.click("#previous")
    wait_for(lambda: page.names()[:1] == ["User 050"])
    page.click("#previous")
    wait_for(lambda: page.names()[:1] == ["User 000"])
    page.fill("#q", "uSeR 11")
    page.shows(*(f"User {number}" for number in range(110, 120)))
    page.driver.refresh()
    page.shows(*(f"User {number}" for number in range(110, 120)))
    # A telephone's keyboard ends each word with a blank.
    page.fill("#q", " User 119 ")
    page.shows("User 119")
    page.fill("#q", "%_")
    page.sees("#found", "Nobody's name or email address contains")
    page.fill("#q", "User 11")
    page.shows(*(f"User {number}" for number in range(110, 120)))
    page.fill("#q", "  ")
    first_is(page, "User 000")
    page.click("#next")
    first_is(page, "User 050")


@needs_chromium
def test_the_address_says_what_is_seen_and_the_way_back_leads_there(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    three_pages(fresh)
    page = window()
    page.driver.get(f"{fresh.url}/users?email=u119@example.com")
    page.shows("User 119")
    page.driver.get(f"{fresh.url}/users")
    first_is(page, "User 000")
    for first in ("User 050", "User 100"):
        page.click("#next")
        first_is(page, first)
    page.driver.refresh()
    first_is(page, "User 100")
    page.sees("#found", "Page 3, users 101 to 120")
    address = page.driver.current_url
    page.click("#previous")
    first_is(page, "User 050")
    for text in ("User 11", "User 112"):
        page.fill("#q", text)
        wait_for(lambda text=text: page.names() and all(text in one for one in page.names()))
    page.driver.back()
    first_is(page, "User 050")
    assert page.value("#q") == ""
    page.driver.back()
    first_is(page, "User 100")
    # Somebody else opens it: how many pages are before it is not known.
    page.driver.get("about:blank")
    page.driver.switch_to.new_window("tab")
    page.driver.get(address)
    first_is(page, "User 100")
    page.sees("#found", "20 users")
    page.click("#previous")
    first_is(page, "User 000")
    page.sees("#found", "Page 1, users 1 to 50")


@needs_chromium
def test_numbers_and_dates_are_written_in_the_language_of_the_page(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    """Some were written in the numerals of the reader's language, and some were not."""
    three_pages(fresh)
    page = window()
    page.driver.execute_cdp_cmd("Emulation.setLocaleOverride", {"locale": "ar-EG"})
    page.driver.get(f"{fresh.url}/users")
    assert page.driver.execute_script("return (2026).toLocaleString()") == "٢٬٠٢٦"
    page.sees("#found", "Page 1, users 1 to 50 of 120")
    assert page.text("#rows time").isascii()


@needs_chromium
def test_a_new_user_is_shown_however_many_there_are(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    three_pages(fresh)
    page = window()
    page.driver.get(f"{fresh.url}/users")
    page.click("#new")
    page.fill("#field-email", "zoe@xn--bcher-kva.example")  # it is kept in another spelling
    page.fill("#field-name", "Zoe" + Keys.ENTER)
    page.sees("#said", "Zoe is created")
    page.click("#said button")
    page.shows("Zoe")


@needs_chromium
def test_what_is_found_is_announced_and_what_is_called_anything_stays_apart(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    """A region that is hidden is not read, and a name could turn the words of a question."""
    create_user(fresh, "ann@example.com", "\u202ennA")
    page = window()
    page.driver.get(f"{fresh.url}/users")
    page.sees("#found", "1 user")
    page.fill("#q", "nobody")
    page.sees("#found", "Nobody's name or email address contains \u201cnobody\u201d.")
    assert page.find("#found").get_attribute("role") == "status"
    page.fill("#q", "")
    page.act("Delete", "ann@example.com")
    page.sees("#remove-who", "ann@example.com")
    places = "[...document.querySelectorAll('#remove-who bdi')].map(e => e.textContent)"
    page.wait(f"String({places}) === '\u202ennA,ann@example.com'")


@needs_chromium
def test_an_export_is_of_what_stands_in_the_search(
    fresh: Service, front: Front, window: Callable[..., Browser]
) -> None:
    three_pages(fresh)
    page = window()
    page.driver.get(f"{front.url}/users")
    first_is(page, "User 000")
    late, held = front.hold("q=User+01"), front.hold("GET /users?q=User+01")
    page.fill("#q", "User 01")
    front.arrived("limit=50&q=User+01")
    page.click("#export-csv")
    front.arrived("GET /users?q=User+01")
    late.set()
    page.fill("#q", "User 02")
    front.arrived("q=User+02")
    held.set()
    page.sees(
        "#said", "Exported all users whose name or email address contains \u201cUser 01\u201d."
    )


def three_pages(service: Service) -> None:
    rows = "".join(f"u{number}@example.com,User {number:03}\n" for number in range(120))
    body = b"email,name\n" + rows.encode()
    assert service.call("POST", "/users", body, {"Content-Type": "text/csv"}).status == 200


def first_is(page: Browser, name: str) -> None:
    wait_for(lambda: page.names()[:1] == [name], 10, f"{name} first")


@needs_chromium
def test_a_page_is_turned_once_however_often_one_presses_while_it_comes(
    fresh: Service, front: Front, window: Callable[..., Browser]
) -> None:
    three_pages(fresh)
    page = window()
    page.driver.get(f"{front.url}/users")
    first_is(page, "User 000")
    page.sees("#found", "Page 1, users 1 to 50 of 120")
    held = [front.hold("after="), front.hold("after=")]
    page.click("#next")
    front.arrived("after=")
    page.click("#next")
    front.arrived("after=", 2)
    for event in held:
        event.set()
    first_is(page, "User 050")
    page.sees("#found", "Page 2, users 51 to 100 of 120")
    held = [front.hold("GET /users?limit=50"), front.hold("GET /users?limit=50")]
    page.click("#previous")
    front.arrived("GET /users?limit=50", 4)
    page.click("#next")  # from the page that is seen: the third
    front.arrived("GET /users?limit=50", 5)
    held[1].set()
    first_is(page, "User 100")
    held[0].set()
    page.click("#previous")
    first_is(page, "User 050")
    page.click("#previous")
    first_is(page, "User 000")
    assert not page.find("#previous").is_enabled()


@needs_chromium
def test_a_page_is_read_from_its_beginning(fresh: Service, window: Callable[..., Browser]) -> None:
    """One was left at the bottom, where the button is."""
    three_pages(fresh)
    page = window(width=360)
    page.driver.get(f"{fresh.url}/users")
    first_is(page, "User 000")
    for first in ("User 050", "User 100"):
        page.find("#next").send_keys(Keys.ENTER)
        first_is(page, first)
        page.wait(
            "(({top}) => top >= 0 && top < 300)(document.querySelector('#rows').getBoundingClientRect())"
        )


@needs_chromium
def test_no_page_is_turned_of_a_list_that_a_search_is_about_to_replace(
    fresh: Service, front: Front, window: Callable[..., Browser]
) -> None:
    three_pages(fresh)
    page = window()
    page.driver.get(f"{front.url}/users")
    first_is(page, "User 000")
    older, newer = front.hold("q=User+0"), front.hold("q=User+01")
    page.fill("#q", "User 0")
    front.arrived("q=User+0")
    page.find("#q").send_keys("1")
    front.arrived("q=User+01")
    page.click("#next")
    newer.set()
    page.shows(*(f"User {number:03}" for number in range(10, 20)))
    older.set()
    assert not page.find("#pages").is_displayed()
    page.driver.refresh()
    page.shows(*(f"User {number:03}" for number in range(10, 20)))
    page.fill("#q", "user")
    first_is(page, "User 000")
    page.click("#next")
    first_is(page, "User 050")


@needs_chromium
def test_what_was_asked_for_last_is_what_opens(
    fresh: Service, front: Front, window: Callable[..., Browser]
) -> None:
    ann = create_user(fresh, "ann@example.com", "Ann").get("Location") or ""
    create_user(fresh, "bob@example.com", "Bob")
    page = window()
    page.driver.get(f"{front.url}/users")
    page.shows("Ann", "Bob")
    for action in ("Edit", "Delete"):
        late = front.hold(f"GET {ann}")
        page.act(action, "ann@example.com")
        front.arrived(f"GET {ann}", 1 if action == "Edit" else 2)
        page.act("Edit", "bob@example.com")
        wait_for(lambda: page.value("#field-name") == "Bob")
        page.fill("#field-name", "Bobby")
        late.set()
        page.wait("performance.getEntriesByType('resource').at(-1).name.includes('/users/')")
        assert page.value("#field-name") == "Bobby"
        assert not page.find("#remove").is_displayed()
        page.click("#edit [data-close]")
        page.answer(True)


@needs_chromium
def test_a_save_that_ends_after_its_form_was_closed_leaves_the_next_form_alone(
    fresh: Service, front: Front, window: Callable[..., Browser]
) -> None:
    ann = create_user(fresh, "ann@example.com", "Ann").get("Location") or ""
    bob = create_user(fresh, "bob@example.com", "Bob").get("Location") or ""
    page = window()
    page.driver.get(f"{front.url}/users")
    page.shows("Ann", "Bob")

    def save_and_leave() -> threading.Event:
        page.act("Edit", "ann@example.com")
        page.fill("#field-name", "Anna")
        held = front.hold(f"PATCH {ann}")
        page.click("#save")
        page.press(Keys.ESCAPE)
        page.answer(True)
        page.act("Edit", "bob@example.com")
        wait_for(lambda: page.value("#field-name") == "Bob")
        page.fill("#field-name", "Bobby")
        front.arrived(f"PATCH {ann}")
        front.asked.clear()
        held.set()
        return held

    save_and_leave()
    page.sees("#said", "Anna is saved")
    page.shows("Anna", "Bob")
    assert page.value("#field-name") == "Bobby"
    page.click("#save")
    page.shows("Anna", "Bobby")
    # One that is refused says so, and its conflict is not decided in the other form.
    page.act("Edit", "ann@example.com")
    page.fill("#field-name", "Mine")
    fresh.call("PATCH", ann, {"name": "Theirs"})
    held = front.hold(f"PATCH {ann}")
    page.click("#save")
    page.press(Keys.ESCAPE)
    page.answer(True)
    page.click("#new")
    page.fill("#field-name", "Cem")
    front.arrived(f"PATCH {ann}")
    held.set()
    page.sees("#failed", "Mine was not saved.")
    assert not page.find("#conflict").is_displayed()
    assert page.value("#field-name") == "Cem"
    assert fresh.call("GET", ann).json()["name"] == "Theirs"
    assert fresh.call("GET", bob).json()["name"] == "Bobby"


@needs_chromium
def test_a_delete_that_ends_late_leaves_the_next_question_alone(
    fresh: Service, front: Front, window: Callable[..., Browser]
) -> None:
    ann = create_user(fresh, "ann@example.com", "Ann").get("Location") or ""
    create_user(fresh, "bob@example.com", "Bob")
    page = window()
    page.driver.get(f"{front.url}/users")
    held = front.hold(f"DELETE {ann}")
    page.act("Delete", "ann@example.com")
    page.click("#remove-yes")
    page.press(Keys.ESCAPE)
    page.act("Delete", "bob@example.com")
    page.sees("#remove-who", "Bob")
    front.arrived(f"DELETE {ann}")
    held.set()
    page.sees("#said", "Ann is deleted")
    page.shows("Bob")
    page.sees("#remove-who", "Bob")
    page.click("#remove-yes")
    page.sees("#found", "no users")


@needs_chromium
def test_an_import_that_is_stopped_writes_no_more_though_another_begins(
    fresh: Service, front: Front, window: Callable[..., Browser], tmp_path: Path
) -> None:
    for name in ("old", "new"):
        rows = "".join(f"{name}{n}@example.com,{name} {n}\n" for n in range(1200))
        (tmp_path / f"{name}.csv").write_text("email,name\n" + rows)
    page = window()
    page.driver.get(f"{front.url}/users")
    page.click("#import")
    page.find("#file").send_keys(str(tmp_path / "old.csv"))
    held = front.hold("POST")
    page.click("#bring-start")
    front.arrived("POST")
    page.sees("#bring-close", "Stop")
    page.click("#bring-close")
    page.click("#import")
    page.find("#file").send_keys(str(tmp_path / "new.csv"))
    page.click("#bring-start")
    page.sees("#bring-count", "1,200 of 1,200 rows: 1,200 created")
    held.set()
    page.sees("#said", "The import was stopped. 500 of 1,200 rows: 500 created")
    page.sees("#bring-count", "1,200 of 1,200 rows: 1,200 created")
    assert sum(one.startswith("POST") for one in front.asked) == 4
    assert fresh.call("GET", "/users?limit=1&count=true").json()["total"] == 1700


@needs_chromium
def test_an_import_that_is_cut_goes_on_where_it_was(
    fresh: Service, front: Front, window: Callable[..., Browser], tmp_path: Path
) -> None:
    rows = "".join(f"u{n}@example.com,User {n}\n" for n in range(1200))
    (tmp_path / "people.csv").write_text("email,name\n" + rows)
    page = window()
    page.driver.get(f"{front.url}/users")
    page.sees("#found", "no users")
    page.click("#import")
    page.find("#file").send_keys(str(tmp_path / "people.csv"))
    first = front.hold("POST")
    front.lose("POST")
    page.click("#bring-start")
    first.set()
    page.sees("#bring-error", "may have arrived")
    page.sees("#bring-error", "The rows before line 502 are done")
    page.click("#bring-start")
    page.sees("#bring-count", "1,200 of 1,200 rows: 700 created, 0 replaced, 500 unchanged, 0 ref")
    assert fresh.call("GET", "/users?limit=1&count=true").json()["total"] == 1200


@contextlib.contextmanager
def ending_connections(databases: Databases, front: Front, name: str) -> Iterator[None]:
    """Meanwhile the database ends each connection on which a user of this name is created."""
    with databases.admin(front.service.environ["POSTGRES_URI"]) as cursor:
        cursor.execute(
            "CREATE FUNCTION away() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            f" IF NEW.name = '{name}' THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;"
            " RETURN NEW; END $$;"
            "CREATE TRIGGER away BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION away();"
        )
        yield
        cursor.execute("DROP TRIGGER away ON users")


@needs_chromium
def test_an_import_waits_at_the_first_row_that_the_database_did_not_take(
    front: Front, window: Callable[..., Browser], tmp_path: Path, databases: Databases
) -> None:
    """It went through the whole file, and told of every row that it was refused."""
    rows = [f'{{"email": "u{n}@example.com", "name": "User {n}"}}\n' for n in range(1200)]
    rows[550] = '{"email": "nobody", "name": "User 550"}\n'
    (tmp_path / "people.ndjson").write_text("".join(rows))
    with ending_connections(databases, front, "User 600"):
        page = window()
        page.driver.get(f"{front.url}/users")
        page.click("#import")
        page.find("#file").send_keys(str(tmp_path / "people.ndjson"))
        page.click("#bring-start")
        page.sees("#bring-error", "The rows before line 501 are done")
        assert sum("POST" in one for one in front.asked) == 2
        assert page.text("#bring-start") == "Go on"
    page.click("#bring-start")
    page.sees("#bring-count", "1,200 of 1,200 rows: 1,199 created, 0 replaced, 0 unchanged, 1 ref")
    names = [user["name"] for user in front.service.call("GET", "/users").json()["users"]]
    assert names == [f"User {n}" for n in range(50)]


@needs_chromium
def test_a_create_whose_answer_was_lost_is_sent_again_and_happens_once(
    fresh: Service, front: Front, window: Callable[..., Browser]
) -> None:
    page = window()
    page.driver.get(f"{front.url}/users")
    page.click("#new")
    page.fill("#field-email", "ann@example.com")
    page.fill("#field-name", "Ann")
    page.fill("#field-metadata", '{"b": 1, "a": 2}')
    front.lose("PUT")
    page.click("#save")
    page.sees("#edit-error", "may have arrived. You can safely send it again.")
    page.shows("Ann")
    page.click("#save")
    page.sees("#said", "Ann is created")
    [user] = fresh.call("GET", "/users").json()["users"]
    assert uuid.UUID(user["id"]).version == 7
    # Another one with this address is refused, as ever.
    page.click("#new")
    page.fill("#field-email", "ann@example.com")
    page.fill("#field-name", "Bea" + Keys.ENTER)
    page.sees("#error-email", "Another user has this email address")


@needs_chromium
def test_an_export_goes_in_again_however_much_metadata_it_has(
    fresh: Service, window: Callable[..., Browser], tmp_path: Path
) -> None:
    path = create_user(fresh, "ann@example.com").get("Location") or ""
    for part in range(3):
        long = {"metadata": {f"part {part}": [0] * 5000}}
        assert fresh.call("PATCH", path, long).status == 200
    export = fresh.call("GET", "/users", headers={"Accept": "text/csv"})
    (tmp_path / "all.csv").write_bytes(export.body)
    one = fresh.call("GET", path).body
    long_line = (
        b'id,email,name,metadata\n,bea@example.com,Bea,"{""a"": [' + b"1 , " * 5000 + b'1]}"\n'
    )
    (tmp_path / "long.csv").write_bytes(long_line)
    page = window()
    page.driver.get(f"{fresh.url}/users")
    page.click("#import")
    for name, words in (("all", "0 replaced, 1 unchanged"), ("long", "1 created")):
        page.find("#file").send_keys(str(tmp_path / f"{name}.csv"))
        page.click("#bring-start")
        page.sees("#bring-count", words)
    assert fresh.call("GET", path).body == one


@needs_chromium
def test_a_save_whose_answer_was_lost_is_no_conflict_with_oneself(
    fresh: Service, front: Front, window: Callable[..., Browser]
) -> None:
    body = {"email": "ann@example.com", "name": "Ann", "metadata": {"b": 1, "big": 10**20 + 1}}
    ann = fresh.call("POST", "/users", body).get("Location") or ""
    page = window()
    page.driver.get(f"{front.url}/users")
    page.act("Edit", "ann@example.com")
    page.fill("#field-name", "Anna")
    front.lose(f"PATCH {ann}")
    page.click("#save")
    page.sees("#edit-error", "What you sent may have arrived")
    page.click("#save")
    page.sees("#said", "Anna is saved")
    page.shows("Anna")
    user = fresh.call("GET", ann).json()
    assert user["metadata"] == body["metadata"]


@needs_chromium
def test_what_is_set_back_is_saved_though_it_is_what_was_opened(
    fresh: Service, front: Front, window: Callable[..., Browser]
) -> None:
    """It counted as not changed, and what was sent before, or somebody else's, was saved."""
    ann = create_user(fresh, "ann@example.com").get("Location") or ""
    page = window()
    page.driver.get(f"{front.url}/users")
    page.act("Edit", "ann@example.com")
    page.fill("#field-name", "Wrong")
    front.lose(f"PATCH {ann}")
    page.click("#save")
    page.sees("#edit-error", "may have arrived")
    page.fill("#field-name", "Ann")
    page.click("#save")
    page.sees("#said", "Ann is saved")
    assert fresh.call("GET", ann).json()["name"] == "Ann"
    page.act("Edit", "ann@example.com")
    page.fill("#field-name", "Mine")
    fresh.call("PATCH", ann, {"name": "Theirs"})
    page.click("#save")
    page.sees("#theirs", "Theirs")
    page.click("#conflict [data-close]")
    page.fill("#field-name", "Ann")
    page.click("#save")
    page.sees("#mine", "Ann")
    page.sees("#theirs", "Theirs")
    page.click("#keep-mine")
    page.sees("#said", "Ann is saved")
    assert fresh.call("GET", ann).json()["name"] == "Ann"


@needs_chromium
def test_a_create_whose_answer_was_lost_is_mended_without_a_question(
    fresh: Service, front: Front, window: Callable[..., Browser]
) -> None:
    """The form asked which to keep: what it had sent first, or what it sent now."""
    page = window()
    page.driver.get(f"{front.url}/users")
    sent = ('{"a": 1}', ""), ("", '{"a": 1}'), ('{"a": 1e2, "b": -0}', '{"a": 1e2, "b": -0}')
    for number, (first, second) in enumerate(sent):
        page.click("#new")
        page.fill("#field-email", f"ann{number}@example.com")
        page.fill("#field-name", "Ann")
        page.fill("#field-metadata", first)
        front.lose("PUT")
        page.click("#save")
        page.sees("#edit-error", "may have arrived")
        page.fill("#field-name", "Anna")
        page.fill("#field-metadata", second)
        page.click("#save")
        page.sees("#said", "Anna is created")
        user = fresh.call("GET", "/users").json()["users"][number]
        assert (user["name"], user["metadata"]) == ("Anna", json.loads(second or "{}"))
        # It looks as the one before, and shows another user.
        page.click("#said button")
        wait_for(lambda number=number: page.value("#q") == f"ann{number}@example.com")
        page.shows("Anna")


@needs_chromium
@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("Lost@Example.COM", "Lost@example.com"),
        ("lost@xn--bcher-kva.example", "lost@b\u00fccher.example"),
        ("lose\u0301@bu\u0308cher.Example", "los\u00e9@b\u00fccher.example"),
    ],
)
def test_ones_own_address_is_no_conflict_however_gatehouse_spells_it(
    fresh: Service, front: Front, window: Callable[..., Browser], written: str, kept: str
) -> None:
    """It was taken for somebody else's, because it is not kept as it was written."""
    page = window()
    page.driver.get(f"{front.url}/users")
    page.click("#new")
    page.fill("#field-name", "Ann")
    for method, address in (("PUT", written), ("PATCH", f"anna.{written}")):
        page.fill("#field-email", address)
        front.lose(method)
        page.click("#save")
        page.sees("#edit-error", "may have arrived")
        page.click("#save")
        page.sees("#said", "Ann is ")
        wait_for(lambda: not page.find("#edit").is_displayed())
        page.act("Edit", "@" + kept.partition("@")[2])
        page.sees("#edit-title", "Edit Ann")
    assert page.value("#field-email") == f"anna.{kept}"


@needs_chromium
def test_a_save_that_is_refused_after_its_form_was_closed_is_told(
    fresh: Service, front: Front, window: Callable[..., Browser]
) -> None:
    ann = create_user(fresh, "ann@example.com").get("Location") or ""
    page = window()
    page.driver.get(f"{front.url}/users")
    page.act("Edit", "ann@example.com")
    page.fill("#field-name", "Mine")
    fresh.call("PATCH", ann, {"name": "Theirs"})
    held = front.hold(f"GET {ann}")
    page.click("#save")
    front.arrived(f"GET {ann}", 2)
    page.sees("#edit-wait", "Saving")
    page.press(Keys.ESCAPE)
    page.answer(False)
    assert page.value("#field-name") == "Mine"
    page.press(Keys.ESCAPE)
    page.answer(True)
    held.set()
    page.sees("#failed", "Mine was not saved.")
    page.shows("Theirs")
    assert page.find("#failed").is_displayed()


@needs_chromium
def test_a_conflict_is_shown_as_two_versions(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    path = create_user(fresh, "ann@example.com").get("Location") or ""
    page = window()
    page.driver.get(f"{fresh.url}/users")
    for choice, kept in (("#keep-mine", "Mine"), ("#take-theirs", "Theirs")):
        page.act("Edit", "ann@example.com")
        page.sees("#edit-title", "Edit")
        page.fill("#field-name", "Mine" if kept == "Mine" else "Mine again")
        fresh.call("PATCH", path, {"name": "Theirs", "metadata": {"seen": choice}})
        page.click("#save")
        page.sees("#mine", "Mine")
        page.sees("#theirs", "Theirs")
        page.sees("#theirs mark", "Theirs")
        assert page.findings() == []
        page.click(choice)
        if choice == "#take-theirs":
            wait_for(lambda: page.find("#field-name").get_attribute("value") == "Theirs")
            page.click("#save")
        page.shows(kept)
        assert fresh.call("GET", path).json()["name"] == kept


@needs_chromium
def test_in_a_conflict_only_what_one_has_changed_is_ones_own(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    """What one had not touched was shown as written, and took away what somebody else wrote."""
    path = create_user(fresh, "ann@example.com").get("Location") or ""
    page = window()
    page.driver.get(f"{fresh.url}/users")
    page.act("Edit", "ann@example.com")
    page.fill("#field-name", "Anna")
    page.fill("#field-email", "anna@example.com")
    theirs = {"email": "a@example.com", "metadata": {"plan": "pro"}}
    assert fresh.call("PATCH", path, theirs).status == 200
    page.click("#save")
    page.sees("#mine", "anna@example.com")
    page.sees("#theirs", "a@example.com")
    assert "Metadata" not in page.text("#conflict") and "Name" not in page.text("#conflict")
    page.click("#take-theirs")
    wait_for(lambda: page.value("#field-email") == "a@example.com")
    page.click("#save")
    page.shows("Anna")
    user = fresh.call("GET", path).json()
    assert {name: user[name] for name in theirs} == theirs


@needs_chromium
def test_two_changes_of_different_fields_are_no_conflict(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    path = create_user(fresh, "ann@example.com").get("Location") or ""
    page = window()
    page.driver.get(f"{fresh.url}/users")
    changes = (("name", "Anna"), ("metadata", '{"a": 1}'))
    others: list[dict[str, Any]] = [{"metadata": {"seen": True}}, {"name": "Bea"}]
    for (field, text), theirs in zip(changes, others, strict=True):
        page.act("Edit", "ann@example.com")
        page.fill(f"#field-{field}", text)
        fresh.call("PATCH", path, theirs)
        page.click("#save")
        page.sees("#said", "is saved")
        wait_for(lambda: not page.find("#edit").is_displayed())
        user = fresh.call("GET", path).json()
        assert user | theirs == user
    assert (user["name"], user["metadata"]) == ("Bea", {"a": 1})


@needs_chromium
def test_a_user_with_as_much_metadata_as_there_can_be_is_edited(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    """White space counts, and the form shows JSON with much of it."""
    path = create_user(fresh, "ann@example.com").get("Location") or ""
    for part in range(3):
        long = {"metadata": {f"part {part}": [0] * 5000}}
        assert fresh.call("PATCH", path, long).status == 200
    page = window()
    page.driver.get(f"{fresh.url}/users")
    page.act("Edit", "ann@example.com")
    page.fill("#field-name", "Anna" + Keys.ENTER)
    page.shows("Anna")
    page.act("Edit", "ann@example.com")
    wait_for(lambda: page.find("#edit").is_displayed())
    numbers = r'100000000000000000001, 1.0e5, " a\\\" "'
    script = f"const one = document.getElementById('field-metadata'); const some = `{numbers},`;"
    script += "one.value = one.value.replace('0,', some)"
    page.driver.execute_script(script)
    page.click("#save")
    page.sees("#said", "Anna is saved")
    kept = fresh.call("GET", path)
    assert b'[100000000000000000001, 100000, " a\\" ", 0, 0' in kept.body
    assert len(kept.body) > 45_000


@needs_chromium
def test_an_empty_object_is_shown_as_nothing_and_text_that_looks_like_one_as_it_is(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    """Text that is `{}` was left out of the form, and a save then took it away."""
    path = create_user(fresh, "ann@example.com", "{}").get("Location") or ""
    page = window()
    page.driver.get(f"{fresh.url}/users")
    page.act("Edit", "ann@example.com")
    page.sees("#edit-title", "Edit {}")
    assert (page.value("#field-name"), page.value("#field-metadata")) == ("{}", "")
    page.fill("#field-email", "bea@example.com" + Keys.ENTER)
    page.sees("#said", "{} is saved")
    user = fresh.call("GET", path).json()
    assert (user["email"], user["name"], user["metadata"]) == ("bea@example.com", "{}", {})


@needs_chromium
def test_a_double_click_answers_no_question(fresh: Service, window: Callable[..., Browser]) -> None:
    """In a narrow window the button that deletes opens below the one that asks."""
    create_user(fresh, "ann@example.com")
    page = window(width=360)
    page.driver.get(f"{fresh.url}/users")
    page.driver.execute_script(
        "const dialog = document.getElementById('remove');"
        "window.below = () => {"
        "  const box = document.getElementById('remove-yes').getBoundingClientRect();"
        "  return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2).id;"
        "};"
        "new MutationObserver((_, one) => { one.disconnect(); window.first = below(); })"
        ".observe(dialog, {attributes: true, attributeFilter: ['open']})"
    )
    page.act("Delete", "ann@example.com")
    page.wait("window.first === 'remove'")
    page.wait("below() === 'remove-yes'")
    page.sees("#remove-who", "ann@example.com")
    assert len(fresh.call("GET", "/users").json()["users"]) == 1
    page.click("#remove-yes")
    page.sees("#found", "There are no users yet")


@needs_chromium
def test_two_tabs_see_what_the_other_has_deleted(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    create_user(fresh, "ann@example.com")
    one, two = window(), window()
    for page in (one, two):
        page.driver.get(f"{fresh.url}/users")
        page.shows("Ann")
    one.act("Edit", "ann@example.com")
    two.act("Delete", "ann@example.com")
    two.click("#remove-yes")
    two.sees("#found", "no users")
    one.click("#save")
    one.sees("#edit-error", "deleted meanwhile")
    one.click("#edit [data-close]")


@needs_chromium
def test_a_spreadsheet_goes_in_and_out(
    fresh: Service, window: Callable[..., Browser], tmp_path: Path
) -> None:
    rows = [f'"Lee, No. {n}\n",u{n}@example.com' for n in range(3)]
    rows = [row.replace("\n", "") for row in rows]
    rows += [f"User {n},u{n}@example.com" for n in range(3, 1200)]
    rows[700] = 'Broken,"not\nan address"'
    rows[1100] = "Twice,u5@example.com"
    file = tmp_path / "people.csv"
    file.write_text("name,email\r\n" + "\r\n".join(rows), newline="")
    page = window()
    page.driver.get(f"{fresh.url}/users")
    page.click("#import")
    page.find("#file").send_keys(str(file))
    page.click("#bring-start")
    page.sees(
        "#bring-count", "1,200 of 1,200 rows: 1,198 created, 0 replaced, 0 unchanged, 2 refused"
    )
    page.sees("#refused", "Line 702: email")
    page.sees("#refused", "Line 1103: Another user has this email address")
    page.sees("#refused", "To change that one, give the row its id")
    assert page.findings() == []
    page.click("#download")
    refused = tmp_path / "refused.csv"
    wait_for(refused.exists)
    wait_for(
        lambda: (
            refused.read_bytes().decode("utf-8-sig")
            == f"name,email\r\n{rows[700]}\r\n{rows[1100]}\r\n"
        )
    )
    page.click("#bring-close")
    page.fill("#q", "lee, no. 2")
    page.shows("Lee, No. 2")
    page.click("#export-csv")
    out = tmp_path / "users.csv"
    wait_for(lambda: out.exists() and out.read_bytes().count(b"\r\n") == 2)
    page.fill("#q", "")
    wait_for(lambda: len(page.names()) == 50)
    page.click("#export-ndjson")
    lines = tmp_path / "users.ndjson"
    wait_for(lambda: lines.exists() and lines.read_bytes().count(b"\n") == 1198)
    assert all(json.loads(line) for line in lines.read_text().splitlines())


SHEET = [
    ["Member", "E-Mail", "First name", "Last name", "City", "Note", "Note", "created_at"],
    [
        "7",
        "zoe@example.com",
        "Zo\u00eb",
        "\u0141uk; J.",
        "M\u00fcnchen, S\u00fcd",
        'a "b"\n',
        "c",
        "2020",
    ],
    ["", "", "", "", "", "", "", ""],
    ["007", " ann@example.com ", "Ann", "", "", "", "", ""],
]


def sheet(letter: str) -> str:
    """SHEET as a spreadsheet program writes it, with this letter between cells."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=letter).writerows(SHEET)
    return buffer.getvalue()


@needs_chromium
@pytest.mark.parametrize(
    "data",
    [
        sheet(",").encode("utf-8-sig"),
        sheet(";").encode(),
        b"sep=;\r\n" + sheet(";").encode(),
        sheet("\t").encode(),
        sheet("\t").encode("utf-16"),
    ],
    ids=["comma", "semicolon", "sep", "tab", "unicode-text"],
)
def test_a_file_is_taken_as_spreadsheet_programs_write_it(
    fresh: Service, window: Callable[..., Browser], tmp_path: Path, data: bytes
) -> None:
    """Names of columns are understood, and what is no field of a user is kept in the metadata."""
    file = tmp_path / "people.csv"
    file.write_bytes(data)
    page = window()
    page.driver.get(f"{fresh.url}/users")
    page.click("#import")
    page.find("#file").send_keys(str(file))
    page.sees("#columns", "First name")
    assert page.findings() == []
    page.click("#bring-start")
    page.sees("#bring-count", "2 of 2 rows: 2 created, 0 replaced, 0 unchanged, 0 refused.")
    zoe, ann = fresh.call("GET", "/users").json()["users"]
    assert (zoe["email"], zoe["name"]) == ("zoe@example.com", "Zo\u00eb \u0141uk; J.")
    kept = {"Member": "7", "City": "M\u00fcnchen, S\u00fcd", "Note": 'a "b"', "Note 2": "c"}
    assert zoe["metadata"] == kept
    assert (ann["email"], ann["name"]) == ("ann@example.com", "Ann")
    assert ann["metadata"] == {"Member": "007"}


@needs_chromium
@pytest.mark.parametrize(
    ("titles", "metadata"),
    [
        ("First name,Last name,Name,Email,E-Mail", {"First name": "Amy", "Last name": "Smith"}),
        ("Last name,First name,City,Email,E-Mail", {"City": "Rome"}),
        ("Surname as Name,First name,City,Email,E-Mail", {"City": "Rome"}),
    ],
)
def test_a_name_is_said_once_and_the_first_name_first(
    fresh: Service,
    window: Callable[..., Browser],
    tmp_path: Path,
    titles: str,
    metadata: dict[str, str],
) -> None:
    """All columns that may be the name were joined as they came: Amy Smith Amy Smith."""
    cells = {"First name": "Amy", "Last name": "Smith", "Name": "Amy Smith", "City": "Rome"}
    cells |= {"Email": "amy@example.com", "E-Mail": "a@example.com"}
    cells |= {"Surname as Name": "Smith"}
    row = ",".join(cells[title] for title in titles.split(","))
    titles = titles.replace("Surname as ", "")
    (tmp_path / "people.csv").write_text(f"{titles}\n{row}\n")
    page = window()
    page.driver.get(f"{fresh.url}/users")
    page.click("#import")
    page.find("#file").send_keys(str(tmp_path / "people.csv"))
    page.click("#bring-start")
    page.sees("#bring-count", "1 of 1 rows: 1 created")
    [amy] = fresh.call("GET", "/users").json()["users"]
    assert (amy["name"], amy["email"]) == ("Amy Smith", "amy@example.com")
    assert amy["metadata"] == {**metadata, "E-Mail": "a@example.com"}


@needs_chromium
@pytest.mark.parametrize(
    "header",
    [
        '"Full\nname";Email',
        '"Name (last, first, second)";Email',
        "\r\n \r\nName;Email",
        'Name;Email;Size 5"',
    ],
)
def test_titles_of_columns_may_have_separators_and_follow_empty_lines(
    fresh: Service, window: Callable[..., Browser], tmp_path: Path, header: str
) -> None:
    """The first line feed ended where the separator was looked for, and quotes were not seen."""
    size = ';"1,2,3,4"' if "Size" in header else ""
    (tmp_path / "people.csv").write_text(f"{header}\r\nAnn;ann@example.com{size}\r\n")
    page = window()
    page.driver.get(f"{fresh.url}/users")
    page.click("#import")
    page.find("#file").send_keys(str(tmp_path / "people.csv"))
    page.find("#columns tr:first-child select").send_keys("Name")
    page.click("#bring-start")
    page.sees("#bring-count", "1 of 1 rows: 1 created")
    page.shows("Ann")


@needs_chromium
def test_one_says_what_a_column_is_and_hears_what_is_wrong_with_a_file(
    fresh: Service, window: Callable[..., Browser], tmp_path: Path
) -> None:
    file = tmp_path / "people.csv"
    file.write_text(
        "name,post,metadata,id,left\n"
        'Ann,ann@example.com,"{""big"": 12345678901234567890,\n""a"": []}",,x\n'
        "Bob,bob@example.com,[1],,x\n"
        "Cem,cem@example.com,,,x,,y\n"
        "Cem,cem@example.com,,,x,, \n"
        "Fay,fay@example.com\n"
        'Dan,"dan@example.com"x,,,\n'
        'Eve,"eve@example.com,,,\n'
    )
    page = window()
    page.driver.get(f"{fresh.url}/users")
    page.click("#import")
    page.find("#file").send_keys(str(file))
    page.click("#bring-start")
    page.sees("#bring-error", "No column is the email")
    assert page.findings() == []
    page.find('#columns select[aria-label="What post is"]').send_keys("Email")
    wait_for(lambda: page.text("#bring-error") == "")
    page.find('#columns select[aria-label="What left is"]').send_keys("Leave out")
    page.click("#bring-start")
    page.sees("#bring-count", "7 of 7 rows: 3 created, 0 replaced, 0 unchanged, 4 refused.")
    for words in (
        "Line 4: metadata must be a JSON object",
        "Line 5: The row has 7 cells, and the first line 5.",
        "Line 8: Something follows a quoted cell.",
        "Line 9: A quote that begins here is not closed.",
    ):
        page.sees("#refused", words)
    ann, cem, fay = fresh.call("GET", "/users").json()["users"]
    assert (cem["name"], fay["name"]) == ("Cem", "Fay")
    assert ann["metadata"] == {"big": 12345678901234567890, "a": []}
    for data, words in (
        ("name,email\nZo\u00eb,z@example.com\n".encode("latin-1"), "not in UTF-8"),
        (b"PK\x03\x04", "Save the spreadsheet as CSV"),
        (b"name,email\n", "has no rows"),
        (b"", "has no rows"),
        (b'[{"name": "Ann",\n"email": "ann@example.com"}]', "one JSON object on each line"),
        (b'{\n"name": "Ann"}', "one JSON object on each line"),
    ):
        kind = "json" if b'"' in data else "csv"
        other = tmp_path / f"{uuid.uuid4()}.{kind}"  # a browser tells of another file only
        other.write_bytes(data)
        page.find("#file").send_keys(str(other))
        page.sees("#bring-error", words)
        assert not page.find("#bring-start").is_enabled()


@needs_chromium
def test_an_import_that_would_empty_a_field_asks_first(
    fresh: Service, window: Callable[..., Browser], tmp_path: Path
) -> None:
    """A file with ids and without metadata took all metadata away, and nothing brings it back."""
    body = {"email": "ann@example.com", "name": "Ann", "metadata": {"plan": "pro"}}
    ann = fresh.call("POST", "/users", body).json()["id"]
    csv_row, json_row = f"{ann},a@example.com,Ann,Rome\n", {**body, "id": ann}
    files = {
        "none.csv": "id,email,name,metadata\n" + csv_row.replace("Rome", "{}"),
        "some.csv": "id,email,name,City\n" + csv_row,
        "some-empty.csv": "id,email,name,metadata\n" + csv_row.replace("Rome", ""),
        "some-short.csv": "id,email,name,metadata\n" + csv_row.replace(",Rome", ""),
        "no-ids.csv": "id,email,name\n,b@example.com,Bea\n",
        "none.ndjson": json.dumps({**json_row, "metadata": {}}),
        "some.ndjson": json.dumps({"id": ann, "email": "a@example.com", "name": "Ann"}),
        "some-null.ndjson": json.dumps({**json_row, "metadata": None}),
        "no-ids.ndjson": json.dumps({"email": "b@example.com", "name": "Bea"}),
    }
    page = window()
    page.driver.get(f"{fresh.url}/users")
    page.click("#import")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        page.find("#file").send_keys(str(tmp_path / name))
        page.sees("#bring-start", "Import 1 row")
        wait_for(lambda asked="some" in name: page.find("#empties").is_displayed() == asked)
    page.find("#file").send_keys(str(tmp_path / "some.csv"))
    page.sees("#empties", "will lose all metadata that is not in it. This cannot be undone.")
    assert page.findings() == []
    page.find('#columns select[aria-label="What City is"]').send_keys("Metadata (JSON)")
    wait_for(lambda: not page.find("#empties").is_displayed())
    page.find("#file").send_keys(str(tmp_path / "some.ndjson"))
    page.sees("#empties", "will lose all metadata")
    page.click("#bring-start")
    page.wait("document.activeElement.id === 'empties-agreed'")
    assert fresh.call("GET", f"/users/{ann}").json()["metadata"] == body["metadata"]
    page.click("#empties-agreed")
    page.click("#bring-start")
    page.sees("#bring-count", "1 of 1 rows: 0 created, 1 replaced")
    assert fresh.call("GET", f"/users/{ann}").json()["metadata"] == {}


@needs_chromium
def test_what_users_are_called_is_text_and_nothing_else(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    for number, name in enumerate(HOSTILE):
        body = {"email": f"u{number}@example.com", "name": name, "metadata": {name: [name]}}
        assert fresh.call("POST", "/users", body).status == 201
    page = window()
    page.driver.get(f"{fresh.url}/users")
    page.shows(*HOSTILE)
    for number in range(len(HOSTILE)):
        page.act("Edit", f"u{number}@example.com")
        wait_for(lambda: page.find("#edit").is_displayed())
        page.click("#edit [data-close]")
        page.act("Delete", f"u{number}@example.com")
        wait_for(lambda: page.find("#remove").is_displayed())
        page.click("#remove [data-close]")
    assert page.driver.title == "Users"
    assert (
        page.driver.execute_script("return document.querySelectorAll('h1, svg, img').length") == 1
    )


@needs_chromium
def test_a_token_is_asked_for_and_kept_for_this_tab_only(
    start: Callable[..., Service], databases: Databases, window: Callable[..., Browser]
) -> None:
    service = start(POSTGRES_URI=databases.create(), USERS_TOKEN="t0ken")
    body = json.dumps({"email": "ann@example.com", "name": "Ann"}).encode()
    headers = {"Authorization": "Bearer t0ken", "Content-Type": "application/json"}
    assert call(service.port, "POST", "/users", body, headers).status == 201
    page = window()
    page.driver.get(f"{service.url}/users")
    wait_for(lambda: page.find("#token").is_displayed())
    assert page.findings() == []
    assert not page.find("#work").is_displayed()
    page.fill("#token", "wrong" + Keys.ENTER)
    page.sees("#token-error", "opens nothing")
    page.fill("#token", " bearer  t0ken" + Keys.ENTER)  # as it stands in a header
    page.shows("Ann")
    page.driver.refresh()
    page.shows("Ann")
    assert page.driver.execute_script("return [localStorage.length, document.cookie]") == [0, ""]
    page.click("#forget")
    wait_for(lambda: page.find("#token").is_displayed())
    assert page.names() == []
    page.driver.refresh()
    wait_for(lambda: page.find("#token").is_displayed())


@needs_chromium
def test_a_database_that_is_away_is_told_in_words(
    start: Callable[..., Service], window: Callable[..., Browser]
) -> None:
    service = start()
    page = window()
    page.driver.get(f"{service.url}/users")
    page.sees("#unlisted", "The database is away")
    assert page.findings() == []
    page.click("#ask")
    page.sees("#unlisted", "The database is away")
    page.driver.get(f"{service.url}/health")
    page.sees("#status", "degraded")
    page.sees("#meaning", "still forwarded")
    assert page.findings() == []


@needs_chromium
def test_the_page_goes_on_by_itself_when_the_database_is_back(
    start: Callable[..., Service], databases: Databases, window: Callable[..., Browser]
) -> None:
    service = start(POSTGRES_URI=databases.create(migrated=False))
    page = window()
    page.driver.get(f"{service.url}/users")
    page.sees("#unlisted", "Run pw_migrate migrate. This page goes on asking.")
    assert pw_migrate("migrate", uri=service.environ["POSTGRES_URI"]).returncode == 0
    page.sees("#found", "There are no users yet")
    assert not page.find("#unlisted").is_displayed()


@needs_chromium
@pytest.mark.parametrize("status", [404, 502, 504])
def test_the_page_waits_for_gatehouse_when_something_else_answers(
    fresh: Service, front: Front, window: Callable[..., Browser], status: int
) -> None:
    """A deployment may have no route to it: the list was asked for hundreds of times, or not again."""
    create_user(fresh, "ann@example.com")
    front.status = status
    page = window()
    page.driver.get(f"{front.url}/users")
    page.sees("#unlisted", f"in Gatehouse's place, with the status {status}. This page goes on ask")
    assert sum("GET /users?" in one for one in front.asked) == 1
    front.status = 0
    page.shows("Ann")
    assert not page.find("#unlisted").is_displayed()
    front.status = status
    page.click("#rows .danger")
    page.sees("#failed", f"the status {status}.")
    front.status = 0
    page.act("Delete", "ann@example.com")
    page.sees("#remove-who", "ann@example.com")
    front.status = status
    page.click("#remove-yes")
    page.sees("#remove-error", f"the status {status}.")
    assert ("may have arrived" in page.text("#remove-error")) == (status > 500)


@needs_chromium
def test_a_conflict_that_no_field_is_to_blame_for_is_told_for_the_whole_form(
    fresh: Service, window: Callable[..., Browser], databases: Databases
) -> None:
    """Every 409 was shown as one of the address."""
    rule = "ALTER TABLE users ADD CONSTRAINT no_bots CHECK (name <> 'Bot')"
    with databases.admin(fresh.environ["POSTGRES_URI"]) as cursor:
        cursor.execute(rule)
    page = window()
    page.driver.get(f"{fresh.url}/users")
    page.click("#new")
    page.fill("#field-email", "bot@example.com")
    page.fill("#field-name", "Bot" + Keys.ENTER)
    wait_for(lambda: page.text("#edit-error"))
    assert page.text("#error-email") == ""


@needs_chromium
def test_loading_is_shown_where_it_takes_long(front: Front, window: Callable[..., Browser]) -> None:
    held = front.hold("GET /users?limit")
    page = window()
    page.driver.get(f"{front.url}/users")
    page.sees("#loading", "Loading")
    held.set()
    page.sees("#found", "There are no users yet")
    assert not page.find("#loading").is_displayed()


@needs_chromium
def test_what_is_written_outlives_a_token_that_is_taken_away(
    start: Callable[..., Service], databases: Databases, window: Callable[..., Browser]
) -> None:
    service = start(POSTGRES_URI=databases.create(), USERS_TOKEN="t0ken")
    page = window()
    page.driver.get(f"{service.url}/users")
    page.fill("#token", "t0ken" + Keys.ENTER)
    page.click("#new")
    page.fill("#field-email", "ann@example.com")
    page.fill("#field-name", "Ann")
    page.driver.execute_script("sessionStorage.setItem('gatehouse-token', 'old')")
    page.click("#save")
    page.sees("#token-error", "opens nothing")
    # Nor is it lost when Gatehouse cannot be reached just then.
    network = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", network)
    page.fill("#token", "t0ken" + Keys.ENTER)
    wait_for(lambda: page.find("#edit").is_displayed())
    network["offline"] = False
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", network)
    page.click("#save")
    page.shows("Ann")


@needs_chromium
def test_what_is_written_is_not_lost_without_a_question(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    create_user(fresh, "ann@example.com")
    page = window()
    page.driver.get(f"{fresh.url}/users")
    page.act("Edit", "ann@example.com")
    wait_for(lambda: page.value("#field-name") == "Ann")
    assert not page.asks_before_leaving()
    page.fill("#field-name", "Anna")
    assert page.asks_before_leaving()
    for _ in range(2):
        page.press(Keys.ESCAPE)
        page.answer(False)
    page.click("#edit [data-close]")
    page.answer(False)
    assert page.value("#field-name") == "Anna"
    page.press(Keys.ESCAPE)
    page.answer(True)
    wait_for(lambda: not page.find("#edit").is_displayed())
    assert not page.asks_before_leaving()
    page.act("Edit", "ann@example.com")
    wait_for(lambda: page.value("#field-name") == "Ann")
    page.press(Keys.ESCAPE)  # nothing was written
    wait_for(lambda: not page.find("#edit").is_displayed())


@needs_chromium
def test_an_import_outlives_its_dialog(
    front: Front, window: Callable[..., Browser], tmp_path: Path
) -> None:
    """Escape threw away the refused rows, and where a stopped import was."""
    rows = "".join(f"u{n}@example.com,User {n}\n" for n in range(600))
    (tmp_path / "people.csv").write_text("email,name\nnobody,Bob\n" + rows)
    page = window()
    page.driver.get(f"{front.url}/users")
    page.click("#import")
    page.find("#file").send_keys(str(tmp_path / "people.csv"))
    held = front.hold("POST")
    page.click("#bring-start")
    front.arrived("POST")
    assert page.asks_before_leaving()
    page.press(Keys.ESCAPE)
    held.set()
    page.sees("#said", "The import was stopped. 500 of 601 rows")
    assert page.asks_before_leaving()
    page.click("#import")
    page.sees("#bring-start", "Go on")
    page.click("#bring-start")
    page.sees("#bring-count", "601 of 601 rows: 600 created")
    page.press(Keys.ESCAPE)
    assert not page.asks_before_leaving()
    page.click("#import")
    page.sees("#refused", "Line 2")


@needs_chromium
def test_an_import_whose_dialog_is_closed_at_its_end_is_done(
    front: Front, window: Callable[..., Browser], tmp_path: Path
) -> None:
    """It was told as stopped, after all of its rows."""
    (tmp_path / "people.csv").write_text("email,name\nann@example.com,Ann\n")
    page = window()
    page.driver.get(f"{front.url}/users")
    page.click("#import")
    page.find("#file").send_keys(str(tmp_path / "people.csv"))
    held = front.hold("POST")
    page.click("#bring-start")
    front.arrived("POST")
    page.press(Keys.ESCAPE)
    held.set()
    page.sees("#said", "The import is done. 1 of 1 rows: 1 created")


@needs_chromium
def test_an_import_is_kept_until_another_file_is_chosen_and_its_end_is_told(
    front: Front, window: Callable[..., Browser], tmp_path: Path
) -> None:
    (tmp_path / "people.csv").write_text("email,name\nnobody,Bob\nann@example.com,Ann\n")
    page = window()
    page.driver.get(f"{front.url}/users")
    page.click("#import")
    page.find("#file").send_keys(str(tmp_path / "people.csv"))
    wait_for(lambda: page.find("#bring-start").is_enabled())
    assert not page.asks_before_leaving()
    front.lose("POST")
    page.click("#bring-start")
    page.sees("#bring-error", "may have arrived")
    assert page.asks_before_leaving()

    def choose_none() -> None:
        page.driver.execute_cdp_cmd("Page.setInterceptFileChooserDialog", {"enabled": True})
        page.find("#bring h2").click()
        page.driver.execute_script("document.getElementById('file').focus()")
        page.press(Keys.SPACE)
        page.wait("!document.getElementById('file').files.length")
        script = "document.getElementById('file').dispatchEvent(new Event('cancel'))"
        page.driver.execute_script(script)
        page.wait("document.getElementById('file').files[0].name === 'people.csv'")

    choose_none()
    assert page.text("#bring-start") == "Go on"
    # Its last answer is lost after it was stopped, and the list that is loaded then hides nothing.
    held = front.hold("POST", lose=True)
    page.click("#bring-start")
    front.arrived("POST", 2)
    page.click("#bring-close")
    held.set()
    page.sees("#failed", "The import was stopped. 0 of 2 rows")
    page.shows("Ann")
    assert page.find("#failed").is_displayed()
    page.click("#import")
    page.click("#bring-start")
    page.sees("#bring-count", "2 of 2 rows: 0 created, 0 replaced, 1 unchanged, 1 refused")
    choose_none()
    page.sees("#refused", "Line 2")


@needs_chromium
def test_rows_that_are_sent_again_are_counted_once(
    front: Front, window: Callable[..., Browser], tmp_path: Path, databases: Databases
) -> None:
    """It counted one row less than none as unchanged."""
    ann = f"{uuid.uuid4()},ann@example.com,"
    rows = ["id,email,name", f"{ann}A", ",bob@example.com,Bob", f"{ann}B", f"{ann}C", f"{ann}D"]
    (tmp_path / "people.csv").write_text("\n".join(rows))
    with ending_connections(databases, front, "Bob"):
        page = window()
        page.driver.get(f"{front.url}/users")
        page.click("#import")
        page.find("#file").send_keys(str(tmp_path / "people.csv"))
        page.click("#empties-agreed")
        page.click("#bring-start")
        page.sees("#bring-error", "are done")
    page.click("#bring-start")
    page.sees("#bring-count", "5 of 5 rows: 2 created, 3 replaced, 0 unchanged, 0 refused.")


@needs_chromium
def test_what_was_said_of_the_last_action_ends_with_the_next(
    fresh: Service, front: Front, window: Callable[..., Browser]
) -> None:
    create_user(fresh, "ann@example.com")
    page = window()
    page.driver.get(f"{front.url}/users")
    page.shows("Ann")
    front.status = 502
    page.click("#export-csv")
    page.sees("#failed", "the status 502")
    front.status = 0
    page.click("#export-ndjson")
    page.sees("#said", "Exported")
    assert not page.find("#failed").is_displayed()


@needs_chromium
def test_why_there_is_no_list_is_told_until_there_is_one(
    fresh: Service, front: Front, window: Callable[..., Browser]
) -> None:
    create_user(fresh, "ann@example.com")
    page = window()
    page.driver.get(f"{front.url}/users")
    page.shows("Ann")
    front.status = 403
    page.fill("#q", "a")
    page.sees("#unlisted", "the status 403")
    page.click("#new")
    page.click("#edit [data-close]")
    assert page.find("#ask").is_displayed()
    front.status = 0
    page.click("#ask")
    wait_for(lambda: not page.find("#unlisted").is_displayed())
    page.shows("Ann")


@needs_chromium
def test_the_list_stays_where_the_next_one_does_not_come(
    fresh: Service, front: Front, window: Callable[..., Browser]
) -> None:
    """One failure took the list away, and with it the way to the other pages."""
    three_pages(fresh)
    page = window()
    page.driver.get(f"{front.url}/users")
    first_is(page, "User 000")
    front.status = 403
    page.find("#next").send_keys(Keys.ENTER)
    page.sees("#unlisted", "the status 403. Below is the list from before.")
    page.sees("#found", "Page 1, users 1 to 50")
    assert page.find("#list").is_displayed() and page.names()[0] == "User 000"
    page.wait("document.getElementById('ask').getBoundingClientRect().top >= 0")
    front.status = 0
    page.find("#next").send_keys(Keys.ENTER)
    wait_for(lambda: not page.find("#unlisted").is_displayed())
    first_is(page, "User 050")


@needs_chromium
def test_a_token_that_nobody_has_checked_shows_no_list(
    start: Callable[..., Service], databases: Databases, window: Callable[..., Browser]
) -> None:
    """The list from before came back for any token, where what is in front failed."""
    service = start(POSTGRES_URI=databases.create(), USERS_TOKEN="right")
    ann = {"email": "a@example.com", "name": "Ann"}
    service.call("POST", "/users", ann, {"Authorization": "Bearer right"})
    front = Front(service)
    page = window()
    page.driver.get(f"{front.url}/users")
    page.fill("#token", "Authorization: Bearer right")
    page.find("#token").send_keys(Keys.ENTER)
    page.shows("Ann")
    front.status = 401
    page.find("#q").send_keys("x")
    page.wait("!document.getElementById('token-form').hidden")
    front.status = 502
    page.fill("#token", "wrong")
    page.find("#token").send_keys(Keys.ENTER)
    page.sees("#unlisted", "the status 502")
    assert not page.find("#list").is_displayed()


@needs_chromium
def test_a_page_that_comes_too_late_moves_nobody(
    fresh: Service, front: Front, window: Callable[..., Browser]
) -> None:
    three_pages(fresh)
    page = window()
    page.driver.get(f"{front.url}/users")
    first_is(page, "User 000")
    turned, found = front.hold("after="), front.hold("q=User+00")
    page.find("#next").send_keys(Keys.ENTER)
    front.arrived("after=")
    page.driver.execute_script("scrollTo(0, 0)")
    page.fill("#q", "User 00")
    front.arrived("q=User+00")
    page.driver.execute_async_script("setTimeout(arguments[0], 100)")
    top = "return document.getElementById('q').getBoundingClientRect().top"
    assert page.driver.execute_script(top) >= 0
    turned.set()
    found.set()
    page.shows(*(f"User {number:03}" for number in range(10)))


@needs_chromium
def test_what_was_said_of_an_action_is_over_on_the_way_back(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    for name in ("Ann", "Bea"):
        create_user(fresh, f"{name}@example.com", name)
    page = window()
    page.driver.get(f"{fresh.url}/users")
    page.fill("#q", "ann")
    page.shows("Ann")
    page.act("Delete", "Ann@example.com")
    page.click("#remove-yes")
    page.sees("#said", "Ann is deleted")
    page.driver.back()
    page.shows("Bea")
    assert not page.find("#said").is_displayed()


@needs_chromium
def test_a_blank_is_no_search_and_an_address_beyond_the_end_leads_to_the_first_page(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    three_pages(fresh)
    page = window()
    page.driver.get(f"{fresh.url}/users?after=ffffffff-ffff-7fff-8fff-ffffffffffff")
    page.sees("#found", "Page 1, users 1 to 50")
    page.click("#next")
    first_is(page, "User 050")
    page.find("#q").send_keys(" ")
    page.driver.execute_async_script("setTimeout(arguments[0], 400)")
    first_is(page, "User 050")
    page.find("#q").send_keys("User 119")
    page.shows("User 119")


@needs_chromium
def test_the_keyboard_keeps_its_place(fresh: Service, window: Callable[..., Browser]) -> None:
    """After a page is turned, a user saved or deleted, one goes on from there, not from the top."""
    three_pages(fresh)
    page = window()
    page.driver.get(f"{fresh.url}/users")
    first_is(page, "User 000")

    def focused() -> str:
        active = page.driver.switch_to.active_element
        return str(active.get_attribute("aria-label") or active.get_attribute("id"))

    page.find("#next").send_keys(Keys.ENTER)
    first_is(page, "User 050")
    assert focused() == "next"
    page.press(Keys.ENTER)
    first_is(page, "User 100")
    assert focused() == "previous"
    page.find('button[aria-label^="Edit User 101"]').send_keys(Keys.ENTER)
    wait_for(lambda: page.find("#edit").is_displayed())
    page.fill("#field-name", "Ann" + Keys.ENTER)
    wait_for(lambda: page.names()[1] == "Ann")
    assert focused() == "Edit Ann, u101@example.com"
    page.press(Keys.TAB, Keys.ENTER)
    page.sees("#remove-who", "Ann, u101@example.com")
    assert focused() != "remove-yes"
    page.press(Keys.TAB, Keys.ENTER)
    wait_for(lambda: page.names()[1] == "User 102")
    assert focused() == "Delete User 102, u102@example.com"


@needs_chromium
def test_the_keyboard_keeps_its_place_where_something_fails(
    fresh: Service, front: Front, window: Callable[..., Browser], tmp_path: Path
) -> None:
    """It was at the top of the page again."""
    three_pages(fresh)
    (tmp_path / "people.csv").write_text("email,name\nann@example.com,Ann\n")
    page = window()
    page.driver.get(f"{front.url}/users")
    first_is(page, "User 000")

    def focused(name: str) -> None:
        page.wait(f"document.activeElement.id === '{name}'")

    front.status = 502
    page.find("#next").send_keys(Keys.ENTER)
    page.sees("#unlisted", "502")
    focused("next")
    page.find("#ask").send_keys(Keys.ENTER)
    focused("ask")
    front.status = 0
    page.press(Keys.ENTER)
    first_is(page, "User 050")
    focused("q")
    page.find("#new").send_keys(Keys.ENTER)
    page.fill("#field-email", "ann@example.com")
    page.fill("#field-name", "Ann")
    front.status = 502
    page.find("#save").send_keys(Keys.ENTER)
    page.sees("#edit-error", "502")
    focused("save")
    front.status = 0
    page.press(Keys.ENTER)
    page.sees("#said", "Ann is created")
    page.find("#said button").send_keys(Keys.ENTER)
    page.shows("Ann")
    focused("q")
    page.find("#import").send_keys(Keys.ENTER)
    page.find("#file").send_keys(str(tmp_path / "people.csv"))
    wait_for(lambda: page.find("#bring-start").is_enabled())
    front.status = 502
    page.find("#bring-start").send_keys(Keys.ENTER)
    page.sees("#bring-error", "502")
    focused("bring-start")
    front.status = 0
    held = front.hold("POST")
    page.press(Keys.ENTER)
    front.arrived("POST", 2)
    stop = page.driver.switch_to.active_element
    assert (stop.get_attribute("id"), stop.text) == ("bring-close", "Stop")
    held.set()
    page.sees("#bring-count", "1 of 1 rows")
    focused("bring-close")


@needs_chromium
def test_what_takes_long_is_told(
    fresh: Service, front: Front, window: Callable[..., Browser]
) -> None:
    ann = create_user(fresh, "ann@example.com").get("Location") or ""
    page = window()
    page.driver.get(f"{front.url}/users")
    page.shows("Ann")
    held = front.hold(f"GET {ann}")
    page.act("Edit", "ann@example.com")
    page.sees("#loading", "Loading")
    held.set()
    page.sees("#edit-when", "Created ")
    assert page.text("#loading") == ""
    held = front.hold(f"PATCH {ann}")
    page.fill("#field-name", "Anna" + Keys.ENTER)
    page.sees("#edit-wait", "Saving")
    held.set()
    page.shows("Anna")
    held = front.hold(f"DELETE {ann}")
    page.act("Delete", "ann@example.com")
    page.click("#remove-yes")
    page.sees("#remove-wait", "Deleting")
    held.set()
    page.sees("#said", "Anna is deleted")
    page.sees("#found", "no users")
    held = front.hold("GET /users")
    page.click("#export-csv")
    page.sees("#loading", "Exporting")
    page.fill("#q", "nobody")
    page.sees("#found", "Nobody's")
    page.sees("#loading", "Exporting")
    held.set()
    page.sees("#said", "Exported")
    assert page.text("#loading") == ""


@needs_chromium
def test_the_page_on_paper_in_a_narrow_window_and_without_javascript(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    email = f"{'a' * 60}@{'b' * 60}.example.com"
    create_user(fresh, email)
    page = window(width=320)
    page.driver.get(f"{fresh.url}/users")
    page.shows("Ann")
    page.wait(
        "[...document.querySelectorAll('#rows td span')].every(e => !e.getClientRects().length"
        " || e.scrollHeight <= e.parentElement.clientHeight)"
    )
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    for seen in ("button", "input"):
        page.wait(
            f"[...document.querySelectorAll('{seen}')].every(e => !e.getClientRects().length)"
        )
    page.wait("document.querySelector('#rows time').getClientRects().length > 0")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    page.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    page.driver.get(f"{fresh.url}/users")
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})
    assert "This page needs JavaScript" in json.dumps(tree)
    page.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@needs_chromium
def test_a_long_name_stays_within_what_says_it(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    long = "A" * 200
    path = create_user(fresh, "ann@example.com", long).get("Location") or ""
    page = window(width=360)
    page.driver.get(f"{fresh.url}/users")
    page.shows(long)

    def fits(selector: str) -> None:
        page.wait(f"(e => e.scrollWidth <= e.clientWidth)(document.querySelector('{selector}'))")

    page.act("Edit", "ann@example.com")
    page.sees("#edit-title", long)
    fits("#edit")
    fresh.call("PATCH", path, {"name": "B" * 200})
    page.fill("#field-name", "C" * 200 + Keys.ENTER)
    page.sees("#conflict", "B" * 200)
    fits("#conflict")
    page.click("#keep-mine")
    page.sees("#said", "is saved")
    fits("#said")
    fits("html")
    page.act("Delete", "ann@example.com")
    page.sees("#remove-who", "C" * 200)
    fits("#remove")
    page.click("#remove [data-close]")
    page.fill("#q", "D" * 200)
    page.sees("#found", "Nobody's")
    fits("html")


@needs_chromium
def test_names_may_be_written_from_right_to_left(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    create_user(fresh, "dana@example.com", "\u05d3\u05e0\u05d4 (1)")
    page = window()
    page.driver.get(f"{fresh.url}/users")
    page.act("Edit", "dana@example.com")
    page.sees("#edit-title", "(1)")
    for selector, direction in (
        ("#rows td:nth-child(2) span", "rtl"),
        ("#rows td:nth-child(1) span", "ltr"),
        ("#field-name", "rtl"),
        ("#field-email", "ltr"),
        ("#field-metadata", "ltr"),
    ):
        page.wait(
            f"getComputedStyle(document.querySelector('{selector}')).direction === '{direction}'"
        )


@needs_chromium
def test_a_question_says_whom_it_is_about_to_a_screen_reader(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    path = create_user(fresh, "ann@example.com").get("Location") or ""
    page = window()
    page.driver.get(f"{fresh.url}/users")

    def described(words: str) -> None:
        tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        dialogs = [one for one in tree if one.get("role", {}).get("value") == "dialog"]
        assert words in [one.get("description", {}).get("value") for one in dialogs]

    page.act("Delete", "ann@example.com")
    page.sees("#remove-who", "Ann, ann@example.com")
    described("Ann, ann@example.com")
    page.click("#remove [data-close]")
    page.act("Edit", "ann@example.com")
    page.fill("#field-name", "Mine")
    fresh.call("PATCH", path, {"name": "Theirs"})
    page.click("#save")
    page.sees("#conflict-who", "Theirs")
    described("Theirs, ann@example.com: nothing was saved. Both of you have changed this:")


@needs_chromium
def test_health_is_live(fresh: Service, window: Callable[..., Browser]) -> None:
    page = window()
    page.driver.get(f"{fresh.url}/health")
    page.sees("#status", "ok")
    page.sees("#parts", fresh.call("GET", "/health").json()["version"])
    first = page.text("#when")
    wait_for(lambda: page.text("#when") not in ("", first), 10, "a second look")
    assert page.findings() == []


@needs_chromium
def test_health_says_that_the_application_is_away(
    start: Callable[..., Service], databases: Databases, window: Callable[..., Browser]
) -> None:
    """It said that everything works while each forwarded request was 502."""
    service = start(POSTGRES_URI=databases.create(), UPSTREAM_URL="http://127.0.0.1:1")
    page = window()
    page.driver.get(f"{service.url}/health")
    page.sees("#meaning", "Everything works.")
    assert service.call("GET", "/").status == 502
    page.sees("#meaning", "forwarded to your application failed. Users can be used.")


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_is_usable_by_all(
    fresh: Service, window: Callable[..., Browser], width: int, dark: bool
) -> None:
    """axe-core finds nothing, nothing is wider than the window, and the keyboard does it all."""
    create_user(fresh, f"{uuid.uuid4().hex}@a-rather-long-domain-name.example", "Ann " * 40)
    page = window(width=width, dark=dark)
    page.driver.get(f"{fresh.url}/users")
    page.shows(("Ann " * 40).strip())
    assert page.findings() == []
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.driver.execute_script(wide) <= 0
    page.find("#new").send_keys(Keys.ENTER)
    wait_for(lambda: page.find("#edit").is_displayed())
    assert page.findings() == []
    assert page.driver.execute_script(wide) <= 0
    active = page.driver.switch_to.active_element
    active.send_keys(f"{uuid.uuid4().hex}@example.com" + Keys.TAB + "Bob" + Keys.ENTER)
    page.sees("#said", "Bob is created")
    page.find("#import").send_keys(Keys.ENTER)
    wait_for(lambda: page.find("#bring").is_displayed())
    assert page.findings() == []
    webdriver.ActionChains(page.driver).send_keys(Keys.ESCAPE).perform()
    wait_for(lambda: not page.find("#bring").is_displayed())
    for path in ("/health",):
        page.driver.get(fresh.url + path)
        page.sees("#status", "ok")
        assert page.findings() == []
        assert page.driver.execute_script(wide) <= 0
