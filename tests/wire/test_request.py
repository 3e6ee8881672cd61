"""The head of a request: what it says, and what is refused, however its bytes arrive."""

from __future__ import annotations

import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from problems import BadRequest, HttpVersionNotSupported, Problem
from server.logs import LONGEST_TARGET, asked
from tests.harness import request
from tests.wire import attributes
from wire.chunks import Chunks, Sized
from wire.request import MAX_HEAD_BYTES, MAX_HEADER_LINES, MOST_COMMAS, Head, end_of_head, is_host


def read(*pieces: bytes) -> tuple[Head, bytes] | None:
    """The head and what follows it, of bytes that arrive in pieces; None where it is not whole.
    Raises BadRequest."""
    data, scanned = b"", 0
    for at, piece in enumerate(pieces):
        data += piece
        end = end_of_head(data, scanned)
        if end >= 0:
            return Head(data[:end]), data[end + 4 :] + b"".join(pieces[at + 1 :])
        scanned = len(data)
    return None


def said(*pieces: bytes) -> object:
    """All that a head says, to be compared; the problem's type where it is refused."""
    try:
        found = read(*pieces)
    except Problem as problem:
        return type(problem)
    if found is None:
        return None
    head, rest = found
    if head.problem is not None:
        return type(head.problem)
    return attributes(head), head.upgrade, rest


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


