"""The one way in which the service, `check`, `pw_migrate` and `make run` connect to PostgreSQL.

libpq reads not only the URI but also its environment (PGOPTIONS, PGSSLROOTCERT, …) and a service
file. When the service alone set some of that anew, it worked in another schema than the one that
had been migrated, and wrote to another tenant's table. So all of them use `Connector`.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import select
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import peewee
import psycopg2
import psycopg2.extensions
from psycopg2.extensions import parse_dsn

from postgres.deadlines import borrowed, ended_after

MAX_HOSTS = 16
# After our own start-up options were refused, they are tried again this many seconds later.
REFUSED_SECONDS = 60.0
# Network devices forget a connection that is idle for minutes (those of AWS after 350 seconds), and
# tell neither side. libpq by itself leaves the first probe to the system, after two hours.
KEEPALIVES = {"keepalives_idle": 60, "keepalives_interval": 10, "keepalives_count": 3}
# Values that are known to be no secret, so that a message may quote them.
KNOWN_WORDS = {"allow", "prefer", "require", "verify-ca", "verify-full", "direct", "disable"}
# A password with a / in it: libpq takes what is before that for a host and a port, and names them.
CUT_PASSWORD = re.compile(r"[a-z]+://[^/?@]*:[^/?@]*/[^?]*@[^?]*/")
HOST = re.compile(r"[A-Za-z0-9._:%-]+|/\S*")
UNREADABLE = (
    "is not a URI that libpq can read: in a password write %40 for @, %2F for / and %25 for %"
)
# How libpq names the server that it could not reach, before it says why.
AT_SERVER = re.compile(
    r'connection to server at "(?P<host>[^"]*)"(?: \([^)]*\))?, port (?P<port>[0-9]+) failed: '
    r'|connection to server on socket "(?P<socket>[^"]*)" failed: '
    r'|could not translate host name "(?P<name>[^"]*)" to address: '
)

# Finds the start-up options that did not reach the session. A setting that did has the value as it
# was written, or, if PostgreSQL shows that in another unit, the source `client`.
DROPPED = """
    SELECT coalesce(string_agg(given.name, ', '), '')
    FROM unnest(%s::text[], %s::text[]) AS given (name, value)
    LEFT JOIN pg_settings ON lower(pg_settings.name) = lower(given.name)
    WHERE current_setting(given.name, true) IS DISTINCT FROM given.value
        AND pg_settings.source IS DISTINCT FROM 'client'
"""


class UnusableURI(ValueError):
    """A URI, or what else libpq reads, is wrong. The message says how, and quotes no value."""


class OptionsRefused(psycopg2.OperationalError):
    """The server, or a pooler in front of it, does not take the operator's own start-up options.
    Without them the service might work in another schema, so it does not connect at all."""


@dataclass(frozen=True)
class Target:
    """A database, according to the URI and to what else libpq reads. As in psql the URI counts
    first, then a service file, then the environment."""

    uri: str
    parameters: Mapping[str, str]
    hosts: tuple[str, ...]
    ports: tuple[str, ...]
    secrets: tuple[str, ...]

    @property
    def database(self) -> str:
        return self.parameters.get("dbname") or self.parameters.get("user") or "postgres"

    @property
    def options(self) -> str:
        """The operator's own start-up options, wherever they come from."""
        return self.parameters.get("options", "")

    @classmethod
    def of(cls, uri: str) -> Target:
        """What a URI says, without connecting to it. Raises UnusableURI."""
        try:
            given = parse_dsn(uri)
        except psycopg2.ProgrammingError as error:
            if "invalid URI query parameter" in str(error):
                # It may also be a ? in the password.
                raise UnusableURI("has an option that libpq does not know") from None
            raise UnusableURI(UNREADABLE) from None
        if CUT_PASSWORD.match(uri):
            raise UnusableURI(UNREADABLE)
        ports = given.get("port") or os.environ.get("PGPORT", "")
        for port in ports.split(","):
            if port and not (re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= 65535):
                raise UnusableURI("has a port that is not a number from 1 to 65535")
        if not re.fullmatch(r"-?[0-9]*", given.get("connect_timeout") or ""):
            raise UnusableURI("has a connect_timeout that is not a number of seconds")
        parameters, password = _resolved(uri)
        _trust(parameters)
        hosts = parameters.get("host") or given.get("hostaddr") or ""
        # If an @ or a / in the password is not encoded, libpq takes a part of the password for the
        # host or the database, and quotes it in its messages.
        userinfo = uri.partition("//")[2].rpartition("@")[0].partition(":")[2]
        parts = {password, given.get("password") or "", *re.split(r"[@/:?]", userinfo)}
        secrets = tuple(part for part in {*parts, *map(unquote, parts)} if len(part) > 2)
        return cls(uri, parameters, tuple(hosts.split(",")), tuple(ports.split(",")), secrets)

    @property
    def places(self) -> str:
        """The hosts, each with its port."""
        ports = (*self.ports, *self.ports[-1:] * len(self.hosts))
        return ", ".join(map(_place, self.hosts, ports))

    def redacted(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "…")
        return text


