"""One mailbox is one user, whatever the database's locale and its provider."""

from __future__ import annotations

import contextlib
import threading
import unicodedata
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import psycopg2
import pytest

from postgres.casing import lowered
from tests.harness import Databases, Service, create_user, problem, pw_migrate
from tests.harness.system_postgres import INITDB, system_postgres

LOCALES = {
    "libc C.UTF-8": "LOCALE 'C.UTF-8'",
    "libc C": "LOCALE 'C'",
    "builtin C.UTF-8": "LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8' LOCALE 'C'",
    "builtin PG_UNICODE_FAST": "LOCALE_PROVIDER builtin BUILTIN_LOCALE 'PG_UNICODE_FAST' LOCALE 'C'",
    "ICU und": "LOCALE_PROVIDER icu ICU_LOCALE 'und' LOCALE 'C.UTF-8'",
    "ICU Turkish": "LOCALE_PROVIDER icu ICU_LOCALE 'tr-TR' LOCALE 'C.UTF-8'",
}
# Each of these is one mailbox, in several spellings.
MAILBOXES = {
    "case": ["ann.{}@example.com", "ANN.{}@EXAMPLE.COM", "Ann.{}@Example.com"],
    "the Turkish i": ["info.{}@mail.example", "INFO.{}@MAIL.EXAMPLE"],
    "NFC and NFD": [
        "j\u00fcrgen.{}@example.com",
        "ju\u0308rgen.{}@example.com",
        "JU\u0308RGEN.{}@example.com",
    ],
    "an A-label": [
        "ann.{}@b\u00fccher.example",
        "ann.{}@xn--bcher-kva.example",
        "ann.{}@B\u00dcCHER.example",
    ],
    "full-width letters": [
        "ann.{}@\uff45\uff58\uff41\uff4d\uff50\uff4c\uff45.com",
        "ann.{}@example\u3002com",
    ],
    "Greek": [
        "\u03c3\u03bf\u03c6\u03af\u03b1.{}@example.com",
        "\u03a3\u039f\u03a6\u038a\u0391.{}@example.com",
    ],
    "Cyrillic": [
        "\u0430\u043d\u043d\u0430.{}@example.com",
        "\u0410\u041d\u041d\u0410.{}@example.com",
    ],
}


@pytest.fixture(scope="module")
def system() -> Iterator[Databases]:
    with system_postgres() as running:
        yield running


@pytest.fixture(scope="module", params=LOCALES)
def anywhere(request: pytest.FixtureRequest, databases: Databases) -> Iterator[tuple[Service, str]]:
    """A service on a database of one locale, and its URI."""
    server = databases
    if "ICU" in request.param:  # the embedded server is built without it
        if INITDB is None:
            pytest.skip("no PostgreSQL with ICU is installed")
        server = request.getfixturevalue("system")
    uri = server.create(migrated=False, options=f"TEMPLATE template0 {LOCALES[request.param]}")
    done = pw_migrate("migrate", uri=uri)
    assert done.returncode == 0, done.stderr
    with Service(POSTGRES_URI=uri) as running:
        yield running, uri


@pytest.mark.parametrize("spellings", MAILBOXES.values(), ids=MAILBOXES)
def test_one_mailbox_is_one_user(anywhere: tuple[Service, str], spellings: list[str]) -> None:
    service, _ = anywhere
    tag = uuid.uuid4().hex[:8]
    emails = [one.format(tag) for one in spellings]
    created = create_user(service, emails[0]).json()
    for email in emails:
        body = {"email": email, "name": "Bob"}
        problem(service.call("POST", "/users", body), 409, "email-taken")
        problem(service.call("PUT", f"/users/{uuid.uuid4()}", body), 409, "email-taken")
        found = service.call("GET", f"/users?email={quote(email)}").json()["users"]
        assert found == [created], email
    kept = created["email"]
    assert kept == unicodedata.normalize("NFC", kept)
    assert kept.partition("@")[2] == kept.partition("@")[2].lower()


def test_many_spellings_at_once_make_one_user(anywhere: tuple[Service, str]) -> None:
    service, _ = anywhere
    tag = uuid.uuid4().hex[:8]
    emails = [one.format(tag) for one in MAILBOXES["NFC and NFD"]] * 4
    gate = threading.Barrier(len(emails))

    def create(email: str) -> int:
        gate.wait()
        return service.call("POST", "/users", {"email": email, "name": "Ann"}).status

    with ThreadPoolExecutor(len(emails)) as threads:
        statuses = sorted(threads.map(create, emails))
    assert statuses == [201] + [409] * (len(emails) - 1)


def test_the_look_up_of_an_address_uses_the_index(anywhere: tuple[Service, str]) -> None:
    _, uri = anywhere
    with connected(uri) as cursor:
        cursor.execute("SET enable_seqscan = off")
        email = lowered("CAST(%s AS text)")
        cursor.execute(
            f"EXPLAIN SELECT id FROM users WHERE {lowered('email')} = {email}",
            ("ann@example.com",) * email.count("%s"),
        )
        assert "users_mailbox" in "".join(line for (line,) in cursor.fetchall())


SCRIPTS = ("LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN", "FULLWIDTH")
# Letters of phonetic alphabets and of medieval texts, which nobody has in an address.
RARE = range(0x1C80, 0xFF00)


