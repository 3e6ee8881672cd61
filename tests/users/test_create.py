from __future__ import annotations

import gzip
import json
import re
import string
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from email_validator import validate_email
from hypothesis import given, settings
from hypothesis import strategies as st

from services.fields import MAX_PLAIN, NAMES, PLAIN_EMAIL, valid_email
from tests.harness import Service, create_user, invalid_fields, new_email, problem

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
STRONG_ETAG = re.compile(r'"[!#-~]+"')  # RFC 9110 section 8.8.3, without obs-text
USERS_BODY_LIMIT = 65536


def test_a_created_user_is_answered_whole(service: Service) -> None:
    email = new_email()
    reply = service.call("POST", "/users", {"email": email, "name": "Ann"})
    assert reply.status == 201
    user = reply.json()
    assert list(user) == ["id", *NAMES, "created_at", "updated_at"]
    assert (user["email"], user["name"]) == (email, "Ann")
    assert TIME.fullmatch(user["created_at"])
    assert user["updated_at"] == user["created_at"]


def test_the_answer_locates_and_tags_the_user(service: Service) -> None:
    reply = create_user(service)
    location = reply.get("Location")
    assert location == f"/users/{reply.json()['id']}"
    read = service.call("GET", location)
    assert read.status == 200
    assert read.json() == reply.json()
    etag = reply.get("ETag")
    assert etag is not None and STRONG_ETAG.fullmatch(etag)
    assert read.get("ETag") == etag


def test_the_answer_is_json_that_nothing_stores_or_sniffs(service: Service) -> None:
    reply = create_user(service)
    assert reply.get("Content-Type") == "application/json"
    assert reply.get("Cache-Control") == "no-store"
    assert reply.get("X-Content-Type-Options") == "nosniff"


def test_the_id_is_a_version_7_uuid_of_now(service: Service) -> None:
    before = datetime.now(UTC)
    text = create_user(service).json()["id"]
    after = datetime.now(UTC)
    made = uuid.UUID(text)
    assert str(made) == text
    assert made.version == 7
    assert made.variant == uuid.RFC_4122
    milliseconds = made.int >> 80  # RFC 9562 section 5.7
    slack = timedelta(milliseconds=5)
    when = datetime.fromtimestamp(milliseconds / 1000, UTC)
    assert before - slack <= when <= after + slack


def test_times_are_of_now_in_utc(service: Service) -> None:
    before = datetime.now(UTC)
    user = create_user(service).json()
    after = datetime.now(UTC)
    assert before <= datetime.fromisoformat(user["created_at"]) <= after


def test_two_users_have_different_ids_and_etags(service: Service) -> None:
    first, second = create_user(service), create_user(service)
    assert first.json()["id"] != second.json()["id"]
    assert first.get("ETag") != second.get("ETag")


def test_the_case_of_an_emails_local_part_is_kept(service: Service) -> None:
    local = f"Ann.{uuid.uuid4().hex}"
    reply = create_user(service, f"{local}@Example.COM")
    assert reply.json()["email"] == f"{local}@example.com"
    assert service.call("GET", f"/users/{reply.json()['id']}").json() == reply.json()


@pytest.mark.parametrize("change", [str, str.upper, str.title], ids=["same", "upper", "title"])
def test_an_email_is_taken_without_regard_to_case(
    service: Service, change: Callable[[str], str]
) -> None:
    email = new_email()
    create_user(service, email)
    reply = service.call("POST", "/users", {"email": change(email), "name": "Bob"})
    document = problem(reply, 409, "email-taken")
    assert "errors" not in document
    found = service.call("GET", f"/users?email={email}").json()["users"]
    assert [user["name"] for user in found] == ["Ann"]


def test_an_internationalised_email_is_taken_without_regard_to_case(service: Service) -> None:
    tail = f"{uuid.uuid4().hex}@example.com"
    create_user(service, f"jörg.{tail}")
    reply = service.call("POST", "/users", {"email": f"JÖRG.{tail}", "name": "Jörg"})
    problem(reply, 409, "email-taken")


