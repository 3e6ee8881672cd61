"""Gatehouse: a users table, a health check and migrations in front of an HTTP application.

`create_app` makes the application that answers /users and /health: an ordinary Bottle application,
for any WSGI server. `Gatehouse` is what Gatehouse's own server runs: it has that application, and
the rules by which all other requests are forwarded. `main` is the command line.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlencode, urlsplit

from bottle import request

import commands
from application import BULK_TYPES, HTML, JSON, LIST_TYPES, OWNED, Application, Reply, users_lane
from metrics import STOPPING, Board
from models import database
from postgres import schema
from postgres.table import Found
from problems import (
    DatabaseUnavailable,
    NoSuchUser,
    PreconditionFailed,
    SchemaNotMigrated,
)
from server import workers
from server.exchange import Patience
from server.options import Options
from server.server import Server
from server.systemd import Notifier
from services import browser, query, search, transfer, users
from services.fields import valid_id
from services.health import Health
from services.proxy import Proxy
from settings import Settings
from wire.body import MAX_BYTES, json_members
from wire.headers import Header
from wire.media_types import media_type, preferred
from wire.request import Head
from wire.rows import CSV, NDJSON, Lines
from wire.tags import tags

VERSION = "2.0.0"

# Threads that answer /health; each may have to wait for the one measurement that is shared.
HEALTH_THREADS = 64
# Threads that answer /health/live and the page of /users. Nothing holds them up, so that few are
# ever busy: this is only a bound for a crowd of such calls.
LIVE_THREADS = 64
# Threads that answer imports and exports, each of which may last long.
BULK_THREADS = 8
# How many seconds an import or export may wait for one of these.
BULK_SECONDS = 10.0
# The header line of an answer whose media type depends on the request's Accept.
BY_ACCEPT = ("Vary", "Accept")
LIVE = re.compile(r"/health/live/?")


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
    asked = query.read(request.query_string, export=kind in BULK_TYPES)
    if kind in BULK_TYPES:
        exported = transfer.exported(kind, asked.after, asked.search)
        charset = "; charset=utf-8" if kind == CSV else ""
        return Reply(exported, [BY_ACCEPT, ("Content-Type", kind + charset)])
    page = search.page(asked.limit, asked.after, asked.search, count=asked.total)
    members = ['"next": null']
    headers = [BY_ACCEPT, ("Content-Type", JSON)]
    if page.last is not None:
        given = urlencode(asked.given) + "&" if asked.given else ""
        target = f"/users?{given}limit={asked.limit}&after={page.last}"
        headers.append(("Link", f'<{target}>; rel="next"'))
        members[0] = f'"next": {json.dumps(target)}'
    if page.total is not None:
        members.append(f'"total": {page.total}')
    # They are joined once: each copy of the largest users has 30 MB.
    parts = page.users or [b""]
    parts[0] = b'{"users": [' + parts[0]
    parts[-1] += b"]"
    parts.append(", ".join(members).encode() + b"}\n")
    return Reply(b", ".join(parts), headers)


def create_user() -> Reply:
    kind = media_type(request.environ.get("CONTENT_TYPE", ""))
    if kind in BULK_TYPES:
        return Reply(transfer.imported(kind, Lines(request.environ)), [("Content-Type", NDJSON)])
    user_id, user = users.create(json_members(request.environ, JSON, *BULK_TYPES))
    return _created(user_id, user)


def get_user(user_id: str) -> Reply:
    user_id, condition = _existing(user_id), _condition()
    user = users.get(user_id)
    if condition.unmatched(user.version):
        raise PreconditionFailed
    if condition.excluded(user.version):
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
        if owner[1] != "health":  # A path that is added asks for the token, too.
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
        client_timeout=settings.client_timeout,
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