WELL_FORMED = {
    "the smallest": request(),
    "HTTP/1.0 without Host": b"GET / HTTP/1.0\r\n\r\n",
    "an empty Host": b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
    "a later minor version": b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "a length": request(b"POST /a?b=c HTTP/1.1", b"Content-Length: 5", body=b"hello"),
    "chunks": request(b"PUT /a HTTP/1.1", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "another behind it": request() + request(b"GET /second HTTP/1.1"),
    "a target in absolute form": request(b"GET http://other.example/x HTTP/1.1"),
    "an escape in its path": request(b"GET /%75sers?%75 HTTP/1.1"),
    "an upgrade": request(
        b"GET /chat HTTP/1.1",
        b"Connection: keep-alive, Upgrade",
        b"Upgrade: websocket",
        body=b"\x81\0",
    ),
    "a name twice": request(b"GET / HTTP/1.1", b"A: 1", b"a: 2"),
    "bytes beyond ASCII in a value": request(b"GET / HTTP/1.1", b"A: \xff\xfe\t\x80"),
    "an expectation": request(b"POST / HTTP/1.1", b"Expect: 100-continue", b"Content-Length: 3"),
    "all servers": request(b"OPTIONS * HTTP/1.1"),
    "a tunnel's authority": request(b"CONNECT host:443 HTTP/1.1"),
}

MALFORMED = {
    "no version": b"GET /\r\nHost: a\r\n\r\n",
    "two spaces": b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    "a control in the target": b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
    "no target": b"GET  HTTP/1.1\r\nHost: a\r\n\r\n",
    "a name that is no token": b"G(T / HTTP/1.1\r\nHost: a\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    "a Host with a path": b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "a Host that is no IPv6 address": b"GET / HTTP/1.1\r\nHost: [1:2]\r\n\r\n",
    "a space before a colon": request(b"GET / HTTP/1.1", b"A : b"),
    "a line without a colon": request(b"GET / HTTP/1.1", b"A"),
    "a line that goes on": request(b"GET / HTTP/1.1", b"A: b", b" c"),
    "a null in a value": request(b"GET / HTTP/1.1", b"A: b\0c"),
    "a carriage return in a value": request(b"GET / HTTP/1.1", b"A: b\rc"),
    "a line feed alone": b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    "line feeds alone": b"GET / HTTP/1.1\nHost: a\n\n",
    "a lone line feed in the headers": b"GET / HTTP/1.1\r\nHost: a\nB: c\r\n\r\n",
    "a length and chunks": request(
        b"GET / HTTP/1.1", b"Content-Length: 1", b"Transfer-Encoding: chunked"
    ),
    "two lengths": request(b"GET / HTTP/1.1", b"Content-Length: 1", b"Content-Length: 1"),
    "a list of lengths": request(b"GET / HTTP/1.1", b"Content-Length: 1, 1"),
    "a signed length": request(b"GET / HTTP/1.1", b"Content-Length: +1"),
    "a length with an underscore": request(b"GET / HTTP/1.1", b"Content-Length: 1_0"),
    "an empty length": request(b"GET / HTTP/1.1", b"Content-Length:"),
    "another coding": request(b"GET / HTTP/1.1", b"Transfer-Encoding: gzip"),
    "two codings": request(b"GET / HTTP/1.1", b"Transfer-Encoding: gzip, chunked"),
    "chunked twice": request(
        b"GET / HTTP/1.1", b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"
    ),
    "chunks in HTTP/1.0": b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "a target that is a name": request(b"GET evil HTTP/1.1"),
    "a target of another scheme": request(b"GET ftp://a/ HTTP/1.1"),
    "all servers, with GET": request(b"GET * HTTP/1.1"),
    "too many lines": request(b"GET / HTTP/1.1", *[b"A: b"] * MAX_HEADER_LINES),
}


@pytest.mark.parametrize("data", WELL_FORMED.values(), ids=WELL_FORMED)
def test_a_head_says_the_same_wherever_it_is_split(data: bytes) -> None:
    whole = said(data)
    assert isinstance(whole, tuple)
    for at in range(len(data) + 1):
        assert said(data[:at], data[at:]) == whole, at
    assert said(*bytewise(data)) == whole


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_what_is_malformed_is_refused_wherever_it_is_split(data: bytes) -> None:
    assert said(data) is BadRequest
    for at in range(len(data) + 1):
        assert said(data[:at], data[at:]) is BadRequest, at
    assert said(*bytewise(data)) is BadRequest


@pytest.mark.parametrize("version", [b"2.0", b"0.9", b"3.1"])
def test_another_major_version_is_refused_as_such(version: bytes) -> None:
    assert said(b"GET / HTTP/%b\r\nHost: a\r\n\r\n" % version) is HttpVersionNotSupported


@pytest.mark.parametrize("data", WELL_FORMED.values(), ids=WELL_FORMED)
def test_what_is_not_whole_says_nothing(data: bytes) -> None:
    end = data.index(b"\r\n\r\n") + 4
    for at in range(end):
        assert said(data[:at]) is None, at


def test_a_head_of_the_largest_size_is_taken_and_one_byte_more_is_not_wherever_they_are_split() -> (
    None
):
    start = b"GET / HTTP/1.1\r\nHost: a\r\nA: "
    largest = start + b"b" * (MAX_HEAD_BYTES - len(start)) + b"\r\n\r\n"
    assert isinstance(said(largest), tuple)
    for at in range(MAX_HEAD_BYTES - 3, len(largest) + 1):
        assert said(largest[:at], largest[at:]) == said(largest), at
    larger = largest[:-4] + b"b\r\n\r\n"
    for at in (1, *range(MAX_HEAD_BYTES - 3, len(larger) + 1)):
        assert said(larger[:at], larger[at:]) is BadRequest, at


# Bytes that matter to where a head ends, and some that do not.
PARTS = st.sampled_from(
    [
        b"\r",
        b"\n",
        b"\r\n",
        b"\r\n\r\n",
        b":",
        b" ",
        b"A: b\r\n",
        b"GET / HTTP/1.1\r\n",
        b"Host: a\r\n",
        b"\0",
    ]
)


@given(st.lists(PARTS, max_size=12).map(b"".join), st.data())
def test_any_bytes_say_the_same_in_whatever_pieces_they_arrive(
    data: bytes, draw: st.DataObject
) -> None:
    # More may be refused of what is not whole yet, never less, and never taken for something else.
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=4)))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    whole, split = said(data), said(*pieces)
    assert split == whole or (split is BadRequest and not isinstance(whole, tuple)), (whole, split)


