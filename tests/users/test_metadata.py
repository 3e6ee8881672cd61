"""`metadata`: what a team keeps of a user, and how PATCH merges it (RFC 7396)."""

from __future__ import annotations

import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness import Reply, Service, create_user, invalid_fields, new_email, problem

# RFC 7396, appendix A: the rows whose original and result can be metadata, which is an object.
APPENDIX = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ({"a": "b"}, {}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


def with_metadata(service: Service, metadata: Any) -> Reply:
    body = {"email": new_email(), "name": "Ann", "metadata": metadata}
    return service.call("POST", "/users", body)


def raw(service: Service, text: str, method: str = "POST", path: str = "/users") -> Reply:
    """A write with `metadata` exactly as written."""
    member = f'"metadata": {text}'
    body = f'{{"email": "{new_email()}", "name": "Ann", {member}}}'
    if method == "PATCH":
        body = f"{{{member}}}"
    return service.call(method, path, body.encode(), {"Content-Type": "application/json"})


def merged(target: Any, patch: Any) -> Any:
    """RFC 7396 section 2, as it is written there."""
    if not isinstance(patch, dict):
        return patch
    target = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            target.pop(name, None)
        else:
            target[name] = merged(target.get(name), value)
    return target


@pytest.mark.parametrize(("original", "patch", "result"), APPENDIX, ids=str)
def test_the_appendix_of_rfc_7396(service: Service, original: Any, patch: Any, result: Any) -> None:
    created = with_metadata(service, original)
    assert created.json()["metadata"] == original
    path = f"/users/{created.json()['id']}"
    reply = service.call("PATCH", path, {"metadata": patch})
    assert reply.status == 200
    assert reply.json()["metadata"] == result
    assert (reply.get("ETag") == created.get("ETag")) == (original == result)
    assert service.call("GET", path).json() == reply.json()


KEYS = st.sampled_from(["a", "b", "c", "", "0", "-1", "a b", 'q"', "{}", "NULL", "é"])
LEAVES = st.none() | st.booleans() | st.integers(-9, 9) | st.text("aé'\"\\{},", max_size=3)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=4)


@given(original=OBJECTS, patch=OBJECTS)
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_a_patch_does_what_the_rfc_says(service: Service, original: Any, patch: Any) -> None:
    path = f"/users/{with_metadata(service, original).json()['id']}"
    reply = service.call("PATCH", path, {"metadata": patch})
    assert reply.json()["metadata"] == merged(original, patch)
    again = service.call("PATCH", path, {"metadata": patch})
    assert (again.json(), again.get("ETag")) == (reply.json(), reply.get("ETag"))


def test_put_replaces_and_absent_is_empty(service: Service) -> None:
    created = with_metadata(service, {"a": 1, "b": {"c": 2}}).json()
    path = f"/users/{created['id']}"
    whole = {"email": created["email"], "name": "Ann"}
    assert service.call("PUT", path, whole | {"metadata": {"b": {}}}).json()["metadata"] == {
        "b": {}
    }
    assert service.call("PUT", path, whole).json()["metadata"] == {}
    assert create_user(service).json()["metadata"] == {}


def test_null_clears_all_of_it(service: Service) -> None:
    path = f"/users/{with_metadata(service, {'a': 1}).json()['id']}"
    assert service.call("PATCH", path, {"metadata": None}).json()["metadata"] == {}
    assert with_metadata(service, None).json()["metadata"] == {}


def test_a_patch_of_something_else_leaves_it(service: Service) -> None:
    created = with_metadata(service, {"a": {"b": None}}).json()
    reply = service.call("PATCH", f"/users/{created['id']}", {"name": "Bea"})
    assert reply.json()["metadata"] == {"a": {"b": None}}


def test_of_many_who_add_a_member_at_once_none_is_lost(service: Service) -> None:
    path = f"/users/{with_metadata(service, {'a': {}}).json()['id']}"

    def add(number: int) -> int:
        return service.call("PATCH", path, {"metadata": {"a": {str(number): number}}}).status

    with ThreadPoolExecutor(12) as threads:
        assert set(threads.map(add, range(60))) == {200}
    found = service.call("GET", path).json()["metadata"]
    assert found == {"a": {str(number): number for number in range(60)}}


