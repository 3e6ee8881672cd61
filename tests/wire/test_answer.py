"""The head of an upstream's answer: what it says, what is mended and what is refused, however its
bytes arrive."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from problems import Problem, UpstreamBroken
from tests.harness import message
from tests.wire import attributes
from wire.answer import EVENT_ENDS, MAX_HEAD_BYTES, MAX_HEADER_LINES, Answer, end_of_head
from wire.chunks import Chunks, Sized, UntilClose

OK = b"HTTP/1.1 200 OK"


def read(*pieces: bytes, method: str = "GET") -> tuple[Answer, bytes] | None:
    """The head and what follows it, of bytes that arrive in pieces; None where it is not whole.
    Raises UpstreamBroken."""
    data, scanned = b"", 0
    for at, piece in enumerate(pieces):
        data += piece
        end, begin = end_of_head(data, scanned)
        if end >= 0:
            return Answer(data[:end], method), data[begin:] + b"".join(pieces[at + 1 :])
        scanned = len(data)
    return None


def texts(answer: Answer) -> bytes:
    """The header lines as they go on."""
    return b"".join(line.text for line in answer.lines)


def said(*pieces: bytes) -> object:
    """All that a head says, to be compared; the problem's type where it is refused."""
    try:
        found = read(*pieces)
    except Problem as problem:
        return type(problem)
    if found is None:
        return None
    answer, rest = found
    return attributes(answer) | {"body": type(answer.body)}, rest


WELL_FORMED = {
    "the smallest": b"HTTP/1.1 200\r\n\r\n",
    "a later minor version": b"HTTP/1.2 200 OK\r\nContent-Length: 0\r\n\r\n",
    "a length": message(OK, b"Content-Length: 2", body=b"ok"),
    "chunks": message(OK, b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "until the end": message(OK, body=b"\r\n\r\n\n\n"),
    "lone line feeds": b"HTTP/1.1 200 OK\nA: b\n\nbody",
    "a lone line feed before the last": b"HTTP/1.1 200 OK\r\nA: b\n\r\nbody",
    "a lone line feed at the end": b"HTTP/1.1 200 OK\r\nA: b\r\n\nbody",
    "a body that begins with line ends": message(OK, body=b"\n\r\n\r\n"),
    "a line that goes on": message(OK, b"A: b", b" c", b"\td"),
    "a space before a colon": message(OK, b"A : b", b"Content-Length : 3", body=b"abc"),
    "one length twice": message(OK, b"Content-Length: 3", b"Content-Length: 3", body=b"abc"),
    "a switch": message(b"HTTP/1.1 101 Switching Protocols", b"Upgrade: websocket", body=b"\x81\0"),
    "an interim answer": message(b"HTTP/1.1 103 Early Hints", b"Link: <a>") + message(OK),
    "bytes beyond ASCII": message(b"HTTP/1.1 200 \xfcber", b"A: \xff"),
}

MALFORMED = {
    "no status": b"HTTP/1.1\r\n\r\n",
    "a status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "a status below 100": b"HTTP/1.1 099 OK\r\n\r\n",
    "another version": b"HTTP/2.0 200 OK\r\n\r\n",
    "no HTTP": b"hello\r\n\r\n",
    "nothing before the end": b"\r\n\r\n",
    "nothing before line feeds": b"\n\n",
    "nothing before a lone line feed": b"\n\r\n",
    "a line without a colon": message(OK, b"A"),
    "a name with a space in it": message(OK, b"A b: c"),
    "no name": message(OK, b": c"),
    "a null": message(OK, b"A: b\0"),
    "a lone carriage return": message(OK, b"A: b\rc"),
    "two lengths": message(OK, b"Content-Length: 3", b"Content-Length: 4"),
    "a list of lengths": message(OK, b"Content-Length: 3, 4"),
    "a signed length": message(OK, b"Content-Length: -3"),
    "a length with an underscore": message(OK, b"Content-Length: 3_0"),
    "a length of 19 digits": message(OK, b"Content-Length: " + b"1" * 19),
    "a length of thousands of digits": message(OK, b"Content-Length: " + b"1" * 5000),
    "a length that is a digit beyond ASCII": message(OK, b"Content-Length: \xb2"),
    "an empty length": message(OK, b"Content-Length:"),
    "another coding": message(OK, b"Transfer-Encoding: gzip, chunked"),
    "a coding twice": message(OK, b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
    "chunks in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
}


@pytest.mark.parametrize("data", WELL_FORMED.values(), ids=WELL_FORMED)
def test_a_head_says_the_same_wherever_it_is_split(data: bytes) -> None:
    whole = said(data)
    assert isinstance(whole, tuple)
    for at in range(len(data) + 1):
        assert said(data[:at], data[at:]) == whole, at
    assert said(*(data[at : at + 1] for at in range(len(data)))) == whole


@pytest.mark.parametrize("body", [b"\r\n", b"\n\r\n", b"b\n\r\n", b"\n\n"])
def test_a_head_ends_with_its_first_empty_line_and_not_with_one_of_the_body(body: bytes) -> None:
    for end in (b"\n\n", b"\r\n\n", b"\n\r\n", b"\r\n\r\n"):
        found = read(OK + end + body)
        assert found is not None and found[1] == body


def test_a_head_may_have_two_thousand_lines() -> None:
    assert said(message(OK, *[b"a:"] * MAX_HEADER_LINES)) is not UpstreamBroken
    for line in (b"a:", b"a :", b"a:\r\n b"):  # The last is one line, in two pieces.
        assert said(message(OK, *[line] * (MAX_HEADER_LINES + 1))) is UpstreamBroken


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_what_is_malformed_is_refused_wherever_it_is_split(data: bytes) -> None:
    for at in range(len(data) + 1):
        assert said(data[:at], data[at:]) is UpstreamBroken, at
    assert said(*(data[at : at + 1] for at in range(len(data)))) is UpstreamBroken


@pytest.mark.parametrize("line_end", [b"\r\n", b"\n"])
def test_a_head_of_the_largest_size_is_taken_and_one_byte_more_is_not_wherever_they_are_split(
    line_end: bytes,
) -> None:
    start = OK + line_end + b"A: "
    largest = start + b"b" * (MAX_HEAD_BYTES - len(start)) + 2 * line_end
    whole = said(largest)
    assert isinstance(whole, tuple)
    for at in range(MAX_HEAD_BYTES - 2, len(largest) + 1):
        assert said(largest[:at], largest[at:]) == whole, at
    larger = largest.replace(b"A: ", b"A: b", 1)
    for at in (1, *range(MAX_HEAD_BYTES - 2, len(larger) + 1)):
        assert said(larger[:at], larger[at:]) is UpstreamBroken, at


PARTS = st.sampled_from(
    [b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\n\n", b"A: b", b"A", OK, b" ", b"\0"]
)


@given(st.lists(PARTS, max_size=12).map(b"".join), st.data())
def test_any_bytes_say_the_same_in_whatever_pieces_they_arrive(
    data: bytes, draw: st.DataObject
) -> None:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=4)))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    assert said(*pieces) == said(data)


