"""The least that bottle, requests and waitress can be: the floor for start and memory."""

from __future__ import annotations

import os

import bottle
import requests
import waitress

app = bottle.Bottle()
client = requests.Session()


@app.get("/health/live")
def live() -> dict[str, str]:
    return {"status": "ok"}


@app.get("/<path:path>")
def forward(path: str) -> bytes:
    return client.get(f"{os.environ['UPSTREAM_URL']}/{path}").content


waitress.serve(app, host="127.0.0.1", port=int(os.environ["PORT"]), threads=32)
