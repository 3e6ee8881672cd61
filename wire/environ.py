"""A request as a WSGI application is given it (PEP 3333)."""

from __future__ import annotations

import sys
from typing import Any, Final

from wire.headers import remembering_short
from wire.request import Head

# What is the same for each request. The server that a client asks for is in its Host.
FIXED: Final[dict[str, Any]] = {
    "SCRIPT_NAME": "",
    "SERVER_NAME": "gatehouse",
    "SERVER_PORT": "0",
    "wsgi.version": (1, 0),
    "wsgi.url_scheme": "http",
    "wsgi.multithread": True,
    "wsgi.multiprocess": True,  # There may be several workers.
    "wsgi.run_once": False,
    "wsgi.input_terminated": True,  # The body ends where `wsgi.input` does.
}
# Header names whose variables have no HTTP_ before them (RFC 3875 sections 4.1.2 and 4.1.3).
BARE: Final = frozenset({"content-length", "content-type"})


def environ_of(head: Head, peer: str, body: Any, length: int | None) -> dict[str, Any]:
    """The environ of a request: its `head`, the address of its client (`peer`), and its `body`, a
    binary stream of `length` bytes, if that is known."""
    environ = FIXED.copy()
    environ["REMOTE_ADDR"] = peer
    environ["REQUEST_METHOD"] = head.method
    environ["REQUEST_URI"] = head.target
    environ["PATH_INFO"] = head.path
    environ["QUERY_STRING"] = head.query
    environ["SERVER_PROTOCOL"] = "HTTP/" + head.version
    environ["wsgi.input"] = body
    environ["wsgi.errors"] = sys.stderr
    for name, values in head.values.items():
        # A name with an underscore is dropped: its variable is that of the name with a hyphen.
        if "_" not in name:
            environ[variable(name)] = ("; " if name == "cookie" else ", ").join(values)
    if length is not None:
        environ["CONTENT_LENGTH"] = str(length)  # A client may write zeros before it.
    return environ


@remembering_short
def variable(name: str) -> str:
    """What an environ calls a header."""
    return ("" if name in BARE else "HTTP_") + name.upper().replace("-", "_")