@pytest.mark.parametrize(
    "email",
    [
        "a@b.co",
        "ann+tag@example.com",
        "ann_b-c.d@sub.domain.example.com",
        "o'brien@example.ie",
        "!#$%&'*/=?^`{|}~@example.com",
        "ann@printer.local",
        "ann@team.test",
        "ann@host.internal",
        "jörg@bücher.example",
        "用户@例子.广告",
        "1@2.example.com",
    ],
)
def test_a_valid_email_is_accepted_as_written(service: Service, email: str) -> None:
    assert create_user(service, email).json()["email"] == email


def test_an_email_of_254_characters_is_accepted_and_of_255_is_not(service: Service) -> None:
    local = uuid.uuid4().hex * 2
    domain = f"{'b' * 63}.{'c' * 63}.{'d' * 57}.com"
    assert len(f"{local}@{domain}") == 254
    assert create_user(service, f"{local}@{domain}").json()["email"] == f"{local}@{domain}"
    long = f"{local}@{domain.replace('d' * 57, 'd' * 58)}"
    reply = service.call("POST", "/users", {"email": long, "name": "Ann"})
    assert invalid_fields(problem(reply, 422, "invalid-user")) == ["email"]


@pytest.mark.parametrize(
    "email",
    [
        "",
        " ",
        "ann",
        "ann@",
        "@example.com",
        "ann@example",
        "ann@localhost",
        "ann@@example.com",
        "ann@b@example.com",
        " ann@example.com",
        "ann@example.com ",
        "ann@example.com\n",
        "ann@exam ple.com",
        "an n@example.com",
        ".ann@example.com",
        "ann.@example.com",
        "an..n@example.com",
        "ann@.example.com",
        "ann@example..com",
        "ann@example.com.",
        "ann@-example.com",
        "ann@example-.com",
        '"ann"@example.com',
        '"ann smith"@example.com',
        "ann@[127.0.0.1]",
        "ann@[IPv6:::1]",
        "Ann <ann@example.com>",
        "mailto:ann@example.com, bob@example.com",
        "ann(comment)@example.com",
        "ann\r\nBcc: bob@example.com",
        "ann\t@example.com",
        f"{'a' * 65}@example.com",
        f"ann@{'b' * 64}.com",
        "a" * 12000 + "@example.com",
    ],
    ids=lambda email: repr(email[:30]),
)
def test_an_invalid_email_is_refused_by_name(service: Service, email: str) -> None:
    reply = service.call("POST", "/users", {"email": email, "name": "Ann"})
    assert invalid_fields(problem(reply, 422, "invalid-user")) == ["email"]


@pytest.mark.parametrize(
    "name",
    [
        "A",
        "x" * 200,
        "𝔄" * 200,
        "Zoë Ångström-O'Neil",
        "محمد",
        "山田 太郎",
        "👩‍👩‍👧",
        "two  spaces",
        'quotes " and \\ backslash',
        "<b>&amp;</b>",
        "Robert'); DROP TABLE users;--",
        "%s %(name)s %% {0}",
    ],
    ids=lambda name: repr(name[:20]),
)
def test_a_valid_name_is_kept_as_written(service: Service, name: str) -> None:
    reply = create_user(service, name=name)
    assert reply.json()["name"] == name
    assert service.call("GET", f"/users/{reply.json()['id']}").json()["name"] == name


@pytest.mark.parametrize("around", [" ", "\t", "\r\n", "\u00a0", "\u3000", " \t\n "], ids=repr)
def test_white_space_around_a_name_is_removed(service: Service, around: str) -> None:
    assert create_user(service, name=f"{around}Ann Lee{around}").json()["name"] == "Ann Lee"


def test_a_name_is_measured_after_white_space_is_removed(service: Service) -> None:
    assert create_user(service, name="  " + "x" * 200 + "  ").json()["name"] == "x" * 200


@pytest.mark.parametrize(
    "name",
    ["", " ", "\t\r\n", "\u3000", "x" * 201, "𝔄" * 201]
    + [f"a{control}b" for control in "\t\n\x1b\x7f\x85\x9f"],
    ids=lambda name: repr(name[:8]),
)
def test_an_invalid_name_is_refused_by_name(service: Service, name: str) -> None:
    reply = service.call("POST", "/users", {"email": new_email(), "name": name})
    assert invalid_fields(problem(reply, 422, "invalid-user")) == ["name"]