@given(st.binary(max_size=200))
def test_no_bytes_have_a_head_fail_but_by_a_problem(data: bytes) -> None:
    head = Head(data)
    assert head.problem is None or isinstance(head.problem, Problem)


@pytest.mark.parametrize(
    "target, origin, path, query, host",
    [
        (b"/a", "/a", "/a", "", "h"),
        (b"/a?b?c", "/a?b?c", "/a", "b?c", "h"),
        (b"/a?", "/a?", "/a", "", "h"),
        (b"//x/../y", "//x/../y", "//x/../y", "", "h"),
        (b"/%2e%2F%zz", "/%2e%2F%zz", "/./%zz", "", "h"),
        (b"/\xc3\xa9", "/\xc3\xa9", "/\xc3\xa9", "", "h"),
        (b"http://o:1/a?b", "/a?b", "/a", "b", "o:1"),
        (b"HTTPS://o", "/", "/", "", "o"),
        (b"http://o?q", "/?q", "/", "q", "o"),
        (b"http://user:pw@o/", "/", "/", "", "o"),
    ],
)  # fmt: skip
def test_a_target_keeps_its_bytes_and_its_path_is_decoded(
    target: bytes, origin: str, path: str, query: str, host: str
) -> None:
    head = Head(b"GET %b HTTP/1.1\r\nHost: h" % target)
    assert head.problem is None
    assert (head.origin, head.path, head.query, head.host) == (origin, path, query, host)
    assert head.target == target.decode("latin-1")


def test_options_for_an_authority_alone_is_for_the_whole_server() -> None:
    assert Head(b"OPTIONS http://o HTTP/1.1\r\nHost: h").origin == "*"


@pytest.mark.parametrize(
    "version, lines, persistent",
    [
        (b"1.1", [], True),
        (b"1.1", [b"Connection: close"], False),
        (b"1.1", [b"Connection: a, CLOSE"], False),
        (b"1.1", [b"Connection: a", b"Connection: close"], False),
        (b"1.0", [], False),
        (b"1.0", [b"Connection: Keep-Alive"], True),
        (b"1.0", [b"Connection: keep-alive, close"], False),
    ],
)
def test_whether_the_connection_is_kept(
    version: bytes, lines: list[bytes], persistent: bool
) -> None:
    data = b"\r\n".join([b"GET / HTTP/%b" % version, b"Host: h", *lines])
    assert Head(data).persistent is persistent


@pytest.mark.parametrize("name", [b"Connection", b"Upgrade"])
def test_a_list_may_have_so_many_commas(name: bytes) -> None:
    for commas, problem in ((MOST_COMMAS, None), (MOST_COMMAS + 1, BadRequest)):
        head = Head(b"GET / HTTP/1.1\r\nHost: h\r\n" + name + b": a" + b",a" * commas)
        assert (head.problem and type(head.problem)) is problem


