"""FastAPI and sse-starlette: its redirects are whole URLs made from Host, its events come one by
one, a file goes up, and a WebSocket echoes."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request, UploadFile, WebSocket
from httpx_sse import connect_sse
from program import run
from sse_starlette import EventSourceResponse
from websockets.sync.client import connect


def serve(port: int) -> None:
    app = FastAPI()
    rooms: dict[str, asyncio.Queue[str]] = {}

    @app.get("/items/")
    def items(request: Request) -> dict[str, str]:
        return {"self": str(request.url), "item": str(request.url_for("item", name="a b"))}

    @app.get("/items/{name}")
    def item(name: str) -> str:
        return name

    @app.get("/rooms/{room}")
    async def listen(room: str, request: Request) -> EventSourceResponse:
        said = rooms.setdefault(room, asyncio.Queue())
        first = int(request.headers.get("Last-Event-ID", "0"))

        async def events() -> Any:
            yield {"event": "hello", "id": str(first), "data": room}
            for number in range(first + 1, first + 4):
                yield {"id": str(number), "data": await said.get()}

        return EventSourceResponse(events())

    @app.post("/rooms/{room}")
    async def say(room: str, request: Request) -> None:
        rooms[room].put_nowait((await request.body()).decode())

    @app.post("/files")
    async def receive(file: UploadFile) -> list[Any]:
        data = await file.read()
        return [file.filename, len(data), hashlib.sha256(data).hexdigest()]

    @app.websocket("/echo")
    async def echo(socket: WebSocket) -> None:
        await socket.accept()
        async for text in socket.iter_text():
            await socket.send_text(f"{socket.url} {text}")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="info")


def use(base: str) -> Any:
    with httpx.Client(base_url=base, timeout=30) as client:
        slash = client.get("/items?a=1&b=%2F")
        listed = client.get(slash.headers["location"])

        def heard(last: int) -> list[list[str]]:
            """What a listener gets who says a thing only when all before it has been heard."""
            events = []
            given = {"Last-Event-ID": str(last)}
            with connect_sse(client, "GET", "/rooms/one", headers=given) as source:
                for event in source.iter_sse():
                    events.append([event.event, event.id, event.data])
                    if len(events) < 4:
                        client.post("/rooms/one", content=f"word {len(events)}")
            return events

        first, again = heard(0), heard(3)
        data = bytes(range(256)) * 12_000
        kept = client.post("/files", files={"file": ("naïve name.bin", data)})
        with connect(base.replace("http", "ws", 1) + "/echo") as socket:
            socket.send("hello")
            echoed = [socket.recv()]
            socket.send("x" * 200_000)
            echoed.append(len(socket.recv()) > 200_000)
        return {
            "slash": [slash.status_code, slash.headers["location"]],
            "listed": listed.json(),
            "events": [first, again],
            "file": [*kept.json(), hashlib.sha256(data).hexdigest() == kept.json()[2]],
            "echo": echoed,
        }


if __name__ == "__main__":
    run(serve, use)
