"""Header fields and identifiers."""

from __future__ import annotations

import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.headers import (
    SHORT_BYTES,
    Line,
    authenticates_connection,
    line,
    listed,
    remembering,
    remembering_short,
)
from wire.ids import new_id, request_id


def test_a_short_line_is_read_once_and_one_that_cannot_be_read_is_refused_each_time() -> None:
    read: list[bytes] = []

    @remembering
    def lines_of(raw: bytes) -> Line:
        read.append(raw)
        name, colon, value = raw.partition(b":")
        if not colon:
            raise ValueError
        return line(name, value)

    long = b"Cookie: " + b"c" * SHORT_BYTES
    for _ in range(3):
        accept, cookie = lines_of([b"ACCEPT:\t\xe4 b ", long])
        assert (accept.key, accept.value) == ("accept", "\xe4 b")
        assert accept.text == b"ACCEPT: \xe4 b\r\n"
        assert cookie.text == long + b"\r\n"
        with pytest.raises(ValueError):
            lines_of([b"malformed"])
    assert read.count(b"ACCEPT:\t\xe4 b ") == 1
    assert read.count(b"malformed") == read.count(long) == 3


def test_what_is_remembered_is_forgotten_before_it_is_too_much() -> None:
    """Callers choose what is remembered."""
    read: list[str] = []

    def length(text: str) -> int:
        read.append(text)
        return len(text)

    recall = remembering_short(length, most=10)
    assert [recall(str(number)) for number in (0, *range(25), 0)] == [1] * 11 + [2] * 15 + [1]
    assert read.count("0") == 2


@pytest.mark.parametrize(
    "values, members",
    [
        ([], []),
        ([""], [""]),
        (["a"], ["a"]),
        (["a,b", "c"], ["a", "b", "c"]),
        ([" a\t, b ,\tc "], ["a", "b", "c"]),
        (["a,,b"], ["a", "", "b"]),
    ],
)
def test_the_members_of_a_list_that_stands_on_several_lines(
    values: list[str], members: list[str]
) -> None:
    assert listed(values) == members


# No other white space is taken away: what is left of `close\xa0` is not `close`.
@given(st.text(st.sampled_from("ab \t\x0b\x0c\x85\xa0"), max_size=8))
def test_only_spaces_and_tabs_are_around_a_member(text: str) -> None:
    assert listed([text]) == [re.sub(r"^[ \t]+|[ \t]+$", "", text)]


def test_a_new_id_is_a_uuid_that_begins_with_the_time() -> None:
    before = time.time_ns() // 1_000_000
    ids = [new_id() for _ in range(1000)]
    after = time.time_ns() // 1_000_000
    assert len(set(ids)) == 1000
    for text in ids:
        one = uuid.UUID(text)
        assert str(one) == text
        assert one.version == 7 and one.variant == uuid.RFC_4122
        assert before <= one.int >> 80 <= after
    assert ids == sorted(ids)


def test_a_new_id_comes_after_the_last_one_though_the_clock_is_set_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = new_id()
    an_hour_ago = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: an_hour_ago)
    ids = [first, *(new_id() for _ in range(500))]
    assert ids == sorted(ids) and len(set(ids)) == len(ids)
    monkeypatch.undo()
    assert new_id() > ids[-1]


def test_threads_never_make_the_same_id_nor_an_older_one() -> None:
    def make(_: int) -> list[str]:
        return [new_id() for _ in range(2000)]

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make, range(8)))
    assert all(ids == sorted(ids) for ids in made)
    assert len({one[:18] for ids in made for one in ids}) == 16000  # before what is random


@pytest.mark.parametrize("given", ["a", "0123-abc", "Root=1-5759", "a" * 128, "/+~:@._="])
def test_an_id_that_a_request_came_with_stays(given: str) -> None:
    assert request_id([given]) == given


@pytest.mark.parametrize(
    "given", [None, [], [""], ["a b"], ["a", "b"], ["a" * 129], ['"a"'], ["a\n"], ["a,b"], ["\xe9"]]
)  # fmt: skip
def test_another_is_made_for_one_that_is_not_fit_to_be_logged(given: list[str] | None) -> None:
    assert uuid.UUID(request_id(given)).version == 7


@pytest.mark.parametrize(
    "values, whether",
    [
        (["NTLM"], True),
        (["negotiate YII="], True),
        (["Negotiate\tYII="], True),
        (['Basic realm="a, b"', "ntlm TlRM"], True),
        (['Basic realm="a", Negotiate'], True),
        ([], False),
        (["Basic realm=NTLM", "Bearer"], False),
        (["NTLMv9 a"], False),
    ],
)
def test_schemes_that_authenticate_a_connection_are_known(values: list[str], whether: bool) -> None:
    assert authenticates_connection(values) is whether
