"""Answers each request with its X-Request-Id, and writes a line for each when its body has been read."""

import json
import os


async def application(scope, receive, send):
    if scope["type"] != "http":
        return
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    target = scope["raw_path"].decode("latin-1")
    if scope["query_string"]:
        target += "?" + scope["query_string"].decode("latin-1")
    identity = dict(scope["headers"]).get(b"x-request-id", b"")
    os.write(1, json.dumps([identity.decode(), scope["method"], target, size]).encode() + b"\n")
    length = [(b"content-length", str(len(identity)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    body = b"" if scope["method"] == "HEAD" else identity
    await send({"type": "http.response.body", "body": body})
