"""How the application answers: one place for all errors, and for what is decided before a handler.

An `Application` is an ordinary Bottle application; app.py gives it its routes and handlers.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import bottle
from bottle import request, response

from metrics import PATHS
from problems import (
    BadRequest,
    DatabaseUnavailable,
    MethodNotAllowed,
    NotFound,
    Problem,
    UnsupportedMediaType,
)
from services import browser
from services.access import HEADERS, Access
from services.health import Health
from settings import Settings
from wire.headers import Header
from wire.ids import request_id as usable_id
from wire.media_types import media_type, preferred
from wire.refusal import own_headers, refusal
from wire.rows import CSV, NDJSON

log = logging.getLogger("gatehouse")

JSON = "application/json"
HTML = "text/html"
# Media types of many users at once, for which the server has threads of their own.
BULK_TYPES = (CSV, NDJSON)
LIST_TYPES = (JSON, *BULK_TYPES, HTML)
OWNED = re.compile(rf"/({'|'.join(PATHS)})(?:/.*)?", re.DOTALL)
# What a WSGI environ calls the headers that decide who may use /users.
KEYS = {name: f"HTTP_{name.upper().replace('-', '_')}" for name in HEADERS}
BODILESS = {"204", "304"}  # RFC 9110 section 6.4.1
HEADER_VALUES = re.compile(r"[\t -~\x80-\xff]*")  # RFC 9110 section 5.5
UNROUTABLE = re.compile(r"[^!-~]")
ROUTED_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


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


class Application(bottle.Bottle):  # type: ignore[misc]
    """A Bottle application with one place for all errors. `_guard` runs before Bottle, and decides
    what Bottle would guess at: see the comments there.

    A server may put into the environ `gatehouse.request_id`; `gatehouse.arrived`, when the request
    was complete (its head, if the body is read while it arrives), in seconds on the monotonic
    clock; and `gatehouse.lane`, if it has asked `Gatehouse.admit`, so that access is not checked
    again. A ConnectionError that `wsgi.input` raises says that the client has left; it is not
    answered.
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
        if owner[1] != "health":  # A path that is added asks for the token, too.
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
        # Bottle drops octets of a path that are not UTF-8 (`_handle`: `/us%FFers` would be
        # `/users`). Its expressions ignore a line feed at the end (`Router._compile`). It takes a
        # method in any case, and gives the methods PROXY and ANY a meaning of its own
        # (`Router.match`). One trailing slash is ignored.
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
