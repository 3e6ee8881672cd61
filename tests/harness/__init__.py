"""Real parts for tests, cut by what they stand for: a client, an upstream, a Gatehouse process, PostgreSQL.

Everything listens on 127.0.0.1 and is stopped by its process id.
"""

from tests.harness.client import (
    RawClient,
    Reply,
    call,
    chunked,
    exchange,
    invalid_fields,
    message,
    problem,
    request,
)
from tests.harness.postgres import Databases, embedded_postgres, pw_migrate
from tests.harness.service import (
    DEAD_DATABASE,
    ROOT,
    Service,
    checkout,
    copied,
    create_user,
    forward,
    free_port,
    new_email,
    no_descriptor_free,
    refuses,
    run_app,
    unprivileged,
    unshared,
    wait_for,
)
from tests.harness.upstream import PROXY_SETS, Answer, ScriptedUpstream, Seen, echo_at_once, ok

__all__ = [
    "Reply",
    "RawClient",
    "exchange",
    "call",
    "message",
    "request",
    "chunked",
    "problem",
    "invalid_fields",
    "PROXY_SETS",
    "Seen",
    "Answer",
    "ok",
    "echo_at_once",
    "ScriptedUpstream",
    "ROOT",
    "DEAD_DATABASE",
    "copied",
    "checkout",
    "unprivileged",
    "free_port",
    "unshared",
    "wait_for",
    "Service",
    "forward",
    "refuses",
    "run_app",
    "new_email",
    "no_descriptor_free",
    "create_user",
    "pw_migrate",
    "Databases",
    "embedded_postgres",
]