def check_uri(uri: str) -> str | None:
    """What is wrong with a libpq URI, in words that quote no value of it; None if it is right."""
    try:
        Target.of(uri)
    except UnusableURI as error:
        return str(error)
    return None


def _resolved(uri: str) -> tuple[dict[str, str], str]:
    """The parameters that libpq would connect with, without the password, and the password.

    libpq tells them only of a connection that has begun. So begin one to a socket of our own, where
    nobody answers. The hosts of the URI stay, and libpq wants one address for each of them. Only
    libpq knows how many these are, so that number is tried out.
    """
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
        for count in range(1, MAX_HOSTS + 1):
            addresses = ",".join(["127.0.0.1"] * count)
            try:
                begun = psycopg2.connect(uri, async_=True, hostaddr=addresses, port=port)
            except psycopg2.OperationalError as error:
                if "hostaddr values" not in str(error):
                    raise UnusableURI(_complaint(str(error))) from None
            else:
                with contextlib.closing(begun):
                    return dict(begun.info.dsn_parameters), begun.info.password or ""
    raise UnusableURI(f"has more than {MAX_HOSTS} hosts")


def _complaint(message: str) -> str:
    name = re.match(r'invalid "?(\w+)"? value', message)
    if name:
        return f"has a value of {name[1]} that libpq does not know"

    def quoted(match: re.Match[str]) -> str:
        return match[0] if match[1] in KNOWN_WORDS else "…"

    return "cannot be used: " + re.sub(r'"([^"]*)"', quoted, message.strip().splitlines()[0])


def _trust(parameters: dict[str, str]) -> None:
    """Check now that the certificates and keys can be used; otherwise each connection would fail.
    Raises UnusableURI."""
    system = parameters.get("sslrootcert") == "system"
    if system:
        _trust_the_system()
    hosts = parameters.get("host", "").split(",")
    # There is no TLS on Unix sockets.
    local = all(host[:1] in ("", "/", "@") for host in hosts)
    verified = parameters.get("sslmode") in ("verify-ca", "verify-full") and not (local or system)
    for name, needed, otherwise in (
        ("sslrootcert", verified, ", or sslrootcert=system"),
        ("sslcert", parameters.get("sslcert"), ""),
        ("sslkey", parameters.get("sslkey"), ""),
    ):
        # Path.expanduser fails for a user without a home.
        path = parameters.get(name) or os.path.expanduser("~/.postgresql/root.crt")  # noqa: PTH111
        # A value with a colon names a key in a device, not a file.
        if needed and ":" not in path and not _readable(path):
            raise UnusableURI(
                f"needs a file of certificates or keys that can be read: set {name} in it, or"
                f" PG{name.upper()}, to such a file{otherwise}"
            )
    key = parameters.get("sslkey", "")
    if parameters.get("sslcert") and not parameters.get("sslpassword") and _encrypted(key):
        # libpq would ask for it on the terminal, and wait for ever, also when it is to stop.
        raise UnusableURI("has a key with a passphrase: set sslpassword in it, or take one without")


def _readable(path: str) -> bool:
    try:
        with Path(path).open("rb"):
            return True
    except OSError:
        return False


