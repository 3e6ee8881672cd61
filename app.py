"""Gatehouse: a users table, a health check and migrations in front of an HTTP application.

`create_app` makes the application that answers /users and /health: an ordinary Bottle application,
for any WSGI server. `Gatehouse` is what Gatehouse's own server runs: it has that application, and
the rules by which all other requests are forwarded. `main` is the command line.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

import bottle
from bottle import request, response

import commands
from metrics import STOPPING, Board
from models import database
from postgres import schema
from postgres.table import Found
from problems import (
    BadRequest,
    DatabaseUnavailable,
    InvalidQuery,
    MethodNotAllowed,
    NoSuchUser,
    NotFound,
    Problem,
    SchemaNotMigrated,
    UnsupportedMediaType,
)
from server import workers
from server.exchange import Patience
from server.server import Options, Server
from server.systemd import Notifier
from services import browser, search, transfer, users
from services.access import HEADERS, Access
from services.fields import valid_id
from services.health import Health
from services.proxy import Proxy
from settings import Settings
from wire.body import MAX_BYTES, json_members
from wire.headers import Header
from wire.ids import request_id as usable_id
from wire.media_types import media_type, preferred
from wire.refusal import own_headers, refusal
from wire.request import Head
from wire.rows import CSV, NDJSON, Lines
from wire.tags import ANY, tags

VERSION = "2.0.0"

log = logging.getLogger("gatehouse")

# Threads that answer /health; each may have to wait for the one measurement that is shared.
HEALTH_THREADS = 64
# Threads that answer /health/live and the page of /users. Nothing holds them up, so that few are
# ever busy: this is only a bound for a crowd of such calls.
LIVE_THREADS = 64
# Threads that answer imports and exports, each of which may last long.
BULK_THREADS = 8
# How many seconds an import or export may wait for one of these.
BULK_SECONDS = 10.0
JSON = "application/json"
# The header line of an answer whose media type depends on the request's Accept.
BY_ACCEPT = ("Vary", "Accept")
# Media types of many users at once, for which the server has threads of their own.
BULK_TYPES = (CSV, NDJSON)
HTML = "text/html"
LIST_TYPES = (JSON, *BULK_TYPES, HTML)
OWNED = re.compile(r"/(users|health)(?:/.*)?", re.DOTALL)
LIVE = re.compile(r"/health/live/?")
# What a WSGI environ calls the headers that decide who may use /users.
KEYS = {name: f"HTTP_{name.upper().replace('-', '_')}" for name in HEADERS}
BODILESS = {"204", "304"}  # RFC 9110 section 6.4.1
HEADER_VALUES = re.compile(r"[\t -~\x80-\xff]*")  # RFC 9110 section 5.5
UNROUTABLE = re.compile(r"[^!-~]")
ROUTED_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def create_app(settings: Settings, board: Board | None = None) -> Application:
    """The application that answers /users and /health, connected to nothing yet. `board` has the
    numbers that the workers of one service share; without one the application makes its own."""
    board = board or Board(settings.workers)
    database.configure(
        settings.postgres_uri,
        size=settings.db_pool_size,
        wait=settings.db_pool_timeout,
        connect_timeout=settings.db_connect_timeout,
        statement_timeout=settings.db_statement_timeout,
        board=board,
    )
    health = Health(
        version=VERSION,
        migrations=schema.names(commands.MIGRATIONS),
        started=time.monotonic(),
        board=board,
        pool_size=settings.db_pool_size * settings.workers,
    )
    app = Application(settings, health)
    app.route("/health", "GET", get_health)
    app.route("/health/live", "GET", get_live)
    app.route("/health/ready", "GET", get_ready)
    app.route("/health/metrics", "GET", get_metrics)
    app.route("/users", "GET", list_users)
    app.route("/users", "POST", create_user)
    app.route("/users/<user_id>", "GET", get_user)
    app.route("/users/<user_id>", "PUT", put_user)
    app.route("/users/<user_id>", "PATCH", patch_user)
    app.route("/users/<user_id>", "DELETE", delete_user)
    return app


class Reply(NamedTuple):
    """What a handler answers: a body with its header lines, and a status. If the body is an
    iterator, the answer begins with its first piece. To make that piece may still raise a Problem,
    which is then the answer. Header lines that are set on Bottle's `response` are added.

    A handler may return whatever Bottle knows, too. But to put an answer together in Bottle's
    `response` costs more: docs/decisions/0001-waitress-parts.md says how much.
    """

    body: bytes | Iterator[bytes]
    headers: Sequence[Header]
    status: str = "200 OK"


# /health


def get_health() -> Reply:
    if preferred(request.environ.get("HTTP_ACCEPT"), JSON, HTML) == HTML:
        return _page("health")
    return _json(json.dumps(request.app.health.report(_asked())), BY_ACCEPT)


def get_live() -> dict[str, str]:
    return {"status": "ok"}


def get_ready() -> dict[str, str]:
    if request.app.health.board.total(STOPPING):
        raise DatabaseUnavailable("The service is stopping.")
    match request.app.health.database(_asked())["status"]:
        case "up":
            return {"status": "ok"}
        case "unmigrated":
            raise SchemaNotMigrated
        case _:
            raise DatabaseUnavailable


def get_metrics() -> Reply:
    health = request.app.health
    text: str = health.board.exposition(
        version=VERSION,
        database_up=health.database(_asked())["status"] != "down",
        pool_size=health.pool_size,
    )
    kind = ("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
    return Reply(text.encode(), [kind])


def _asked() -> float:
    """When the request was complete, on the monotonic clock."""
    arrived: float = request.environ.get("gatehouse.arrived") or time.monotonic()
    return arrived


# /users


def list_users() -> Reply:
    kind = preferred(request.environ.get("HTTP_ACCEPT"), *LIST_TYPES)
    if kind == HTML:
        return _page("users")
    asked = _page_query(request.query_string, kind)
    if kind in BULK_TYPES:
        exported = transfer.exported(kind, asked.after, asked.search)
        charset = "; charset=utf-8" if kind == CSV else ""
        return Reply(exported, [BY_ACCEPT, ("Content-Type", kind + charset)])
    page = search.page(asked.limit, asked.after, asked.search, count=asked.total)
    members = [f'"users": [{", ".join(page.users)}]', '"next": null']
    headers = [BY_ACCEPT]
    if page.last is not None:
        given = urlencode(asked.given) + "&" if asked.given else ""
        target = f"/users?{given}limit={asked.limit}&after={page.last}"
        headers.append(("Link", f'<{target}>; rel="next"'))
        members[1] = f'"next": {json.dumps(target)}'
    if page.total is not None:
        members.append(f'"total": {page.total}')
    return _json("{" + ", ".join(members) + "}", *headers)


def create_user() -> Reply:
    kind = media_type(request.environ.get("CONTENT_TYPE", ""))
    if kind in BULK_TYPES:
        return Reply(transfer.imported(kind, Lines(request.environ)), [("Content-Type", NDJSON)])
    user_id, user = users.create(json_members(request.environ, JSON, *BULK_TYPES))
    return _created(user_id, user)


def get_user(user_id: str) -> Reply:
    user = users.get(_existing(user_id))
    known = tags("If-None-Match", request.environ.get("HTTP_IF_NONE_MATCH"))
    if known is not None and (known == ANY or user.version in known):
        return Reply(b"", [_tag(user)], "304 Not Modified")
    return _user(user)


def put_user(user_id: str) -> Reply:
    user = users.put(user_id, json_members(request.environ, JSON), _condition())
    return _created(user_id.lower(), user) if user.created else _user(user)


def patch_user(user_id: str) -> Reply:
    user_id, condition = _existing(user_id), _condition()
    members = json_members(request.environ, JSON, "application/merge-patch+json")
    return _user(users.patch(user_id, members, condition))


def delete_user(user_id: str) -> Reply:
    users.delete(_existing(user_id), _condition())
    return Reply(b"", [], "204 No Content")


def _page(name: str) -> Reply:
    page: browser.BrowserPage = request.app.pages[name]
    headers = [
        BY_ACCEPT,
        ("Content-Type", f"{HTML}; charset=utf-8"),
        ("Content-Security-Policy", page.policy),
        ("Referrer-Policy", "no-referrer"),
    ]
    return Reply(page.html, headers)


def _json(document: str, *headers: Header, status: str = "200 OK") -> Reply:
    return Reply((document + "\n").encode(), [*headers, ("Content-Type", JSON)], status)


def _user(user: Found) -> Reply:
    return _json(user.json, _tag(user))


def _created(user_id: str, user: Found) -> Reply:
    return _json(user.json, ("Location", f"/users/{user_id}"), _tag(user), status="201 Created")


def _tag(user: Found) -> Header:
    return "ETag", f'"{user.version}"'


def _existing(user_id: str) -> str:
    try:
        return valid_id(user_id)
    except ValueError:
        raise NoSuchUser from None


def _condition() -> users.Condition:
    return users.Condition(
        tags("If-Match", request.environ.get("HTTP_IF_MATCH")),
        tags("If-None-Match", request.environ.get("HTTP_IF_NONE_MATCH")),
    )


class PageQuery(NamedTuple):
    """Which page of users is asked for. `given` are the parameters that the link to the next page
    repeats."""

    limit: int
    after: str | None
    search: search.Search
    total: bool
    given: dict[str, str]


def _page_query(query: str, kind: str) -> PageQuery:
    """Reads the query of GET /users, whose answer has the media type `kind`. Raises InvalidQuery,
    which names every bad parameter, up to 20 of them."""
    given: dict[str, str] = {}
    errors: list[tuple[str, str]] = []
    # Octets that should have been percent-encoded are read as if they were.
    query = query.encode("latin-1").decode("utf-8", errors="replace")
    for name, value in parse_qsl(query, keep_blank_values=True, errors="replace"):
        check = PARAMETERS.get(name)
        try:
            if name in given:
                raise ValueError("is given more than once")
            given[name] = value
            if check is None or (kind in BULK_TYPES and name in PAGE_PARAMETERS):
                raise ValueError("is not a parameter of this call")
            check(value)
        except ValueError as error:
            errors.append((name[:100], str(error)))
    if errors:
        raise InvalidQuery(errors=errors)
    after = given.pop("after", None)
    return PageQuery(
        limit=int(given.pop("limit", search.DEFAULT_PAGE)),
        after=after and valid_id(after),
        search=search.Search(given.get("email"), given.get("q")),
        total=given.get("count") == "true",
        given=given,
    )


def _limit(value: str) -> None:
    if not re.fullmatch(r"[0-9]{1,3}", value) or not 1 <= int(value) <= search.MAX_PAGE:
        raise ValueError(f"must be a whole number from 1 to {search.MAX_PAGE}")


def _switch(value: str) -> None:
    if value not in ("true", "false"):
        raise ValueError("must be true or false")


# Parameters of a page, which an export does not have.
PAGE_PARAMETERS = {"limit", "count"}
# The parameters of GET /users, each with its check, which raises ValueError for a wrong value.
PARAMETERS: dict[str, Callable[[str], object]] = {
    "limit": _limit,
    "after": valid_id,
    "email": str,
    "q": str,
    "count": _switch,
}


class Application(bottle.Bottle):  # type: ignore[misc]
    """A Bottle application with one place for all errors. `_guard` runs before Bottle, and decides
    what Bottle would guess at: see the comments there.

    A server may put into the environ `gatehouse.request_id`; `gatehouse.arrived`, when the request
    was complete, in seconds on the monotonic clock; and `gatehouse.lane`, if it has asked
    `Gatehouse.admit`, so that access is not checked again. A ConnectionError that `wsgi.input`
    raises says that the client has left; it is not answered.
    """

    def __init__(self, settings: Settings, health: Health) -> None:
        super().__init__()
        self.health = health
        self.pages = {name: browser.load(name) for name in ("users", "health")}
        self.access = Access(settings.users_token, everyone=settings.users_auth == "none")
        self.patience = settings.db_pool_timeout
        self.config["catchall"] = False  # Exceptions come to __call__.
        self.uninstall(True)
        self.install(bottle.JSONPlugin(json_dumps=lambda value: json.dumps(value) + "\n"))

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        """Answer a request (PEP 3333). This is the one place that turns exceptions into answers."""
        given = environ.get("gatehouse.request_id")
        request_id = given or usable_id([environ.get("HTTP_X_REQUEST_ID", "")])
        try:
            self._guard(environ)
            pieces, headers, status = self._answer(environ)
        except ConnectionError:
            raise
        except Exception as error:
            problem = error if isinstance(error, Problem) else Problem()
            if problem is not error:
                log.exception("%s request_id=%s", environ["REQUEST_METHOD"], request_id)
            self.health.board.problem(problem.name)
            status, headers, body = refusal(problem, request_id)
            pieces = [body]
        start_response(status, headers + own_headers(request_id))
        if environ["REQUEST_METHOD"] == "HEAD" or status[:3] in BODILESS:
            if hasattr(pieces, "close"):
                pieces.close()
            return []
        return pieces

    def _answer(self, environ: dict[str, Any]) -> tuple[Any, list[Header], str]:
        """The pieces, header lines and status of an answer, as Bottle's `wsgi` finds them. Of a
        Reply nothing has to be found out."""
        answer = self._handle(environ)
        if not isinstance(answer, Reply):
            pieces = self._cast(answer)
            return pieces, response.headerlist, response.status_line
        body, given, status = answer
        headers = [*given]
        # Hooks and plugins may have set some. (`response.headers` is a new object at each use.)
        if response._headers or response._cookies:
            names = {name.lower() for name, _ in given} | {"content-type"}
            headers += [one for one in response.headerlist if one[0].lower() not in names]
        values = "".join([value for _, value in headers])
        if not (values.isascii() and values.isprintable()) and not HEADER_VALUES.fullmatch(values):
            raise ValueError("a header of the answer has a character that no header may have")
        pieces = [body] if isinstance(body, bytes) else self._cast(body) or [b""]
        if isinstance(pieces, list) and status[:3] not in BODILESS:
            headers.append(("Content-Length", str(len(pieces[0]))))
        return pieces, headers, status

    def _guard(self, environ: dict[str, Any]) -> None:
        path = environ.get("PATH_INFO", "")
        owner = OWNED.fullmatch(path)
        if owner is None:
            raise NotFound("This path is not Gatehouse's; only its own server forwards requests.")
        if owner[1] == "users":
            lane = environ.get("gatehouse.lane")
            if lane is None:
                headers = (environ.get(name) for name in ("CONTENT_TYPE", "HTTP_ACCEPT"))
                lane = users_lane(path, environ["REQUEST_METHOD"], *headers)
                if lane != "live":
                    given = {name: [environ[key]] for name, key in KEYS.items() if key in environ}
                    peer = environ.get("REMOTE_ADDR", "")
                    self.access.check(given, environ.get("HTTP_HOST", ""), peer)
            if environ.get("HTTP_CONTENT_ENCODING", "identity").lower() != "identity":
                raise UnsupportedMediaType("Send the body as it is, without a Content-Encoding.")
            waited = time.monotonic() - environ.get("gatehouse.arrived", time.monotonic())
            if waited > self.patience and lane == "users":
                raise DatabaseUnavailable("Too many requests wait for the database.")
        # Bottle drops octets of a path that are not UTF-8 (bottle.py:981: `/us%FFers` would be
        # `/users`). Its expressions ignore a line feed at the end (:441). It takes a method in any
        # case (:459), and gives the methods PROXY and ANY a meaning of its own. One trailing slash
        # is ignored.
        environ["PATH_INFO"] = UNROUTABLE.sub("?", path).removesuffix("/")
        if environ["REQUEST_METHOD"] not in ROUTED_METHODS:
            environ["REQUEST_METHOD"] = "OTHER"

    def default_error_handler(self, error: Any) -> str:
        """Turn Bottle's own refusals into problems. Bottle calls this while it makes the answer."""
        match error.status_code:
            case 400:
                raise BadRequest(error.body)
            case 404:
                raise NotFound
            case 405:
                methods = {*error.get_header("Allow").split(","), "OPTIONS"}
                allow = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
                if request.method == "OPTIONS":
                    response.status = 204
                    response.set_header("Allow", allow)
                    return ""
                raise MethodNotAllowed(headers=[("Allow", allow)])
        raise RuntimeError(f"{error.status_line}: {error.body}") from error.exception


