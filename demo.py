"""A small HTTP application to stand in front of, for `make run` where UPSTREAM_URL is unset."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class Demo(BaseHTTPRequestHandler):
    """`/slow?seconds=N`, `/events?n=N`, and an echo at every other path."""

    protocol_version = "HTTP/1.1"
    # Head and body of an answer are two writes. Nagle's algorithm would hold the second one back
    # for 40 ms.
    disable_nagle_algorithm = True
    stopping = threading.Event()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        # A chunked body of more than 64 KB stays chunked.
        if self.headers.get("Transfer-Encoding"):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if url.path == "/slow":
            seconds = whole(query.get("seconds"), 3)
            self.stopping.wait(seconds)
            self.send_json({"waited_seconds": seconds})
        elif url.path == "/events":
            self.send_events(whole(query.get("n"), 86400))
        else:
            self.send_json(
                {
                    "method": self.command,
                    "target": self.path,
                    "headers": self.headers.items(),
                    "body": body.decode(errors="replace"),
                }
            )

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer

    def send_json(self, content: dict[str, object]) -> None:
        body = json.dumps(content, indent=2).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_events(self, count: int) -> None:
        """Send `count` server-sent events, one a second."""
        self.close_connection = True  # The body has no known length: it ends with the connection.
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        for number in range(1, count + 1 if self.command != "HEAD" else 0):
            self.wfile.write(f"id: {number}\ndata: tick {number}\n\n".encode())
            if number < count and self.stopping.wait(1):
                return

    def log_message(self, format: str, *args: object) -> None:
        """Do nothing: Gatehouse's access log has the request already."""


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Do nothing: a client has left in the middle of an answer."""


def whole(values: list[str] | None, default: int) -> int:
    """The first of a parameter's values as a number up to a day's seconds, else `default`."""
    text = values[0] if values else ""
    return min(int(text), 86400) if text.isdecimal() and len(text) < 10 else default


def start() -> str:
    """Serve on a free port of 127.0.0.1, from a thread, until the process ends; gives the URL."""
    server = Server(("127.0.0.1", 0), Demo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"
