"""Bodies, taken apart: the same in whatever pieces they arrive."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness import chunked
from wire.chunks import (
    FRAMING_BYTES,
    FRAMING_FOR_EACH_BYTE,
    LAST_CHUNK,
    MAX_LINE_BYTES,
    Chunks,
    Sized,
    UntilClose,
    chunk,
)


def taken(reader: Chunks | Sized | UntilClose, *pieces: bytes) -> tuple[bytes, bytes, bool, bool]:
    """The body in these pieces, what follows it, whether it is complete and whether malformed."""
    body, rest = b"", b""
    for piece in pieces:
        if reader.complete or reader.malformed:
            rest += piece
            continue
        data, rest = reader.feed(piece)
        body += data
    return body, rest, reader.complete, reader.malformed


def verdict(exact: bool, *pieces: bytes) -> object:
    """What becomes of chunks; of malformed ones only that they are."""
    body, rest, complete, malformed = taken(Chunks(exact), *pieces)
    return "malformed" if malformed else (body, rest, complete)


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


WELL_FORMED = {
    "an empty body": LAST_CHUNK,
    "one chunk": chunked(b"hello"),
    "several, with what looks like framing in them": chunked(b"0\r\n\r\n", b"\r\n", b"a" * 20),
    "a size in capitals and with zeros": b"000A\r\n0123456789\r\n0\r\n\r\n",
    "extensions": b'5;a=b;c="d e"\r\nhello\r\n0 ;x\r\n\r\n',
    "trailers": chunked(b"hello", trailer=b"A: b\r\nC:\r\n"),
    "another request behind it": chunked(b"hello") + b"GET / HTTP/1.1\r\n\r\n",
}
# What a server may send and a client may not.
LENIENT = {
    "lone line feeds": b"5\nhello\n0\n\n",
    "a size that is filled up": b"5   \r\nhello\r\n0  \r\n\r\n",
    "a trailer that is none": b"0\r\nhello\r\n\r\n",
}
MALFORMED = {
    "no size": b"\r\nhello",
    "a size that is no number": b"x\r\n",
    "a signed size": b"+5\r\nhello\r\n",
    "a size with a prefix": b"0x5\r\nhello\r\n",
    "a size with an underscore": b"1_0\r\nhello\r\n",
    "a size beyond all sizes": b"1" * 16 + b"\r\n",
    "a space before a size": b" 5\r\nhello\r\n",
    "a chunk that goes on": b"5\r\nhellooo\r\n0\r\n\r\n",
    "a chunk that ends early": b"5\r\nhel\r\n0\r\n\r\n",
    "a carriage return in an extension": b"5;a\rb\r\nhello\r\n",
    "a null in an extension": b"5;\0\r\nhello\r\n",
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("data", WELL_FORMED.values(), ids=WELL_FORMED)
def test_chunks_are_the_same_wherever_they_are_split(data: bytes, exact: bool) -> None:
    whole = verdict(exact, data)
    assert whole != "malformed"
    for at in range(len(data) + 1):
        assert verdict(exact, data[:at], data[at:]) == whole, at
    assert verdict(exact, *bytewise(data)) == whole


@pytest.mark.parametrize("data", LENIENT.values(), ids=LENIENT)
def test_what_only_a_server_may_send_is_read_from_a_server_only(data: bytes) -> None:
    for at in range(len(data) + 1):
        assert verdict(False, data[:at], data[at:]) == verdict(False, data) != "malformed", at
        assert verdict(True, data[:at], data[at:]) == "malformed", at


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_what_is_malformed_is_refused_wherever_it_is_split(data: bytes, exact: bool) -> None:
    for at in range(len(data) + 1):
        assert verdict(exact, data[:at], data[at:]) == "malformed", at
    assert verdict(exact, *bytewise(data)) == "malformed"


def test_a_trailer_of_a_client_has_to_be_one() -> None:
    for line in (b"no colon", b": no name", b"a b: c", b"a: \0"):
        assert verdict(True, b"0\r\n" + line + b"\r\n\r\n") == "malformed", line


@pytest.mark.parametrize("data", WELL_FORMED.values(), ids=WELL_FORMED)
def test_chunks_that_are_cut_are_never_whole(data: bytes) -> None:
    _, rest, _, _ = taken(Chunks(), data)
    for at in range(len(data) - len(rest)):
        assert taken(Chunks(), data[:at])[2:] == (False, False), at


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("place", ["size", "trailer"])
def test_a_line_of_the_largest_size_is_taken_and_one_byte_more_is_not_wherever_it_is_split(
    place: str, exact: bool
) -> None:
    def body(spare: int) -> bytes:
        start = b"5;" if place == "size" else b"A:"
        line = start + b"x" * (MAX_LINE_BYTES - spare - 1 - len(start)) + b"\r\n"
        return line + b"hello\r\n0\r\n\r\n" if place == "size" else b"0\r\n" + line + b"\r\n"

    fits, larger = body(0), body(-1)
    for at in (0, 1, 10, *range(MAX_LINE_BYTES - 3, MAX_LINE_BYTES + 6)):
        assert verdict(exact, fits[:at], fits[at:]) == verdict(exact, fits) != "malformed", at
        assert verdict(exact, larger[:at], larger[at:]) == "malformed", at


@pytest.mark.parametrize("exact", [False, True])
def test_trailers_may_have_so_many_bytes_in_all(exact: bool) -> None:
    line = b"A:" + b"x" * 98
    fits = (line + b"\r\n") * (MAX_LINE_BYTES // len(line))
    assert verdict(exact, b"0\r\n" + fits + b"\r\n") != "malformed"
    assert verdict(exact, b"0\r\n" + fits + line + b"\r\n\r\n") == "malformed"


def test_a_client_may_not_send_framing_without_end() -> None:
    piece = b"1;" + b"x" * 1000 + b"\r\na\r\n"
    reader, sent = Chunks(exact=True), 0
    while not reader.malformed:
        reader.feed(piece)
        sent += len(piece)
        assert sent < 2 * FRAMING_BYTES + len(piece)
    # So many bytes of framing as a line of a byte each has are allowed for ever.
    reader = Chunks(exact=True)
    for _ in range(FRAMING_BYTES):
        reader.feed(b"1;" + b"x" * (FRAMING_FOR_EACH_BYTE - 4) + b"\r\na\r\n")
    assert not reader.malformed


def test_a_body_is_known_to_be_too_large_before_it_is_here() -> None:
    reader = Chunks(exact=True)
    reader.feed(b"3\r\nabc\r\nFFFF\r\nx")
    assert reader.announced == 3 + 0xFFFF and not reader.complete


PIECES = st.lists(st.binary(min_size=1, max_size=40), max_size=6)


@given(PIECES, st.binary(max_size=20), st.data())
def test_what_was_put_into_chunks_comes_out_of_them(
    pieces: list[bytes], rest: bytes, draw: st.DataObject
) -> None:
    data = b"".join(map(chunk, pieces)) + LAST_CHUNK + rest
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=8)))
    split = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    assert taken(Chunks(exact=True), *split) == (b"".join(pieces), rest, True, False)


PARTS = st.sampled_from(
    [b"0", b"1", b"5", b"\r", b"\n", b"\r\n", b"hello", b";", b" ", b"a:b", b"\0"]
)


@given(st.lists(PARTS, max_size=14).map(b"".join), st.booleans())
def test_any_bytes_mean_the_same_split_anywhere(data: bytes, exact: bool) -> None:
    whole = verdict(exact, data)
    for at in range(len(data) + 1):
        split = verdict(exact, data[:at], data[at:])
        assert split == whole, at


@pytest.mark.parametrize("length", [1, 5])
def test_a_sized_body_ends_where_it_says(length: int) -> None:
    data = b"hello, and more"
    for at in range(len(data) + 1):
        body, rest, complete, _ = taken(Sized(length), data[:at], data[at:])
        assert (body, rest, complete) == (data[:length], data[length:], True), at
    assert taken(Sized(16), data) == (data, b"", False, False)


def test_a_body_until_the_end_takes_all() -> None:
    assert taken(UntilClose(), b"a", b"0\r\n\r\n") == (b"a0\r\n\r\n", b"", False, False)
