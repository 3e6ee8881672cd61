"""Header fields and identifiers."""

from __future__ import annotations

import re
import time
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.fields import authenticates_connection, field_values, listed
from wire.ids import new_id, request_id


def test_the_values_of_a_name_are_found_in_their_order_whatever_its_case() -> None:
    fields = [("Accept", "a"), ("B", "x"), ("ACCEPT", "b, c"), ("accept", "")]
    assert field_values(fields, "accept") == ["a", "b, c", ""]
    assert field_values(fields, "c") == []


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
        (['Basic realm="a, b"', "ntlm TlRM"], True),
        (['Basic realm="a", Negotiate'], True),
        ([], False),
        (["Basic realm=NTLM", "Bearer"], False),
        (["NTLMv9 a"], False),
    ],
)
def test_schemes_that_authenticate_a_connection_are_known(values: list[str], whether: bool) -> None:
    assert authenticates_connection(values) is whether