@pytest.mark.parametrize(
    "number", ["1.10", "12345678901234567890123", "1e3", "-0.5", "1E-10", "0", "1.7e308"]
)
def test_a_number_is_kept_as_postgresql_keeps_it(service: Service, number: str) -> None:
    reply = raw(service, f'{{"n": {number}}}')
    assert reply.status == 201
    assert float(reply.json()["metadata"]["n"]) == float(number)
    if number == "1.10":
        assert b'"n": 1.10}' in reply.body


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '"{}"',
        "1",
        "true",
        '{"a": "\\u0000"}',
        '{"\\u0000": 1}',
        '{"a": [{"b": "x\\u0000"}]}',
        '{"a": "\\ud800"}',
        '{"\\udfff": 1}',
        '{"a": 1e400}',
        '{"a": [-1e99999]}',
        '{"a": 1e-99999}',
        '{"a": ' + "9" * 5000 + "}",
        '{"a": 0e-16384}',
        '{"a": -0E+99999999999999999999}',
        '{"a": 0e' + "1" * 5000 + "}",
        '{"a": 0.' + "0" * 16000 + "e-500}",
        '{"a": 0.' + "0" * 16370 + "e-20}",
        '{"a": [' + ", ".join(["0e-16000"] * 4) + "]}",
        '{"a": [' + ", ".join(["1e307"] * 200) + "]}",
        '{"a": "' + "x" * 16384 + '"}',
        '{"a": ' + "[" * 600 + "]" * 600 + "}",
        "{" + '"a": {' * 600 + "}" * 600 + "}",
    ],
    ids=lambda text: text[:20],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_what_cannot_be_metadata_is_refused_by_name(
    service: Service, method: str, text: str
) -> None:
    created = with_metadata(service, {"kept": 1})
    path = "/users" if method == "POST" else f"/users/{created.json()['id']}"
    document = problem(raw(service, text, method, path), 422, "invalid-user")
    assert invalid_fields(document) == ["metadata"]
    assert service.call("GET", f"/users/{created.json()['id']}").json() == created.json()


# jsonb writes a space after each comma and colon: 12,007 bytes come back as 18,008.
SPACED_OUT = '{"a":[' + ",".join(["1"] * 6000) + "]}"


def test_what_a_get_gave_may_be_sent_back_though_it_is_longer_than_what_was_sent(
    service: Service,
) -> None:
    created = raw(service, SPACED_OUT)
    assert created.status == 201
    assert len(created.body) > 16384
    path = f"/users/{created.json()['id']}"
    for method in ("PUT", "PATCH"):
        reply = service.call(method, path, created.body, {"Content-Type": "application/json"})
        assert (reply.status, reply.body) == (200, created.body)
        assert reply.get("ETag") == created.get("ETag")
    # It is no longer than that, however its white space is written.
    many = ",".join(["1"] * 25000)
    times = '"created_at": null, "updated_at": null'
    wide = f'{{"email": "{new_email()}", "name": "A", {times}, "metadata": {{"a":[{many}]}}}}'
    document = problem(
        service.call("PUT", path, wide.encode(), {"Content-Type": "application/json"}),
        422,
        "invalid-user",
    )
    assert "61440" in document["errors"][0]["message"]
    # Without the times it is not what a GET gave.
    sent = {name: created.json()[name] for name in ("email", "name", "metadata")}
    problem(service.call("PUT", path, sent), 422, "invalid-user")


@pytest.mark.parametrize("kind", ["application/x-ndjson", "text/csv"])
def test_an_export_can_be_imported_though_it_is_longer_than_what_was_sent(
    service: Service, kind: str
) -> None:
    created = raw(service, SPACED_OUT).json()
    query = urlencode({"email": created["email"]})
    file = service.call("GET", f"/users?{query}", headers={"Accept": kind}).body
    path = f"/users/{created['id']}"
    for outcome in ("unchanged", "created"):
        lines = service.call("POST", "/users", file, {"Content-Type": kind}).body.splitlines()
        assert json.loads(lines[-1])[outcome] == 1, lines
        assert service.call("GET", path).json()["metadata"] == created["metadata"]
        assert service.call("DELETE", path).status == 204


def test_patches_make_no_user_that_could_not_be_sent_back(service: Service) -> None:
    """Each patch was small enough, and a hundred of them made 1.6 MB."""
    path = f"/users/{create_user(service).json()['id']}"
    for number in range(3):
        reply = service.call("PATCH", path, {"metadata": {str(number): "x" * 16000}})
        assert reply.status == 200
    refused = problem(
        service.call("PATCH", path, {"name": "Bea", "metadata": {"more": "x" * 16000}}),
        422,
        "invalid-user",
    )
    assert invalid_fields(refused) == ["metadata"]
    assert "61440" in refused["errors"][0]["message"]
    assert service.call("GET", path).body == reply.body
    stale = {"If-Match": '"another"'}
    problem(
        service.call("PATCH", path, {"metadata": {"more": "x" * 16000}}, stale),
        412,
        "precondition-failed",
    )
    assert service.call("PATCH", path, reply.json()).body == reply.body
    assert service.call("PATCH", path, {"metadata": {"0": None}}).status == 200


def test_numbers_come_back_as_many_bytes_as_they_are_written_out(service: Service) -> None:
    """16 KB of 0e-16380 were 29 MB, and five such users more than the process could hold."""
    reply = raw(service, '{"a": [' + ", ".join(["1e300"] * 100) + ", 0e-16000]}")
    assert reply.status == 201
    assert len(reply.body) < 61440


