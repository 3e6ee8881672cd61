"""A restart that nobody notices: generations of Gatehouse on one socket, one after the other, under
load, with streams that keep the old ones alive.

GENERATIONS says how many there are; `make faults` runs fifty.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.harness import RawClient, ScriptedUpstream, Seen, message, ok, request, wait_for
from tests.harness.handover import Listener, Told

GENERATIONS = int(os.environ.get("GENERATIONS", "6"))
# So many generations later a stream is left by its client, so that no more are alive at once.
LIFE = 2

UPGRADE = [b"Connection: Upgrade", b"Upgrade: websocket"]
ACCEPT = b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
# A Close frame with the code 1001, as a server sends it: RFC 6455 section 5.5.1.
GOING_AWAY = b"\x88\x02\x03\xe9"


class Application(ScriptedUpstream):
    """Answers at once, with /events that last until their client leaves, and /ws that switches."""

    def __init__(self) -> None:
        self.ending = threading.Event()
        super().__init__(self._answer)

    def _answer(self, sock: socket.socket, seen: Seen) -> bool | None:
        if seen.target == b"/events":
            fields = [b"Content-Type: text/event-stream", b"Transfer-Encoding: chunked"]
            sock.sendall(message(b"HTTP/1.1 200 OK", *fields))
            while not self.ending.wait(0.05):
                sock.sendall(b"9\r\ndata: 1\n\n\r\n")
            return False
        if seen.target == b"/ws":
            sock.sendall(message(b"HTTP/1.1 101 Switching Protocols", *UPGRADE, ACCEPT))
            while sock.recv(65536):
                pass
            return False
        ok(sock, seen)
        return None

    def close(self) -> None:
        self.ending.set()
        super().close()


@pytest.fixture
def application() -> Iterator[Application]:
    application = Application()
    yield application
    application.close()


class Load:
    """Clients that ask all the time, on new connections and on kept ones, and what went wrong."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.over = threading.Event()
        self.failures: list[str] = []
        self.answered = 0
        self.kept_ended = 0
        kinds = [self.new] * 3 + [self.kept] * 3
        self.threads = [threading.Thread(target=self._run, args=(kind,)) for kind in kinds]
        for thread in self.threads:
            thread.start()

    def _run(self, kind: object) -> None:
        while not self.over.is_set():
            try:
                kind()  # type: ignore[operator]
            except Exception as error:
                self.failures.append(f"{getattr(kind, '__name__', '')}: {error!r}")

    def new(self) -> None:
        """One request on a connection of its own."""
        with RawClient(self.port, 30) as client:
            client.send(request(b"GET /a HTTP/1.1", b"Connection: close"))
            assert client.reply().body == b"ok"
        self.answered += 1

    def kept(self) -> None:
        """Requests on one connection, until an answer says that it was the last."""
        with RawClient(self.port, 30) as client:
            while not self.over.is_set():
                client.send(request(b"GET /a HTTP/1.1"))
                reply = client.reply()
                assert reply.body == b"ok"
                self.answered += 1
                if reply.get("Connection") == "close":
                    self.kept_ended += 1
                    return

    def stop(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


class Stream:
    """An event stream, whose client reads until it leaves."""

    def __init__(self, port: int) -> None:
        self.client = RawClient(port, 30)
        self.client.send(request(b"GET /events HTTP/1.1"))
        assert self.client.head().startswith(b"HTTP/1.1 200 ")
        self.lives()

    def lives(self) -> None:
        """An event that was sent after now arrives."""
        self.client.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self.client.sock.recv(65536):
                pass
        self.client.sock.settimeout(30)
        assert b"data: 1" in self.client.sock.recv(65536) + self.client.sock.recv(65536)

    def leave(self) -> None:
        self.client.close()


class Tunnel:
    """A WebSocket, whose client only listens."""

    def __init__(self, port: int) -> None:
        self.client = RawClient(port, 60)
        fields = [*UPGRADE, b"Sec-WebSocket-Version: 13"]
        fields.append(b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
        self.client.send(request(b"GET /ws HTTP/1.1", *fields))
        assert self.client.head().startswith(b"HTTP/1.1 101 ")

    def ends_in_order(self) -> None:
        """It is told that the other side is going away, and then it ends."""
        data = self.client.buffer.partition(b"\r\n\r\n")[2]
        while piece := self.client.sock.recv(65536):
            data += piece
        assert data == GOING_AWAY
        self.client.close()


class Generations:
    """Instances that are started on one socket, each told to stop before or after the next."""

    def __init__(self, listener: Listener, told: Told, **settings: object) -> None:
        self.listener = listener
        self.told = told
        self.settings = settings
        self.processes: list[subprocess.Popen[bytes]] = []
        self.members: list[psutil.Process] = []

    def start(self) -> subprocess.Popen[bytes]:
        process = self.listener.hand_over(NOTIFY_SOCKET=self.told.path, **self.settings)  # type: ignore[arg-type]
        self.processes.append(process)
        while self.told.next() != "READY=1":
            pass  # An older one has said that it stops.
        self.members += [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
        return process

    def kill(self) -> None:
        for member in self.members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        for process in self.processes:
            process.communicate()

    def left(self) -> list[psutil.Process]:
        """The processes of any generation that there still are."""
        return [one for one in self.members if one.is_running() and one.status() != "zombie"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("order", ["start, then stop", "stop, then start"])
def test_generations_follow_each_other_and_nobody_notices(
    application: Application, tmp_path: Path, workers: int, order: str
) -> None:
    listener, told = Listener(), Told(tmp_path)
    generations = Generations(
        listener, told, UPSTREAM_URL=application.url, WORKERS=workers, SHUTDOWN_TIMEOUT=120
    )
    streams: list[Stream] = []
    load = None
    try:
        current = generations.start()
        load = Load(listener.port)
        for _ in range(GENERATIONS):
            streams.append(Stream(listener.port))
            tunnel = Tunnel(listener.port)
            if order.startswith("start"):
                following = generations.start()
                current.terminate()
            else:
                current.terminate()
                following = generations.start()
            tunnel.ends_in_order()
            assert current.poll() is None  # Its stream keeps it alive.
            for stream in streams[-LIFE:]:
                stream.lives()
            if len(streams) >= LIFE:
                streams[-LIFE].leave()
            current = following
        load.stop()
        for stream in streams:
            stream.leave()
        current.terminate()
        codes = [process.wait(60) for process in generations.processes]
    finally:
        if load is not None:
            load.stop()
        generations.kill()
        told.sock.close()
        listener.sock.close()
    assert load.failures == []
    assert load.answered > 10 * GENERATIONS and load.kept_ended > 0
    assert codes == [0] * (GENERATIONS + 1)
    wait_for(lambda: generations.left() == [], what="every process to be gone")


@pytest.mark.parametrize("workers", [1, 3])
def test_a_stream_has_the_time_that_the_setting_says(
    application: Application, tmp_path: Path, workers: int
) -> None:
    """Only its own instance waits for it; the next one serves meanwhile."""
    listener, told = Listener(), Told(tmp_path)
    generations = Generations(
        listener, told, UPSTREAM_URL=application.url, WORKERS=workers, SHUTDOWN_TIMEOUT=5
    )
    try:
        first = generations.start()
        stream = Stream(listener.port)
        first.terminate()
        generations.start()
        with RawClient(listener.port) as client:
            client.send(request(b"GET /a HTTP/1.1"))
            assert client.reply().body == b"ok"
        stream.lives()
        assert first.wait(10) == 0
        with contextlib.suppress(ConnectionResetError):
            while stream.client.sock.recv(65536):
                pass
        stream.leave()
    finally:
        generations.kill()
        told.sock.close()
        listener.sock.close()
