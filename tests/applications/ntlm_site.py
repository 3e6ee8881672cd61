"""A site with log-ins by NTLM, which authenticate a connection: eight people at once, each is taken for
nobody else, and a stranger is not let in."""

from __future__ import annotations

import base64
import os
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import requests
import spnego
from program import run
from requests_ntlm import HttpNtlmAuth

PEOPLE = {"ann": "a secret", "bob": "another"}


class Handler(BaseHTTPRequestHandler):
    """One connection, and who it belongs to."""

    protocol_version = "HTTP/1.1"
    login: Any = None
    who = None

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        challenge = "NTLM"
        if scheme == "NTLM":
            if self.login is None or self.login.complete:
                self.login = spnego.server(protocol="ntlm")
            try:
                given = self.login.step(base64.b64decode(token))
            except spnego.exceptions.SpnegoError:
                self.login = None  # a log-in that began on another connection, or a wrong password
            else:
                if self.login.complete:
                    self.who = self.login.client_principal
                else:
                    self.who, challenge = None, f"NTLM {base64.b64encode(given).decode()}"
        text = (self.who or "").encode()
        self.send_response(200 if self.who else 401)
        if not self.who:
            self.send_header("WWW-Authenticate", challenge)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def serve(port: int) -> None:
    users = Path("users").absolute()
    users.write_text("".join(f"SHOP:{name}:{secret}\n" for name, secret in PEOPLE.items()))
    os.environ["NTLM_USER_FILE"] = str(users)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def use(base: str) -> Any:
    def person(name: str) -> list[Any]:
        """All that somebody gets who logs in and asks for several things."""
        found = []
        with requests.Session() as browser:
            browser.auth = HttpNtlmAuth(f"SHOP\\{name}", PEOPLE[name])
            for number in range(6):
                method = "POST" if number % 2 else "GET"
                answer = browser.request(method, base, data=b"some data", timeout=30)
                found.append([answer.status_code, answer.text == f"SHOP\\{name}"])
        return found

    def stranger() -> list[Any]:
        with requests.Session() as browser:
            answers = [browser.get(base, timeout=30) for _ in range(40)]
        return [[answer.status_code, answer.text] for answer in answers]

    with ThreadPoolExecutor(9) as threads:
        strangers = threads.submit(stranger)
        people = list(threads.map(person, ["ann", "bob"] * 4))
        return {
            "people": sorted({tuple(one) for found in people for one in found}),
            "strangers": sorted({tuple(one) for one in strangers.result()}),
        }


if __name__ == "__main__":
    run(serve, use)