def _trust_the_system() -> None:
    """Say where the system's certificates are. The libpq of psycopg2's wheel looks where they were
    on the machine that built it; Python knows where they are on this one."""
    if os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR"):
        return
    found = ssl.get_default_verify_paths()
    if found.cafile:
        os.environ["SSL_CERT_FILE"] = found.cafile
    elif found.capath and any(Path(found.capath).iterdir()):
        os.environ["SSL_CERT_DIR"] = found.capath
    else:
        raise UnusableURI(
            "has sslrootcert=system, and this system's certificates were not found: set"
            " SSL_CERT_FILE to a file of them"
        )


def _encrypted(path: str) -> bool:
    with contextlib.suppress(OSError):
        return b"ENCRYPTED" in Path(path).read_bytes()
    return False


def settings_in(options: str) -> dict[str, str]:
    """The settings in start-up options, `-c name=value` and `--name=value`, by name."""
    found: dict[str, str] = {}
    expected = False
    # White space separates words, unless a backslash is before it (pg_split_opts in postinit.c).
    for escaped in re.findall(r"(?:\\.|[^\s\\])+", options, re.DOTALL | re.ASCII):
        word = re.sub(r"\\(.)", r"\1", escaped, flags=re.DOTALL)
        if expected or word.startswith(("-c", "--")):
            setting = word if expected else word[2:]
            expected = not setting
            name, separator, value = setting.partition("=")
            if separator:
                found[name.replace("-", "_")] = value
    return found


class Connection(psycopg2.extensions.connection):
    """A connection that knows its generation, its server, and what that has prepared for it."""

    generation = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.prepared: set[str] = set()
        try:
            with borrowed(self) as sock:
                self.server = sock.family, sock.getpeername()
        except OSError as error:  # It has ended since.
            raise psycopg2.OperationalError(error.strerror) from error
        self.poller = select.poll()
        self.poller.register(self.fileno(), select.POLLIN)


class Connector:
    """Opens connections to a target, all in the same way.

    `connect_timeout` is in seconds, for all hosts of the target together. `settings` are sent as
    start-up options, before the operator's own, which have the last word. `factory` is the class of
    the connections.
    """

    def __init__(
        self,
        target: Target,
        connect_timeout: float,
        settings: Mapping[str, str],
        factory: Callable[..., Any] | None = None,
    ) -> None:
        self.target = target
        self._patience = connect_timeout / 2
        self._checked = settings_in(target.options)
        ours = " ".join(f"-c {name}={value}" for name, value in settings.items())
        self._options = f"{ours} {target.options}".strip()
        self._refused_at = -math.inf
        self._keywords: dict[str, Any] = {
            # libpq's own timeout is in whole seconds, and counts for each host anew.
            "connect_timeout": max(1, math.ceil(connect_timeout / len(target.hosts))),
            "client_encoding": "UTF8",
            "fallback_application_name": "gatehouse",
            **{name: n for name, n in KEEPALIVES.items() if name not in target.parameters},
            "connection_factory": factory,
        }

    def open(self) -> Any:
        """A connection in autocommit mode. Raises psycopg2.OperationalError.

        A pooler may refuse start-up options, each in its own words, and psycopg2 does not tell the
        SQLSTATE. So after a failure a connection without our own options is tried. If that can be
        made, and one with them still cannot, the options were the reason. If it cannot, its own
        failure is raised: the first one may say only that the options are refused, whatever else is
        wrong.
        """
        began = time.monotonic()
        refused = began - self._refused_at < REFUSED_SECONDS
        try:
            return self._connect(self.target.options if refused else self._options)
        except psycopg2.OperationalError as error:
            # A server that did not answer is not tried a second time. Any other is, because a
            # restart may have ended this connection while it began.
            if isinstance(error, OptionsRefused) or time.monotonic() - began > self._patience:
                raise
        connection = self._without_ours()
        if refused:
            return connection
        try:
            preferred = self._connect(self._options)
        except psycopg2.OperationalError:
            self._refused_at = time.monotonic()
            return connection
        connection.close()
        return preferred

    def _without_ours(self) -> Any:
        try:
            return self._connect(self.target.options)
        except psycopg2.OperationalError:
            if not self.target.options:
                raise
        self._connect("").close()
        raise self._refusal("refuses")

    def _connect(self, options: str) -> Any:
        try:
            connection = psycopg2.connect(self.target.uri, **self._keywords, options=options)
        except UnicodeDecodeError as error:
            # A server says why it refuses in its own encoding, before another is agreed on.
            words = error.object.decode(errors="replace")
            raise psycopg2.OperationalError(words) from None
        try:
            connection.autocommit = True
            if options and self._checked:
                names, values = list(self._checked), list(self._checked.values())
                # A pooler lets a client in whose server is gone, and libpq waits for that for ever.
                with connection.cursor() as cursor, ended_after(connection, 2 * self._patience):
                    cursor.execute(DROPPED, (names, values))
                    [dropped] = cursor.fetchone()
                if dropped:
                    raise self._refusal("drops", dropped)
        except TimeoutError as error:
            connection.close()
            raise psycopg2.OperationalError(str(error)) from None
        except BaseException:
            connection.close()
            raise
        return connection

    def _refusal(self, does: str, names: str = "") -> OptionsRefused:
        names = names or ", ".join(self._checked) or "some"
        return OptionsRefused(
            f"the server, or a pooler in front of it, {does} the start-up options that are set"
            f" ({names}): set them with ALTER ROLE … SET, and leave them out of the URI, PGOPTIONS"
            " and the service file"
        )