def test_a_refused_user_is_not_created(service: Service) -> None:
    email = new_email()
    problem(service.call("POST", "/users", {"email": email, "name": ""}), 422, "invalid-user")
    assert service.call("GET", f"/users?email={email}").json()["users"] == []


@pytest.mark.parametrize(
    "media_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        'application/json;charset="UTF-8"',
        "APPLICATION/JSON",
        "application/json ;  Charset=Utf-8",
        "application/json; charset=utf8",
        "application/json; profile=user; charset=utf-8",
    ],
)
def test_a_json_body_is_read_however_its_type_is_spelt(service: Service, media_type: str) -> None:
    body = {"email": new_email(), "name": "Ann"}
    assert service.call("POST", "/users", body, {"Content-Type": media_type}).status == 201


@pytest.mark.parametrize(
    "media_type",
    [
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/merge-patch+json",
        "application/vnd.api+json",
        "application/jsonp",
        "application/json; charset=latin-1",
        "application/json; charset=utf-16",
        "json",
        "\xa0application/json",
    ],
)
def test_a_body_of_another_media_type_is_415(service: Service, media_type: str) -> None:
    body = {"email": new_email(), "name": "Ann"}
    reply = service.call("POST", "/users", body, {"Content-Type": media_type})
    problem(reply, 415, "unsupported-media-type")


def test_a_compressed_body_is_415_and_told_as_that(service: Service) -> None:
    body = gzip.compress(json.dumps({"email": new_email(), "name": "Ann"}).encode())
    for kind in ("application/json", "text/csv"):
        headers = {"Content-Type": kind, "Content-Encoding": "gzip"}
        reply = service.call("POST", "/users", body, headers)
        assert "Content-Encoding" in problem(reply, 415, "unsupported-media-type")["detail"]
    body = json.dumps({"email": new_email(), "name": "Ann"}).encode()
    headers = {"Content-Type": "application/json", "Content-Encoding": "Identity"}
    assert service.call("POST", "/users", body, headers).status == 201


def test_a_body_without_a_media_type_is_415(service: Service) -> None:
    body = b'{"email": "untyped@example.com", "name": "Ann"}'
    document = problem(service.call("POST", "/users", body), 415, "unsupported-media-type")
    # What is missing is named: the body is JSON, and the caller knows that.
    assert document["detail"].startswith("Content-Type must be application/json")


def test_a_body_of_64_kib_is_read_and_one_byte_more_is_413(service: Service) -> None:
    whole = f'{{"email": "{new_email()}", "name": "Ann"}}'.encode().ljust(USERS_BODY_LIMIT)
    media_type = {"Content-Type": "application/json"}
    larger = service.call("POST", "/users", whole + b" ", media_type)
    problem(larger, 413, "body-too-large")
    assert service.call("POST", "/users", whole, media_type).status == 201


def test_a_chunked_body_is_read_and_bounded_alike(service: Service) -> None:
    head = (
        b"POST /users HTTP/1.1\r\nHost: gatehouse\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    document = f'{{"email": "{new_email()}", "name": "Ann"}}'.encode()
    pieces = (document[:9], document[9:], b"")
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    assert service.exchange(head + chunks).status == 201
    large = b"%x\r\n%b\r\n0\r\n\r\n" % (USERS_BODY_LIMIT + 1, b" " * (USERS_BODY_LIMIT + 1))
    problem(service.exchange(head + large), 413, "body-too-large")


words = st.text(string.ascii_letters + string.digits, min_size=1, max_size=9)
labels = st.lists(words, min_size=1, max_size=2).map("-".join)


@st.composite
def plain_emails(draw: st.DrawFn) -> str:
    local = draw(words)
    for separator in draw(st.lists(st.sampled_from("._+-"), max_size=2)):
        local += separator + draw(words)
    domain = ".".join(draw(st.lists(labels, min_size=1, max_size=2)))
    top = draw(st.text(string.ascii_letters, min_size=2, max_size=5))
    return f"{local}@{domain}.{top}"


@given(plain_emails().filter(lambda email: len(email) <= MAX_PLAIN))
@settings(max_examples=500, deadline=None)
def test_the_short_cut_for_plain_addresses_says_what_the_library_says(email: str) -> None:
    assert PLAIN_EMAIL.fullmatch(email)
    checked = validate_email(email, check_deliverability=False, strict=True)
    assert valid_email(email) == checked.normalized