def answer(*lines: bytes, method: str = "GET", first: bytes = OK) -> Answer:
    return Answer(b"\r\n".join([first, *lines]), method)


@pytest.mark.parametrize(
    "first, lines, method, body, reusable",
    [
        (OK, [b"Content-Length: 2"], "GET", Sized, True),
        (OK, [b"Content-Length: 0"], "GET", None, True),
        (OK, [b"Transfer-Encoding: chunked"], "GET", Chunks, True),
        (OK, [], "GET", UntilClose, False),
        (OK, [b"Content-Length: 2", b"Connection: close"], "GET", Sized, False),
        (b"HTTP/1.0 200 OK", [b"Content-Length: 2"], "GET", Sized, False),
        (b"HTTP/1.2 200 OK", [b"Content-Length: 2"], "GET", Sized, True),
        (b"HTTP/1.0 200 OK", [b"Content-Length: 2", b"Connection: keep-alive"], "GET", Sized, True),
        # One that must not have a body may send what it announces all the same.
        (OK, [b"Content-Length: 2"], "HEAD", None, False),
        (OK, [b"Transfer-Encoding: chunked"], "HEAD", None, False),
        (OK, [], "HEAD", None, True),
        (b"HTTP/1.1 204 No Content", [], "GET", None, True),
        (b"HTTP/1.1 304 Not Modified", [b"Content-Length: 2"], "GET", None, False),
        # What was mended is not trusted with another request (RFC 9112 section 6.3).
        (OK, [b"Content-Length: 2, 2"], "GET", Sized, False),
        (OK, [b"Content-Length: 2", b"Transfer-Encoding: chunked"], "GET", Chunks, False),
    ],
)  # fmt: skip
def test_how_the_body_ends_and_whether_the_connection_is_used_again(
    first: bytes, lines: list[bytes], method: str, body: type | None, reusable: bool
) -> None:
    head = answer(*lines, method=method, first=first)
    assert head.reusable is reusable
    assert head.body is None if body is None else isinstance(head.body, body)


def test_one_length_said_twice_is_said_once_and_one_beside_chunks_not_at_all() -> None:
    twice = answer(b"A: b", b"content-length: 2", b"C: d", b"Content-Length: 2")
    assert texts(twice) == b"A: b\r\ncontent-length: 2\r\nC: d\r\n"
    beside = answer(b"A: b", b"Content-Length: 2", b"Transfer-Encoding: chunked")
    assert texts(beside) == b"A: b\r\nTransfer-Encoding: chunked\r\n"
    assert beside.length is None
    zeros = answer(b"A: b", b"Content-Length: 0031", b"C: d")
    assert (zeros.length, zeros.reusable) == (31, True)
    assert texts(zeros) == b"A: b\r\nContent-Length: 31\r\nC: d\r\n"


@pytest.mark.parametrize(
    "value, events",
    [
        (b"text/event-stream", True),
        (b"Text/Event-Stream; charset=utf-8", True),
        (b" text/event-stream ;x", True),
        (b"text/event-streams", False),
        (b"text/plain; text/event-stream", False),
    ],
)
def test_a_media_type_is_compared_without_case_and_parameters(value: bytes, events: bool) -> None:
    assert answer(b"Content-Type: " + value).events is events


@pytest.mark.parametrize("value, coded", [(b"gzip", True), (b"identity", False), (b"", False)])
def test_whether_something_is_wrapped_around_events(value: bytes, coded: bool) -> None:
    assert answer(b"Content-Encoding: " + value).coded is coded


@pytest.mark.parametrize("lines", [[b"Upgrade: WebSocket"], [b"upgrade:websocket"]])
def test_what_an_answer_switches_to(lines: list[bytes]) -> None:
    assert answer(*lines, first=b"HTTP/1.1 101 Switching Protocols").switches == ["websocket"]


def test_an_event_ends_with_an_empty_line_of_any_kind() -> None:
    for ending in (b"\n\n", b"\r\r", b"\r\n\r\n", b"\r\n\n", b"\n\r\n", b"\n\r", b"\r\r\n"):
        assert (b"data: x" + ending).endswith(EVENT_ENDS), ending
    for middle in (b"data: x", b"data: x\n", b"data: x\r\n", b"data: x\r", b"data: \xe2\x82"):
        assert not middle.endswith(EVENT_ENDS), middle