@pytest.mark.parametrize(("old", "new"), [("1.0", "1"), ("1", "1.00"), ("-0.10", "-0.1")])
@pytest.mark.parametrize("method", ["PUT", "PATCH", "import"])
def test_a_number_that_is_written_otherwise_is_a_change(
    service: Service, method: str, old: str, new: str
) -> None:
    """jsonb takes 1 and 1.0 for equal: the answer was another, and its ETag the same."""
    created = raw(service, f'{{"a": [{old}]}}')
    user, path = created.json(), f"/users/{created.json()['id']}"
    members = f'"metadata": {{"a": [{new}]}}'
    if method != "PATCH":
        members = f'"email": "{user["email"]}", "name": "Ann", {members}'
    for etag_stays in (False, True):
        before = service.call("GET", path).get("ETag")
        if method == "import":
            row = f'{{"id": "{user["id"]}", {members}}}'.encode()
            service.call("POST", "/users", row, {"Content-Type": "application/x-ndjson"})
        else:
            body = f"{{{members}}}".encode()
            service.call(method, path, body, {"Content-Type": "application/json"})
        found = service.call("GET", path)
        assert f'"a": [{new}]'.encode() in found.body
        assert (found.get("ETag") == before) is etag_stays


@pytest.mark.parametrize("filler", ['"{}"', '"{}" ', '\t\r\n"{}"'])
def test_16_kib_as_sent_are_taken_and_one_byte_more_is_not(service: Service, filler: str) -> None:
    def sent(size: int) -> str:
        empty = f'{{"a":{filler.format("")}}}'
        return f'{{"a":{filler.format("x" * (size - len(empty)))}}}'

    assert len(sent(16384)) == 16384
    assert raw(service, sent(16384)).status == 201
    document = problem(raw(service, sent(16385)), 422, "invalid-user")
    assert "16384" in document["errors"][0]["message"]


def test_a_patch_of_two_thousand_members_is_done_in_time(service: Service) -> None:
    path = f"/users/{create_user(service).json()['id']}"
    many = {str(number): 1 for number in range(1000)}
    for patch in (many, dict.fromkeys(many, 2), {"deep": {"er": dict.fromkeys(many, 3)}}):
        reply = service.call("PATCH", path, {"metadata": patch})
        assert reply.status == 200, reply
    gone = service.call("PATCH", path, {"metadata": dict.fromkeys(many)})
    assert set(gone.json()["metadata"]) == {"deep"}


def test_a_patch_of_many_or_deep_objects_is_done_in_time(service: Service) -> None:
    """16 KB in 1,800 objects took longer than a statement may; 200 levels were a 500."""
    created = create_user(service)
    path = f"/users/{created.json()['id']}"
    many: dict[str, Any] = {str(number): {} for number in range(1400)}
    deep: dict[str, Any] = {}
    for _ in range(96):
        deep = {"a": deep, "b": None}
    for patch in (many, many, {"deep": deep}, {"deep": deep}):
        began = time.monotonic()
        body = json.dumps({"metadata": patch}, separators=(",", ":")).encode()
        reply = service.call("PATCH", path, body, {"Content-Type": "application/json"})
        assert reply.status == 200, reply
        assert time.monotonic() - began < 2.5
    assert reply.json()["metadata"] == merged(many, {"deep": deep})
    # All of it may be sent back.
    whole = service.call("PATCH", path, {"metadata": {"deep": None}}).json()
    assert service.call("PATCH", path, whole).json() == whole
    raw_deep = '{"a": ' * 101 + "1" + "}" * 101
    for method in ("PATCH", "PUT"):
        document = problem(raw(service, raw_deep, method, path), 422, "invalid-user")
        assert "100 levels" in document["errors"][0]["message"]


@pytest.mark.parametrize(("begin", "end"), [('{"a": ', "}"), ("[", "]")])
def test_a_hundred_levels_are_taken_and_one_more_is_not(
    service: Service, begin: str, end: str
) -> None:
    """The hundredth was refused as a deeper one."""

    def nested(levels: int) -> str:
        return '{"a": ' + begin * (levels - 1) + "1" + end * (levels - 1) + "}"

    assert raw(service, nested(100)).status == 201
    problem(raw(service, nested(101)), 422, "invalid-user")
    for innermost in ("{}", "[]"):
        assert raw(service, nested(99).replace("1", innermost)).status == 201
        problem(raw(service, nested(100).replace("1", innermost)), 422, "invalid-user")


def test_hostile_text_in_it_comes_back(service: Service) -> None:
    text = "'; DROP TABLE users; -- %s %(x)s {0} \\ \" \u2028 <script> 👩‍👩‍👧"
    for metadata in ({text: text}, {"a": [text, {text: [text]}]}, {"": {"": ""}}):
        reply = with_metadata(service, metadata)
        assert reply.json()["metadata"] == metadata
        path = f"/users/{reply.json()['id']}"
        patched = service.call("PATCH", path, {"metadata": {uuid.uuid4().hex: metadata}})
        assert patched.status == 200
