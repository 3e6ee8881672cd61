"""The pages for browsers, in a real one: Chromium without a window."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import axe_core_python
import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from services import browser as pages
from tests.harness import Databases, ScriptedUpstream, Service, call, create_user, wait_for

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
        wait_for(lambda: self.find(selector).is_enabled() and self.find(selector).is_displayed())
        self.find(selector).click()

    def fill(self, selector: str, text: str) -> None:
        wait_for(lambda: self.find(selector).is_displayed(), 10, f"{selector} to be shown")
        self.find(selector).send_keys(Keys.CONTROL + "a" + Keys.NULL, text or Keys.BACKSPACE)

    def names(self) -> list[str]:
        script = "return [...document.querySelectorAll('#rows tr')].map(r => r.cells[1].innerText)"
        return list(self.driver.execute_script(script))

    def shows(self, *names: str) -> None:
        wait_for(lambda: self.names() == list(names), 10, f"{names}, not {self.names()}")

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
    page.sees("#empty", "There are no users yet")
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
    page.fill("#field-email", "ann@example.com")
    page.fill("#field-name", "Ann" + Keys.ENTER)
    page.sees("#said", "Created")
    page.shows("Ann")
    [user] = fresh.call("GET", "/users").json()["users"]
    assert user["metadata"] == {"plan": "pro", "big": 12345678901234567890}
    page.click("#new")
    page.fill("#field-email", "ANN@example.com")
    page.fill("#field-name", "Bob")
    page.click("#save")
    page.sees("#error-email", "Another user has this email address")
    page.click("#edit [data-close]")
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
    page.sees("#empty", "There are no users yet")


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
    page.fill("#q", "%_")
    page.sees("#empty", "Nobody's name or address contains")


@needs_chromium
def test_a_conflict_is_shown_as_two_versions(
    fresh: Service, window: Callable[..., Browser]
) -> None:
    path = create_user(fresh, "ann@example.com").get("Location") or ""
    page = window()
    page.driver.get(f"{fresh.url}/users")
    for choice, kept in (("#keep-mine", "Mine"), ("#take-theirs", "Theirs")):
        page.act("Edit", "ann@example.com")
        page.fill("#field-name", "Mine")
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
    two.sees("#empty", "no users")
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
    page.sees("#bring-count", "1200 of 1200 rows: 1198 created, 0 replaced, 0 unchanged, 2 refused")
    page.sees("#refused", "Line 702: email")
    page.sees("#refused", "Line 1103: Another user has this email address")
    assert page.findings() == []
    page.click("#download")
    refused = tmp_path / "refused.csv"
    wait_for(refused.exists)
    wait_for(
        lambda: refused.read_bytes() == f"name,email\n{rows[700]}\r\n{rows[1100]}\r\n".encode()
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
    bad = tmp_path / "bad.csv"
    bad.write_text("name,mail\nAnn,ann@example.com\n")
    page.click("#import")
    page.find("#file").send_keys(str(bad))
    page.click("#bring-start")
    page.sees("#bring-error", "mail is no column of users")
    bad.write_bytes("name,email\nZo\u00eb,z@example.com\n".encode("latin-1"))
    page.find("#file").send_keys(str(bad))
    page.click("#bring-start")
    page.sees("#bring-error", "not in UTF-8")


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
    page.fill("#token", "t0ken" + Keys.ENTER)
    page.shows("Ann")
    page.driver.refresh()
    page.shows("Ann")
    assert page.driver.execute_script("return [localStorage.length, document.cookie]") == [0, ""]
    page.click("#forget")
    wait_for(lambda: page.find("#token").is_displayed())
    page.driver.refresh()
    wait_for(lambda: page.find("#token").is_displayed())


@needs_chromium
def test_a_database_that_is_away_is_told_in_words(
    start: Callable[..., Service], window: Callable[..., Browser]
) -> None:
    service = start()
    page = window()
    page.driver.get(f"{service.url}/users")
    page.sees("#failed", "The database is away")
    assert page.findings() == []
    page.click("#again")
    page.sees("#failed", "The database is away")
    page.driver.get(f"{service.url}/health")
    page.sees("#status", "degraded")
    page.sees("#meaning", "still forwarded")
    assert page.findings() == []


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
    page.sees("#said", "Created")
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
