"""Answers each request with its X-Request-Id, and writes a line for each when its body has been read."""

import json
import os
import sys


def application(environ, start_response):
    size = 0
    while piece := environ["wsgi.input"].read(65536):
        size += len(piece)
    target = environ.get("RAW_URI") or environ.get("REQUEST_URI") or environ["PATH_INFO"]
    identity = environ.get("HTTP_X_REQUEST_ID", "")
    line = [identity, environ["REQUEST_METHOD"], target, size]
    os.write(1, json.dumps(line).encode() + b"\n")
    start_response("200 OK", [("Content-Length", str(len(identity)))])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [identity.encode()]


def serve(name, port):
    if name == "waitress":
        import waitress

        waitress.serve(application, listen=f"127.0.0.1:{port}", threads=8, _quiet=True)
    else:
        from cheroot.wsgi import Server

        Server(("127.0.0.1", port), application).start()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