def test_the_letters_are_those_that_unicode_folds_one_to_one(databases: Databases) -> None:
    letters = [
        chr(code)
        for code in range(1, 0x10000)
        if unicodedata.name(chr(code), "").startswith(SCRIPTS)
        and unicodedata.is_normalized("NFC", chr(code))
        and (code not in RARE or 0x1E00 <= code < 0x2000 or 0x1C90 <= code < 0x1CC0)
    ]
    folded = [one.casefold() if len(one.casefold()) == 1 else one.lower() for one in letters]
    expected = [new if len(new) == 1 else old for old, new in zip(letters, folded, strict=True)]
    assert sum(map(str.__ne__, letters, expected)) > 700
    with databases.admin() as cursor:
        cursor.execute(
            f"SELECT array_agg({lowered('letter')} ORDER BY number)"
            " FROM unnest(%s) WITH ORDINALITY AS given(letter, number)",
            (letters,),
        )
        [found] = cursor.fetchone()
    wrong = [
        hex(ord(old)) for old, one, two in zip(letters, found, expected, strict=True) if one != two
    ]
    assert wrong == []


@contextlib.contextmanager
def connected(uri: str) -> Iterator[Any]:
    connection = psycopg2.connect(uri)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()


OLD = [
    ("ann@example.com", "ann@example.com"),
    ("Ann.B@Example.COM", "Ann.B@example.com"),
    ("ju\u0308rgen@example.com", "j\u00fcrgen@example.com"),
    ("cy@xn--bcher-kva.example", "cy@b\u00fccher.example"),
    ("o'brien@example.ie", "o'brien@example.ie"),
    ("nobody@localhost", "nobody@localhost"),  # somebody's own SQL put it there
]


@pytest.fixture
def old(databases: Databases) -> Callable[[list[str]], tuple[str, list[str]]]:
    """A database with the schema of 1.0.0 and users that have these addresses; their ids too."""

    def make(emails: list[str]) -> tuple[str, list[str]]:
        uri = databases.create(migrated=False)
        assert pw_migrate("migrate", "--name", "001_users", uri=uri).returncode == 0
        ids = [str(uuid.UUID(int=number)) for number in range(1, len(emails) + 1)]
        with connected(uri) as cursor:
            cursor.execute(
                "INSERT INTO users (id, email, name) SELECT *, 'Ann'"
                " FROM unnest(%s::uuid[], %s::text[])",
                (ids, emails),
            )
        return uri, ids

    return make


def rows(uri: str) -> list[tuple[Any, ...]]:
    with connected(uri) as cursor:
        cursor.execute("SELECT id::text, email, updated_at FROM users ORDER BY id")
        return list(cursor.fetchall())


def test_addresses_that_are_there_are_normalised(
    old: Callable[[list[str]], tuple[str, list[str]]],
) -> None:
    uri, _ = old([before for before, _ in OLD] + [f"a{n}@EXAMPLE.org" for n in range(2500)])
    before = rows(uri)
    done = pw_migrate("migrate", "--name", "002_mailboxes", uri=uri)
    assert done.returncode == 0, done.stderr
    after = rows(uri)
    assert [email for _, email, _ in after[: len(OLD)]] == [new for _, new in OLD]
    assert {email.partition("@")[2] for _, email, _ in after[len(OLD) :]} == {"example.org"}
    for was, now in zip(before, after, strict=True):
        assert (was[2] < now[2]) == (was[1] != now[1]), "a version changes with what is shown"
    assert pw_migrate("rollback", uri=uri).returncode == 0
    assert rows(uri) == after
    assert pw_migrate("migrate", uri=uri).returncode == 0


@pytest.mark.parametrize(
    "emails",
    [
        ["cy@example.com", "ju\u0308rgen@example.com", "j\u00fcrgen@example.com"],
        ["cy@example.com", "ann@xn--bcher-kva.example", "ann@b\u00fccher.example"],
        ["cy@example.com", "ann@\uff45xample.com", "ann@example.com"],
    ],
    ids=ascii,
)
def test_two_users_that_are_one_mailbox_are_named_and_nothing_changes(
    old: Callable[[list[str]], tuple[str, list[str]]], emails: list[str]
) -> None:
    uri, ids = old([*emails, "Dee@EXAMPLE.com"])
    before = rows(uri)
    done = pw_migrate("migrate", uri=uri)
    assert done.returncode == 1
    assert f"{ids[1]} and {ids[2]}" in done.stderr and len(done.stderr.splitlines()) == 1
    assert ids[0] not in done.stderr
    assert rows(uri) == before
    assert "- [ ] 002_mailboxes" in pw_migrate("list", uri=uri).stdout
    with connected(uri) as cursor:
        cursor.execute("DELETE FROM users WHERE id = %s", (ids[2],))
    assert pw_migrate("migrate", uri=uri).returncode == 0


def test_readers_are_not_stopped_while_it_is_migrated(
    old: Callable[[list[str]], tuple[str, list[str]]],
) -> None:
    """One that reads for long makes the migration wait, and nobody waits behind that."""
    uri, _ = old([f"a{n}@EXAMPLE.org" for n in range(20_000)])
    reader = psycopg2.connect(uri)
    with connected(uri) as other, ThreadPoolExecutor(1) as threads:
        reader.cursor().execute("SELECT count(*) FROM users")
        other.execute("SET statement_timeout = '500ms'")
        running = threads.submit(pw_migrate, "migrate", uri=uri)
        reads = 0
        waits = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%attempt%' AND state = 'active'"
        while not running.done():
            other.execute("SELECT count(*) FROM users")
            reads += 1
            if reader is not None and reads % 20 == 0:
                other.execute(waits)
                if other.fetchone()[0] > 1:  # this very query is one
                    reader.close()
        assert running.result().returncode == 0, running.result().stderr
        assert reads > 100