def users_lane(path: str, method: str, content_type: str | None, accept: str | None) -> str:
    """The lane of a request below /users: `live` for the browser's page, which holds nobody's data
    and waits for nothing; `bulk` for an import or export; `users` for anything else."""
    kind = ""
    if path.removesuffix("/") == "/users":
        if method == "POST":
            kind = media_type(content_type or "")
        elif method in ("GET", "HEAD"):
            kind = preferred(accept, *LIST_TYPES)
            if kind == HTML:
                return "live"
    return "bulk" if kind in BULK_TYPES else "users"


class Gatehouse:
    """What Gatehouse's own server runs: the application, the proxy's rules, and the decision who
    answers a request."""

    def __init__(self, settings: Settings) -> None:
        self.max_body = settings.max_body_bytes
        self.board = Board(settings.workers)
        self.owned = create_app(settings, self.board)
        url = urlsplit(settings.upstream_url)
        self.rules = Proxy(
            host=url.netloc,
            prefix=url.path,
            name=f"gatehouse-{uuid.uuid4().hex[:12]}",
            preserve_host=settings.upstream_preserve_host,
            trusted=settings.trusted_proxies,
        )
        self.caller = self.rules.caller

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Answer a request that is not proxied."""
        body: Iterable[bytes] = self.owned(environ, start_response)
        return body

    def owner(self, head: Head) -> str:
        """The name under which the metrics count a request."""
        owner = OWNED.fullmatch(head.path)
        return "proxy" if owner is None else owner[1]

    def admit(self, head: Head) -> tuple[str, int]:
        """Decide by the decoded path who answers a request; called when its head is complete.
        Returns its lane and the largest body that it may have, in bytes (0: any number). A lane is
        a set of threads for one kind of request (server/lanes.py); "proxy" means that the upstream
        answers. Raises the Problem to refuse the request with."""
        owner = OWNED.fullmatch(head.path)
        if owner is None:
            self.rules.admit(head)
            return "proxy", self.max_body
        if owner[1] == "users":
            kind, accept = head.value("content-type"), head.value("accept")
            lane = users_lane(head.path, head.method, kind, accept)
            if lane != "live":
                self.owned.access.check(head.values, head.host)
            return lane, self.max_body if lane == "bulk" else MAX_BYTES
        # What waits for nothing must not wait behind requests that do.
        return "live" if LIVE.fullmatch(head.path) else "health", MAX_BYTES


def serve(settings: Settings, listener: socket.socket, handed_over: bool) -> int:
    """Serve on a bound socket until a signal says to stop. Returns the exit code."""
    gatehouse = Gatehouse(settings)
    options = Options(
        upstream_url=settings.upstream_url,
        ca_bundle=os.environ.get(commands.CA_BUNDLE),
        threads={
            # At least two more than connections: when all of these are in use, two threads are left
            # to tell callers so.
            "users": max(settings.threads, settings.db_pool_size + 2),
            "health": HEALTH_THREADS,
            "live": LIVE_THREADS,
            "bulk": BULK_THREADS,
        },
        # As many as there are connections: one more thread would only wait for a connection.
        eager={"users": settings.db_pool_size},
        waits={"bulk": BULK_SECONDS},
        streamed=frozenset({"bulk"}),
        patience=Patience(
            head=settings.upstream_read_timeout,
            stream=settings.upstream_stream_timeout,
            retry=settings.upstream_retry,
            comment=settings.sse_keepalive,
        ),
        limit=settings.upstream_max_in_flight or 0,
        connect_timeout=settings.upstream_connect_timeout,
        upstream_keepalive=settings.upstream_keepalive_timeout,
        keepalive=settings.keepalive_timeout,
        shutdown_timeout=settings.shutdown_timeout,
        access_log=settings.access_log,
    )
    service = workers.Service(
        make=lambda: Server(gatehouse, listener, options),
        close=database.close_all,
        listener=listener,
        board=gatehouse.board,
        notifier=Notifier(os.environ),
        workers=settings.workers,
        handed_over=handed_over,
        drain_delay=settings.drain_delay,
        shutdown_timeout=settings.shutdown_timeout,
    )
    return workers.serve(service)


def main(arguments: list[str]) -> int:
    """The command line. Returns the exit code."""
    return commands.main(arguments, VERSION, serve)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
