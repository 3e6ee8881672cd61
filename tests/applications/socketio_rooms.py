"""Socket.IO: a browser's client by polling only, by WebSocket only, and from one to the other.

The server lets a page in only where Origin is what Host says.
"""

from __future__ import annotations

from typing import Any

import socketio
import uvicorn
from program import run


def serve(port: int) -> None:
    # A client that polls leaves when its last poll ends, which without words is at the next ping.
    server = socketio.AsyncServer(async_mode="asgi", ping_interval=1)

    @server.event
    async def connect(sid: str, environ: dict[str, Any], auth: Any) -> None:
        await server.emit("welcome", auth, to=sid)

    @server.event
    async def say(sid: str, data: Any) -> Any:
        await server.emit("said", data, to=sid)
        return ["heard", data]

    uvicorn.run(socketio.ASGIApp(server), host="127.0.0.1", port=port, log_level="info")


def use(base: str) -> Any:
    def visit(transports: list[str] | None) -> Any:
        found: list[Any] = []
        # The client's WebSockets say by themselves where they come from, and its polling does not.
        origin = {"Origin": base} if transports == ["polling"] else {}
        with socketio.SimpleClient() as client:
            client.connect(base, origin, {"name": "Ann"}, transports, wait_timeout=20)
            # Without a choice it begins with polling and has changed when it is connected.
            found.append(client.transport)
            found.append(client.receive(timeout=20))
            for data in ("hé", 20_000 * "long ", b"\x00\xff" * 1000, {"nested": [1, None]}):
                answer = client.call("say", data, timeout=20)
                event = client.receive(timeout=20)
                found.append(answer == ["heard", data] and event == ["said", data])
        return found

    def stranger() -> str:
        with socketio.SimpleClient() as client:
            try:
                client.connect(base, {"Origin": "http://evil.example"}, wait_timeout=20)
            except socketio.exceptions.ConnectionError as error:
                return str(error)
        return "let in"

    return {
        "polling": visit(["polling"]),
        "websocket": visit(["websocket"]),
        "upgraded": visit(None),
        "stranger": stranger(),
    }


if __name__ == "__main__":
    run(serve, use)