@pytest.mark.parametrize("digits, length", [(b"0", 0), (b"031", 31), (b"0" * 5000 + b"7", 7)])
def test_a_length_is_a_number_however_it_is_spelled(digits: bytes, length: int) -> None:
    head = Head(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: " + digits)
    assert head.problem is None and head.length == length


def test_a_length_beyond_all_numbers_is_not_small() -> None:
    head = Head(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: " + b"9" * 5000)
    assert head.problem is None and head.length is not None and head.length >= 1 << 60


def test_a_folded_head_says_the_same_and_is_a_few_objects() -> None:
    """Two hundred lines were 400 objects for the garbage collector, for as long as a body took."""
    text = b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(b"A%d: b\r\n" % n for n in range(190))
    head = Head(text[:-2])
    lines, values = head.lines, head.values
    assert len(lines) == len(values) == 191
    head.fold()
    assert sum(isinstance(one, list | dict) for one in gc.get_referents(head)) == 0
    assert (head.lines, head.values) == (lines, values)


def test_of_a_forgotten_head_there_is_what_the_log_tells() -> None:
    head = Head(b"GET /a?" + b"b" * 60000 + b" HTTP/1.1\r\nHost: a\r\nCookie: " + b"c" * 4000)
    told = asked(head)
    head.forget(LONGEST_TARGET)
    assert (head.lines, head.values, head.path) == ([], {}, "")
    assert asked(head) == told and len(head.target) == LONGEST_TARGET + 1
    head.forget(200)
    assert told.startswith(asked(head).removesuffix('\\u2026"')) and len(head.target) == 201


def test_of_a_forgotten_method_there_is_no_more_either() -> None:
    head = Head(b"G" * 60000 + b" /a//b@c HTTP/1.1\r\nHost: a")
    told = asked(head)
    head.forget(200)
    assert asked(head) == told and len(head.method) == 200


def test_a_head_is_kept_once_and_its_target_once_more() -> None:
    head = Head(b"POST http://a/x?" + b"q" * 60000 + b" HTTP/1.1\r\nHost: a\r\nContent-Length: 1")
    kept = [value for value in attributes(head).values() if isinstance(value, str)]
    assert sum(map(len, kept)) < 61000
    assert len(head.query) == 60000


def test_the_user_name_in_a_long_target_is_not_told_after_that_either() -> None:
    head = Head(b"GET http://ann:" + b"x" * 9000 + b"@a/" + b"b" * 9000 + b" HTTP/1.1\r\nHost: a")
    head.forget(200)
    assert len(head.target) == 201 and asked(head).startswith('GET "http://a/b')


def test_what_takes_the_body_apart() -> None:
    def body(*lines: bytes) -> object:
        return Head(request(b"POST / HTTP/1.1", *lines)[:-4]).body()

    assert body() is None
    assert body(b"Content-Length: 0") is None
    assert isinstance(body(b"Content-Length: 1"), Sized)
    assert isinstance(body(b"Transfer-Encoding: Chunked"), Chunks)


UPGRADE = (b"Connection: upgrade", b"Upgrade: websocket")


@pytest.mark.parametrize(
    "first, lines, upgrade",
    [
        (b"GET / HTTP/1.1", UPGRADE, True),
        (b"GET / HTTP/1.1", (b"Connection: keep-alive", b"Connection: UPGRADE", b"Upgrade: WebSocket"), True),
        (b"GET / HTTP/1.1", (b"Connection: upgrade", b"Upgrade: h2c, websocket"), True),
        (b"GET / HTTP/1.1", (*UPGRADE, b"Content-Length: 0"), True),
        (b"GET / HTTP/1.1", UPGRADE[:1], False),
        (b"GET / HTTP/1.1", UPGRADE[1:], False),
        (b"GET / HTTP/1.1", (b"Connection: upgrade", b"Upgrade: h2c"), False),
        (b"GET / HTTP/1.1", (b"Connection: upgrade", b"Upgrade: websocket2"), False),
        (b"GET / HTTP/1.0", UPGRADE, False),
        (b"POST / HTTP/1.1", UPGRADE, False),
        (b"GET / HTTP/1.1", (*UPGRADE, b"Content-Length: 1"), False),
        (b"GET / HTTP/1.1", (*UPGRADE, b"Transfer-Encoding: chunked"), False),
    ],
)  # fmt: skip
def test_what_asks_for_a_websocket(first: bytes, lines: tuple[bytes, ...], upgrade: bool) -> None:
    head = Head(request(first, *lines)[:-4])
    assert head.problem is None and head.upgrade is upgrade


def test_a_head_request_that_is_malformed_is_known_as_one() -> None:
    assert Head(b"HEAD / HTTP/1.1\r\nbad").method == "HEAD"


@pytest.mark.parametrize(
    "text, valid",
    [
        ("a.example", True), ("a:8080", True), ("a:", True), ("127.0.0.1", True), ("[::1]:80", True),
        ("a%41", True), ("a_b", True), ("", False), ("a b", False), ("a@b", False), ("[::1", False),
        ("::1", False), ("[::g]", False), ("a:b", False), ("a%4", False), ("a,b", True),
    ],
)  # fmt: skip
def test_what_is_a_host(text: str, valid: bool) -> None:
    assert is_host(text) is valid
