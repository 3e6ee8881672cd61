"""The applications that every merge is tried with: they install and run in a minute and a half."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_one_logs_in_to_djangos_admin(both_ways: Callable[..., Any]) -> None:
    assert both_ways("django_admin") == {
        "entry": [302, "/admin/login/?next=/admin/"],
        "page": [200, True],
        "login": [302, "/admin/"],
        "cookies": ["csrftoken", "sessionid"],
        "home": [200, True],
        "added": [302, "/admin/auth/user/ID/change/"],
        "listed": [200, True],
        "forged": 403,
    }


def test_one_reads_all_pages_of_datasette(both_ways: Callable[..., Any]) -> None:
    first = "BASE/shop/orders.json?_size=500&_shape=objects"
    assert both_ways("datasette_pages") == {
        "pages": [first, *(f"{first}&_next={after}" for after in (500, 1000, 1500, 2000))],
        "all": True,
        "link": 'BASE/shop/orders.json?_size=500; rel="alternate"; type="application/json+datasette"',
        "html": [200, True],
        "moved": [302, "/shop/orders"],
        "export": [2501, "id,item", '2500,"item 2500, ünïcode"'],
    }


def test_fastapi_redirects_streams_uploads_and_echoes(both_ways: Callable[..., Any]) -> None:
    found = both_ways("fastapi_events")
    assert found["slash"] == [307, "BASE/items/?a=1&b=%2F"]
    assert found["listed"] == {"self": "BASE/items/?a=1&b=%2F", "item": "BASE/items/a b"}
    for last, events in zip((0, 3), found["events"], strict=True):
        assert events[0] == ["hello", str(last), "one"]
        assert events[1:] == [["message", str(last + n), f"word {n}"] for n in (1, 2, 3)]
    assert found["file"][:2] == ["naïve name.bin", 3_072_000] and found["file"][3]
    assert found["echo"] == ["ws://HOST/echo hello", True]


def test_socket_io_polls_and_speaks_websocket(both_ways: Callable[..., Any]) -> None:
    visit = [["welcome", {"name": "Ann"}], True, True, True, True]
    assert both_ways("socketio_rooms") == {
        "polling": ["polling", *visit],
        "websocket": ["websocket", *visit],
        "upgraded": ["websocket", *visit],
        "stranger": "Unexpected status code 400 in server response",
    }


def test_s3_accepts_signed_requests(both_ways: Callable[..., Any]) -> None:
    assert both_ways("s3_signed") == {
        "small": ["hello", {"who": "ann"}, '"5d41402abc4b2a76b9719d911017c592"'],
        "large": [12 << 20, True],
        "part": True,
        "listed": ["a folder/naïve +%&=~ name.txt", "large.bin"],
        "wrong secret": "SignatureDoesNotMatch",
    }


def test_webdav_copies_moves_and_locks(both_ways: Callable[..., Any]) -> None:
    assert both_ways("webdav_files") == {
        "listed": [["another/moved.bin", 3_072_000]],
        "same": True,
        "lock": [200, 423, 204, 204],
        "refused": [502, 401],
        "left": [],
    }


def test_a_log_in_by_ntlm_is_ones_own(both_ways: Callable[..., Any]) -> None:
    assert both_ways("ntlm_site") == {"people": [[200, True]], "strangers": [[401, ""]]}