class Direct(peewee.PostgresqlDatabase):
    """A peewee database without a pool, for commands, that connects as the service does."""

    def __init__(self, connector: Connector) -> None:
        # pw_migrate prints this name, so it must not be the URI, which may have a password in it.
        super().__init__(connector.target.database)
        self.connector = connector

    def _connect(self) -> Any:
        return self.connector.open()


def sqlstate(error: BaseException) -> str:
    """The SQLSTATE of an error, also in peewee's wrapping; empty if it has none."""
    return getattr(getattr(error, "orig", None) or error, "pgcode", None) or ""


def reason(error: Exception, target: Target | None = None) -> str:
    """Why a database could not be used, in a few words without a role or a credential. If it could
    not be reached, they begin with its host and port."""
    # libpq says `connection to server at "10.0.0.1", port 5432 failed: FATAL:  role "ann" ...`,
    # a line for each host, with hints between them.
    error = getattr(error, "orig", error)  # in peewee's wrapping
    if isinstance(error, OptionsRefused | TimeoutError):
        return f"{target.places}: {error}" if target else str(error)
    lines = str(error).strip().splitlines() or ["connection lost"]
    unreachable = [(match, line) for line in lines if (match := AT_SERVER.match(line))]
    if not unreachable:
        return printable(_unquoted(lines[0].rpartition(": ")[2]))
    found = []
    for match, line in unreachable:
        host, port = match["host"] or match["name"] or match["socket"], match["port"]
        if match["name"] and target is not None and host in target.hosts:
            at = target.hosts.index(host)
            port = target.ports[min(at, len(target.ports) - 1)]
        place = host if match["socket"] else _place(host, port or "")
        # What the server itself says begins with a severity and two spaces.
        cause = re.sub(r"\A[^ :]+:  ", "", line[match.end() :])
        cause = _unquoted(cause)
        role = target.parameters.get("user") if target is not None else None
        if role:  # Not all servers and poolers quote it, nor in these marks.
            cause = re.sub(rf"(?<!\w){re.escape(role)}(?!\w)", "…", cause)
        found.append(f"{place}: {cause}")
    text = printable("; ".join(dict.fromkeys(found)))
    return target.redacted(text) if target else text


def _unquoted(text: str) -> str:
    return re.sub(r' "[^"]*"', "", text).strip()


def printable(text: str) -> str:
    """With the number of each character that would steer a terminal in its place. A trigger may
    quote what a caller sent."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def _place(host: str, port: str) -> str:
    if not HOST.fullmatch(host):  # It is most likely a part of a password with an @ in it.
        host = "a host that is no host name" if host else "localhost"
    return f"{f'[{host}]' if ':' in host else host}:{port or '5432'}"
