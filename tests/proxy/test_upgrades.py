"""WebSockets: bytes pass both ways, as they would without Gatehouse, until either side ends."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import trustme
import websockets.exceptions
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import Server as WebSocketServer
from websockets.sync.server import ServerConnection, serve

from tests.harness import (
    ScriptedUpstream,
    Seen,
    Service,
    message,
    ok,
    problem,
    refuses,
    request,
    wait_for,
)

KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
VERSION = b"Sec-WebSocket-Version: 13"
ASKING = (b"Connection: Upgrade", b"Upgrade: websocket", KEY, VERSION)
AGREED = message(b"HTTP/1.1 101 Switching Protocols", b"Upgrade: websocket", b"Connection: Upgrade", ACCEPT)  # fmt: skip
GOING_AWAY = b"\x88\x02" + struct.pack("!H", 1001)
MIB = 1 << 20


def asking(target: bytes = b"/chat", *lines: bytes) -> bytes:
    return request(b"GET %b HTTP/1.1" % target, *ASKING, *lines)


class Side:
    """One end of a tunnel, a socket that frames and other bytes are sent through."""

    def __init__(self, sock: socket.socket, first: bytes = b"") -> None:
        sock.settimeout(10)
        self.sock = sock
        self.buffer = first
        self.over = threading.Event()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def take(self, size: int) -> bytes:
        """So many bytes, or fewer where the other side ends before."""
        while len(self.buffer) < size and (data := self.sock.recv(MIB)):
            self.buffer += data
        taken, self.buffer = self.buffer[:size], self.buffer[size:]
        return taken

    def rest(self) -> bytes:
        """All that comes until the other side ends in order."""
        pieces = [self.buffer]
        while data := self.sock.recv(MIB):
            pieces.append(data)
        self.buffer = b""
        return b"".join(pieces)

    def gone(self, seconds: float = 1) -> bool:
        """Whether the other side ends within `seconds`, in order or not, after whatever it sends."""
        self.sock.settimeout(seconds)
        try:
            while self.sock.recv(MIB):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True

    def end(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        # A thread that waits in recv would keep the connection open.
        self.sock.close()
        self.over.set()


class Application(ScriptedUpstream):
    """An upstream that agrees to every upgrade, with `agreed`, and hands the tunnel to the test.
    What else is asked of it gets the scripted answer."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(tls=tls)
        self.tunnels: queue.Queue[tuple[Side, Seen]] = queue.Queue()
        self.agreed = AGREED
        self.early = self._agree

    def _agree(self, sock: socket.socket, seen: Seen) -> bool | None:
        if seen.get("Upgrade") is None:
            return None
        if self.agreed:
            sock.sendall(self.agreed)
        side = Side(sock, seen.body)
        self.tunnels.put((side, seen))
        side.over.wait(60)
        return False

    def next(self) -> tuple[Side, Seen]:
        return self.tunnels.get(timeout=10)


@pytest.fixture(scope="module")
def running() -> Iterator[Application]:
    server = Application()
    yield server
    server.close()


@pytest.fixture
def application(running: Application) -> Application:
    running.agreed = AGREED
    running.answer = ok
    running.seen.clear()
    return running


@pytest.fixture(scope="module")
def service(running: Application) -> Iterator[Service]:
    with Service(UPSTREAM_URL=running.url) as service:
        yield service


@pytest.fixture(scope="module")
def one_worker(running: Application) -> Iterator[Service]:
    """One process that has all tunnels, so that its descriptors and threads can be counted."""
    with Service(UPSTREAM_URL=running.url, WORKERS=1) as service:
        yield service


@contextlib.contextmanager
def tunnel(
    service: Service, application: Application, behind: bytes = b""
) -> Iterator[tuple[Side, Side]]:
    """An open tunnel: the client's end and the application's."""
    with service.client() as raw:
        raw.send(asking() + behind)
        assert raw.head().startswith(b"HTTP/1.1 101 ")
        theirs, _ = application.next()
        try:
            yield Side(raw.sock, raw.buffer), theirs
        finally:
            theirs.close()


def counted(service: Service) -> tuple[int, int]:
    """How many requests are with the upstream, and how many of them are streams."""
    upstream = service.call("GET", "/health").json()["upstream"]
    return upstream["in_flight"], upstream["streams"]


def freed(service: Service) -> bool:
    return bool(wait_for(lambda: counted(service) == (0, 0), 3, "the tunnels to be freed"))


def frame(payload: bytes, first: int = 0x82, mask: bytes = b"") -> bytes:
    bit = 0x80 if mask else 0
    size = len(payload)
    if size < 126:
        head = bytes((first, bit | size))
    elif size < 65536:
        head = bytes((first, bit | 126)) + struct.pack("!H", size)
    else:
        head = bytes((first, bit | 127)) + struct.pack("!Q", size)
    if mask:
        payload = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
    return head + mask + payload


MASK = b"\x01\x02\x03\x04"


# The handshake.


def test_both_lines_of_the_handshake_reach_the_application_and_the_client(
    service: Service, application: Application
) -> None:
    with service.client() as raw:
        raw.send(
            asking(
                b"/chat?room=%2f", b"Origin: http://client.example", b"Sec-WebSocket-Protocol: a, b"
            )
        )
        head = raw.head()
        theirs, seen = application.next()
        theirs.close()
    assert seen.request_line == b"GET /chat?room=%2f HTTP/1.1"
    assert seen.all("Connection") == ["upgrade"] and seen.all("Upgrade") == ["websocket"]
    assert seen.all("Sec-WebSocket-Key") == [KEY.split(b": ")[1].decode()]
    assert seen.all("Sec-WebSocket-Version") == ["13"]
    assert seen.all("Sec-WebSocket-Protocol") == ["a, b"]
    assert seen.all("Host") == ["client.example"] and seen.all("Origin") == [
        "http://client.example"
    ]
    assert seen.get("Content-Length") is None and seen.get("Transfer-Encoding") is None
    lines = [line.lower() for line in head.split(b"\r\n")]
    assert lines[0] == b"http/1.1 101 switching protocols"
    assert lines.count(b"upgrade: websocket") == 1 and lines.count(b"connection: upgrade") == 1
    assert ACCEPT.lower() in lines
    assert any(line.startswith(b"x-request-id: ") for line in lines)
    names = [line.partition(b":")[0] for line in lines]
    assert b"transfer-encoding" not in names and b"content-length" not in names


def test_a_list_that_offers_a_websocket_among_others_is_one(
    service: Service, application: Application
) -> None:
    with service.client() as raw:
        raw.send(
            request(
                b"GET / HTTP/1.1",
                b"Connection: keep-alive, Upgrade",
                b"Upgrade: h2c, WebSocket",
                KEY,
            )
        )
        assert b" 101 " in raw.head()
        theirs, seen = application.next()
        theirs.close()
    assert seen.all("Upgrade") == ["websocket"]


def test_bytes_behind_the_101_are_the_first_that_the_client_gets(
    service: Service, application: Application
) -> None:
    application.agreed = AGREED + b"\x81\x05first"
    with tunnel(service, application) as (ours, theirs):
        theirs.send(b"\x81\x06second")
        assert ours.take(15) == b"\x81\x05first\x81\x06second"


@pytest.mark.parametrize("size", [1, 5000, 60_000, 300_000, MIB])
def test_bytes_behind_the_request_are_the_first_that_the_application_gets(
    service: Service, application: Application, size: int
) -> None:
    behind = os.urandom(size)
    application.agreed = b""
    with service.client() as raw:
        sender = threading.Thread(target=raw.send, args=(asking() + behind,), daemon=True)
        sender.start()
        theirs, _ = application.next()
        # They wait at Gatehouse, for they may yet be a request.
        theirs.send(AGREED)
        assert raw.head().startswith(b"HTTP/1.1 101 ")
        assert theirs.take(size) == behind
        sender.join(5)
        theirs.send(b"back")
        assert Side(raw.sock, raw.buffer).take(4) == b"back"
        theirs.close()


def test_the_head_of_the_101_may_come_in_pieces(service: Service, application: Application) -> None:
    application.agreed = b""
    with service.client() as raw:
        raw.send(asking())
        theirs, _ = application.next()
        theirs.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(AGREED)):
            theirs.send(AGREED[at : at + 1])
        theirs.send(b"\x81\x02hi")
        raw.head()
        assert Side(raw.sock, raw.buffer).take(4) == b"\x81\x02hi"
        theirs.close()


def test_an_interim_answer_may_come_before_the_101(
    service: Service, application: Application
) -> None:
    application.agreed = message(b"HTTP/1.1 103 Early Hints", b"Link: </a>") + AGREED
    with service.client() as raw:
        raw.send(asking())
        assert raw.head().startswith(b"HTTP/1.1 103 ")
        assert raw.head().startswith(b"HTTP/1.1 101 ")
        application.next()[0].close()


def test_a_websocket_may_follow_requests_on_one_connection(
    service: Service, application: Application
) -> None:
    with service.client() as raw:
        for _ in range(2):
            raw.send(request())
            assert raw.reply().body == b"ok"
        raw.send(asking())
        raw.head()
        theirs, _ = application.next()
        raw.send(b"there")
        assert theirs.take(5) == b"there"
        theirs.close()


# What is no WebSocket.


@pytest.mark.parametrize(
    "data",
    [
        request(b"GET / HTTP/1.1", b"Upgrade: websocket", KEY),
        request(b"GET / HTTP/1.1", b"Connection: keep-alive", b"Upgrade: websocket", KEY),
        request(b"GET / HTTP/1.1", b"Connection: Upgrade", KEY),
        request(b"GET / HTTP/1.1", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMA"),
        request(b"GET / HTTP/1.1", b"Connection: Upgrade", b"Upgrade: TLS/1.0, websockets"),
        request(b"POST / HTTP/1.1", b"Content-Length: 0", *ASKING),
        request(b"POST / HTTP/1.1", b"Content-Length: 2", *ASKING, body=b"hi"),
        request(b"GET / HTTP/1.1", b"Content-Length: 2", *ASKING, body=b"hi"),
        request(b"GET / HTTP/1.1", b"Transfer-Encoding: chunked", *ASKING, body=b"2\r\nhi\r\n0\r\n\r\n"),
        request(b"OPTIONS / HTTP/1.1", *ASKING),
        b"GET / HTTP/1.0\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    ],
)  # fmt: skip
def test_another_upgrade_is_dropped_and_the_request_goes_on(
    service: Service, application: Application, data: bytes
) -> None:
    reply = service.exchange(data)
    assert (reply.status, reply.body) == (200, b"ok"), reply
    [seen] = application.seen
    assert seen.get("Upgrade") is None and seen.get("Connection") is None
    assert seen.get("HTTP2-Settings") is None
    assert seen.body == (b"hi" if b"hi" in data else b"")


@pytest.mark.parametrize("target", [b"/users", b"/health/live"])
def test_a_path_of_gatehouses_own_is_no_websocket(service: Service, target: bytes) -> None:
    reply = service.exchange(asking(target))
    assert reply.status in (200, 401, 503), reply
    assert reply.get("Upgrade") is None


@pytest.mark.parametrize(
    "answer",
    [
        AGREED,
        message(b"HTTP/1.1 101 Switching Protocols", b"Upgrade: h2c", b"Connection: upgrade"),
        message(b"HTTP/1.1 101 Switching Protocols"),
    ],
)
def test_an_unasked_101_is_a_502(service: Service, application: Application, answer: bytes) -> None:
    for data in (request(), request(b"GET / HTTP/1.1", b"Upgrade: websocket")):
        application.answer = answer + b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother"
        problem(service.exchange(data), 502, "upstream-broken")
        # Nobody is given what followed it.
        application.answer = ok
        assert service.exchange(request()).body == b"ok"
    assert freed(service)


@pytest.mark.parametrize(
    "answer",
    [
        message(b"HTTP/1.1 101 Switching Protocols", b"Upgrade: h2c", b"Connection: upgrade"),
        message(b"HTTP/1.1 101 Switching Protocols", b"Upgrade: websocket, h2c", b"Connection: upgrade"),
        message(b"HTTP/1.1 101 Switching Protocols", b"Connection: upgrade"),
    ],
)  # fmt: skip
def test_a_101_that_switches_to_something_else_is_a_502(
    service: Service, application: Application, answer: bytes
) -> None:
    application.agreed = answer
    with service.client() as raw:
        raw.send(asking())
        problem(raw.reply(), 502, "upstream-broken")
        theirs, _ = application.next()
        assert theirs.gone()
        theirs.close()
    assert freed(service)


def test_after_a_refusal_the_next_bytes_are_a_request_again(
    service: Service, application: Application
) -> None:
    def refuse(sock: socket.socket, seen: Seen) -> None:
        application.seen.append(seen)
        sock.sendall(message(b"HTTP/1.1 403 Forbidden", b"Content-Length: 2", body=b"no"))

    with service.client() as raw:
        application.early = None
        try:
            application.answer = refuse
            raw.send(asking(b"/first") + request(b"GET /second HTTP/1.1") + asking(b"/third"))
            for _ in range(3):
                reply = raw.reply()
                assert (reply.status, reply.body) == (403, b"no")
                assert reply.get("Upgrade") is None
        finally:
            application.early = application._agree
        raw.send(asking(b"/fourth"))
        assert raw.head().startswith(b"HTTP/1.1 101 ")
        application.next()[0].close()
    targets = [seen.target for seen in application.seen]
    assert targets[::2] == [b"/first", b"/second", b"/third"]


def test_after_a_101_the_next_bytes_are_never_a_request(
    service: Service, application: Application
) -> None:
    smuggled = request(b"GET /users HTTP/1.1") + request(b"GET /admin HTTP/1.1")
    with tunnel(service, application, behind=smuggled) as (ours, theirs):
        ours.send(smuggled)
        assert theirs.take(2 * len(smuggled)) == 2 * smuggled
        theirs.send(b"x")
        assert ours.take(1) == b"x"
    assert application.seen == []


@pytest.mark.parametrize("status", [b"200 OK", b"426 Upgrade Required", b"404 Not Found"])
def test_another_answer_to_an_upgrade_is_an_ordinary_answer(
    service: Service, application: Application, status: bytes
) -> None:
    application.agreed = message(
        b"HTTP/1.1 " + status, b"Content-Length: 4", b"Set-Cookie: a", body=b"body"
    )
    with service.client() as raw:
        raw.send(asking())
        reply = raw.reply()
        application.next()[0].close()
    assert reply.status_line == b"HTTP/1.1 " + status and reply.body == b"body"
    assert reply.all("Set-Cookie") == ["a"] and reply.complete


# Bytes pass.


@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, MIB, 8 * MIB])
def test_bytes_pass_both_ways_at_once(
    service: Service, application: Application, size: int
) -> None:
    there, back = os.urandom(size), os.urandom(size)
    with tunnel(service, application) as (ours, theirs):
        senders = [
            threading.Thread(target=ours.send, args=(there,), daemon=True),
            threading.Thread(target=theirs.send, args=(back,), daemon=True),
        ]
        for sender in senders:
            sender.start()
        assert theirs.take(size) == there
        assert ours.take(size) == back
        for sender in senders:
            sender.join(5)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 14,  # all reserved bits, a reserved opcode, a length without end
        frame(b"unmasked from a client"),
        frame(b"x" * 126, first=0x89),  # a ping that is too large
        frame(b"\xff\xfe", first=0x81),  # text that is no UTF-8
        b"\x82\x7f\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x82\x7e\x00\x01x",
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(range(256)),
        frame(b"\x03\xe8", first=0x88) + frame(b"after a close"),
    ],
)
def test_what_is_malformed_passes_untouched(
    service: Service, application: Application, data: bytes
) -> None:
    with tunnel(service, application) as (ours, theirs):
        ours.send(data)
        assert theirs.take(len(data)) == data
        theirs.send(data)
        assert ours.take(len(data)) == data
        ours.send(b"more")
        assert theirs.take(4) == b"more"


def test_a_byte_passes_before_the_next_is_sent(service: Service, application: Application) -> None:
    with tunnel(service, application) as (ours, theirs):
        for number in range(50):
            ours.send(bytes([number]))
            assert theirs.take(1) == bytes([number])
            theirs.send(bytes([number]))
            assert ours.take(1) == bytes([number])


# The ends.


def test_a_half_closed_client_still_gets_what_the_application_says(
    service: Service, application: Application
) -> None:
    with tunnel(service, application) as (ours, theirs):
        ours.send(b"last")
        ours.end()
        assert theirs.rest() == b"last"
        theirs.send(b"answer" * 100_000)
        theirs.send(b"end")
        theirs.end()
        assert ours.rest() == b"answer" * 100_000 + b"end"
        assert freed(service)


def test_a_half_closed_application_still_gets_what_the_client_says(
    service: Service, application: Application
) -> None:
    with tunnel(service, application) as (ours, theirs):
        theirs.send(b"last")
        theirs.end()
        assert ours.rest() == b"last"
        ours.send(b"answer" * 100_000)
        ours.send(b"end")
        ours.end()
        assert theirs.rest() == b"answer" * 100_000 + b"end"
        assert freed(service)


@pytest.mark.parametrize("who", ["client", "application"])
def test_nothing_is_lost_where_a_side_ends_behind_bytes_that_nobody_has_taken_yet(
    service: Service, application: Application, who: str
) -> None:
    size = 24 * MIB
    data = os.urandom(MIB) * 24
    with tunnel(service, application) as (ours, theirs):
        speaker, listener = (ours, theirs) if who == "client" else (theirs, ours)

        def speak() -> None:
            speaker.sock.settimeout(30)
            speaker.send(data)
            speaker.end()

        speaking = threading.Thread(target=speak, daemon=True)
        speaking.start()
        # The kernel's buffers and Gatehouse's are full by now, or will be in a moment.
        assert listener.take(1) == data[:1]
        assert counted(service) == (1, 1)
        rest = listener.rest()
        speaking.join(5)
        assert len(rest) == size - 1 and rest == data[1:]
        # The other direction is still open.
        listener.send(b"thanks")
        listener.end()
        assert speaker.rest() == b"thanks"


def test_a_client_that_ends_behind_bytes_that_wait_loses_none_of_them(
    service: Service, application: Application
) -> None:
    with tunnel(service, application) as (ours, _):
        most = fill(ours)
    # How much waits where is the kernel's choice: at some of these, the end of what the client
    # says is with Gatehouse, which does not read on because the application does not.
    for share in range(1, 17):
        with tunnel(service, application) as (ours, theirs):
            sending = threading.Thread(target=ours.send, args=(bytes(most * share // 16),))
            sending.start()
            sending.join(0.2)
            if sending.is_alive():
                theirs.take(1)
            else:
                ours.end()
                wait_for(lambda: counted(service) == (1, 1), 3, "the one before to be over")
                assert len(theirs.rest()) == most * share // 16
                theirs.send(b"thanks")
                theirs.close()
                assert ours.rest() == b"thanks"
                continue
            theirs.reset()
            sending.join(5)
            break
    assert share > 4, "the client was made to wait for less than that"


def fill(side: Side, seconds: float = 0.5) -> int:
    """Send until the other side has taken nothing for so long; returns how many bytes are sent."""
    sent = 0
    piece = frame(bytes(65536))
    side.sock.settimeout(seconds)
    with contextlib.suppress(TimeoutError):
        while sent < 64 * MIB:
            sent += side.sock.send(piece[sent % len(piece) :])
    side.sock.settimeout(10)
    return sent


@pytest.mark.parametrize("how", ["reset", "close"])
@pytest.mark.parametrize("who", ["client", "application"])
def test_a_tunnel_whose_other_side_has_gone_is_over(
    service: Service, application: Application, who: str, how: str
) -> None:
    with tunnel(service, application) as (ours, theirs):
        leaving, staying = (ours, theirs) if who == "client" else (theirs, ours)
        getattr(leaving, how)()
        assert staying.gone(1)
        staying.close()
        assert freed(service)


@pytest.mark.parametrize("who", ["client", "application"])
def test_a_side_that_resets_after_it_had_ended_is_gone(
    service: Service, application: Application, who: str
) -> None:
    with tunnel(service, application) as (ours, theirs):
        leaving, staying = (ours, theirs) if who == "client" else (theirs, ours)
        leaving.end()
        assert staying.rest() == b""
        leaving.reset()
        assert staying.gone(1)
        assert freed(service)


@pytest.mark.parametrize("who", ["client", "application"])
def test_a_side_that_goes_while_bytes_wait_for_it_is_gone(
    service: Service, application: Application, who: str
) -> None:
    with tunnel(service, application) as (ours, theirs):
        leaving, staying = (ours, theirs) if who == "client" else (theirs, ours)
        assert fill(staying) > 65536
        leaving.close()  # With bytes that it has not read: its kernel resets the connection.
        assert staying.gone(1)
        assert freed(service)


PROGRAM = """
import socket, sys, threading
port, asking, agreed = int(sys.argv[1]), *(bytes.fromhex(text) for text in sys.argv[2:])
if asking:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(asking)
else:
    listener = socket.create_server(("127.0.0.1", port))
    print(flush=True)
    sock = listener.accept()[0]
while b"\\r\\n\\r\\n" not in sock.recv(65536):
    pass
sock.sendall(agreed)
print(flush=True)
threading.Event().wait()
"""


def process(port: int, asking: bytes, agreed: bytes) -> subprocess.Popen[bytes]:
    """A client, or where it asks nothing an application, in a process of its own."""
    arguments = [sys.executable, "-c", PROGRAM, str(port), asking.hex(), agreed.hex()]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE)


def test_a_killed_client_frees_the_application(service: Service, application: Application) -> None:
    client = process(service.port, asking(), b"hello")
    try:
        theirs, _ = application.next()
        assert theirs.take(5) == b"hello"
    finally:
        client.kill()
        client.wait()
    assert theirs.gone(1)
    theirs.close()
    assert freed(service)


def test_a_killed_application_frees_the_client(start: Callable[..., Service]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        port = placeholder.getsockname()[1]
    application = process(port, b"", AGREED + b"hello")
    try:
        assert application.stdout is not None and application.stdout.readline()
        service = start(UPSTREAM_URL=f"http://127.0.0.1:{port}")
        with service.client() as raw:
            raw.send(asking())
            raw.head()
            ours = Side(raw.sock, raw.buffer)
            assert ours.take(5) == b"hello"
            application.kill()
            assert ours.gone(1)
        assert freed(service)
    finally:
        application.kill()
        application.wait()


# What a tunnel costs, and what is said of it.


def test_a_tunnel_is_counted_until_it_ends_and_then_has_its_line_in_the_log(
    start: Callable[..., Service], application: Application
) -> None:
    service = start(UPSTREAM_URL=application.url)
    began = time.monotonic()
    with tunnel(service, application) as (ours, theirs):
        with tunnel(service, application):
            assert counted(service) == (2, 2)
        wait_for(lambda: counted(service) == (1, 1), 3, "one tunnel to be over")
        theirs.send(b"x" * 100_000)
        assert len(ours.take(100_000)) == 100_000
        ours.send(b"y" * 1000)
        assert len(theirs.take(1000)) == 1000
        lines = [line for line in service.access_log if line["target"] == "/chat"]
        assert len(lines) == 1, "the other's line is there, this one's is not before its end"
        ended = time.monotonic()
    line = wait_for(
        lambda: [line for line in service.access_log if line["target"] == "/chat"][1:], 3
    )[0]
    assert line["status"] == 101 and line["bytes"] == 100_000 and line["method"] == "GET"
    assert (ended - began) * 1000 - 500 < line["ms"] < (time.monotonic() - began) * 1000
    assert freed(service)


def test_a_tunnel_has_a_place_until_it_ends(
    start: Callable[..., Service], application: Application
) -> None:
    service = start(UPSTREAM_URL=application.url, UPSTREAM_MAX_IN_FLIGHT=2, WORKERS=1)
    with tunnel(service, application), tunnel(service, application):
        problem(service.exchange(asking()), 503, "upstream-busy")
        problem(service.exchange(request()), 503, "upstream-busy")
    assert freed(service)
    with tunnel(service, application):
        assert service.exchange(request()).status == 200


def test_200_tunnels_leave_no_descriptor_and_no_thread_behind(
    one_worker: Service, application: Application
) -> None:
    process = psutil.Process(one_worker.process.pid)
    with tunnel(one_worker, application):
        pass
    assert freed(one_worker)
    descriptors, threads = process.num_fds(), process.num_threads()
    for number in range(200):
        with tunnel(one_worker, application) as (ours, theirs):
            leaving, staying = (ours, theirs) if number % 2 else (theirs, ours)
            (leaving.reset if number % 3 else leaving.close)()
            assert staying.gone(2)
    assert freed(one_worker)
    wait_for(lambda: process.num_fds() <= descriptors + 1, 3, "the descriptors to be closed")
    # What made the connections ends when it has nothing to do.
    wait_for(lambda: process.num_threads() <= threads + 1, 12, "as many threads as before")


def test_open_tunnels_hold_no_thread_and_disturb_nobody(
    one_worker: Service, application: Application
) -> None:
    threads = psutil.Process(one_worker.process.pid).num_threads()
    with contextlib.ExitStack() as stack:
        open_ones = [stack.enter_context(tunnel(one_worker, application)) for _ in range(150)]
        assert psutil.Process(one_worker.process.pid).num_threads() <= threads + 16
        assert one_worker.exchange(request()).body == b"ok"
        for number, (ours, theirs) in enumerate(open_ones):
            ours.send(b"%d" % number)
            assert theirs.take(len(str(number))) == b"%d" % number
    assert freed(one_worker)


@pytest.mark.parametrize("who", ["client", "application"])
def test_tunnels_to_a_side_that_never_reads_cost_their_buffers_only(
    start: Callable[..., Service], application: Application, who: str
) -> None:
    service = start(UPSTREAM_URL=application.url, WORKERS=1)
    process = psutil.Process(service.process.pid)
    with contextlib.ExitStack() as stack:
        open_ones = [stack.enter_context(tunnel(service, application)) for _ in range(10)]
        before = process.memory_info().rss
        sent: list[int] = []
        speakers = [
            threading.Thread(target=lambda side=side: sent.append(fill(side, 1.0)), daemon=True)
            for side in (pair[0 if who == "application" else 1] for pair in open_ones)
        ]
        for speaker in speakers:
            speaker.start()
        for speaker in speakers:
            speaker.join(50)
        assert len(sent) == 10 and max(sent) < 64 * MIB, "nobody was made to wait"
        # Each may have 256 KiB and one read more, twice over where a piece of it is being cut.
        assert process.memory_info().rss - before < 10 * MIB
        assert service.exchange(request()).body == b"ok"
        # They still work: all that was sent arrives when it is read.
        ours, theirs = open_ones[0]
        reader = ours if who == "client" else theirs
        speaker_side = theirs if who == "client" else ours
        speaker_side.end()
        assert len(reader.rest()) in sent


def test_silence_in_both_directions_ends_a_tunnel_and_nothing_else_does(
    start: Callable[..., Service], application: Application
) -> None:
    service = start(UPSTREAM_URL=application.url, UPSTREAM_STREAM_TIMEOUT=1)
    silent = threading.Event()
    with contextlib.ExitStack() as stack:
        quiet, quiet_application = stack.enter_context(tunnel(service, application))
        talking = [stack.enter_context(tunnel(service, application)) for _ in range(2)]
        began = time.monotonic()
        while time.monotonic() - began < 2.5:
            silent.wait(0.25)
            talking[0][0].send(b"x")  # from the client only
            assert talking[0][1].take(1) == b"x"
            talking[1][1].send(b"y")  # from the application only
            assert talking[1][0].take(1) == b"y"
        assert quiet.gone(0.1) and quiet_application.gone(0.1)
        assert service.log.count(" cut: nothing came from either side for 1 s request_id=") == 1
        for ours, theirs in talking:
            assert ours.gone(3) and theirs.gone(3)
        assert 3.0 < time.monotonic() - began < 6.0
    assert freed(service)


def test_a_tunnel_does_not_know_the_timeouts_of_answers(
    start: Callable[..., Service], application: Application
) -> None:
    service = start(UPSTREAM_URL=application.url, UPSTREAM_READ_TIMEOUT=0.5, KEEPALIVE_TIMEOUT=1)
    with tunnel(service, application) as (ours, theirs):
        assert not ours.gone(2)
        theirs.send(b"still here")
        ours.sock.settimeout(5)
        assert ours.take(10) == b"still here"


# A library on both ends.


def echo(connection: ServerConnection) -> None:
    for received in connection:
        connection.send(received)


@contextlib.contextmanager
def library_server(
    handler: Callable[[ServerConnection], None], **options: Any
) -> Iterator[WebSocketServer]:
    with serve(handler, "127.0.0.1", 0, max_size=None, **options) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(5)


def url_of(server: WebSocketServer) -> str:
    return f"http://127.0.0.1:{server.socket.getsockname()[1]}"


def library_client(service: Service, **options: Any) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{service.port}/chat", max_size=None, proxy=None, **options)


@pytest.fixture(scope="module")
def echoing() -> Iterator[Service]:
    with library_server(echo) as server, Service(UPSTREAM_URL=url_of(server)) as service:
        yield service


MESSAGES: dict[str, Any] = {
    "empty text": "",
    "text": "grüße \N{SNOWMAN} \U0001f600",
    "empty binary": b"",
    "binary": bytes(range(256)),
    "64 KiB": os.urandom(65536),
    "64 KiB of text": "ab" * 32768,
    "1 MiB": os.urandom(MIB),
    "1 MiB of text": "ü" * (MIB // 2),
}


@pytest.mark.parametrize("compression", ["deflate", None])
@pytest.mark.parametrize("sent", MESSAGES.values(), ids=MESSAGES)
def test_messages_come_back_as_they_were_sent(
    echoing: Service, sent: Any, compression: Any
) -> None:
    with library_client(echoing, compression=compression) as client:
        names = [extension.name for extension in client.protocol.extensions]
        assert names == (["permessage-deflate"] if compression else [])
        for _ in range(3):
            client.send(sent)
            assert client.recv(timeout=10) == sent
    assert client.close_code == 1000


def test_a_fragmented_message_comes_back_whole(echoing: Service) -> None:
    with library_client(echoing) as client:
        client.send(f"part {number} " for number in range(100))
        assert client.recv(timeout=10) == "".join(f"part {number} " for number in range(100))


def test_many_messages_come_back_in_their_order(echoing: Service) -> None:
    with library_client(echoing) as client:
        for number in range(500):
            client.send(str(number))
        assert [client.recv(timeout=10) for _ in range(500)] == [str(n) for n in range(500)]


def test_pings_and_pongs_pass_both_ways(start: Callable[..., Service]) -> None:
    answered = threading.Event()

    def handler(connection: ServerConnection) -> None:
        answered.wait(0) or connection.ping().wait(5) and answered.set()
        echo(connection)

    with library_server(handler) as server:
        service = start(UPSTREAM_URL=url_of(server))
        with library_client(service) as client:
            assert client.ping(b"payload").wait(5)
            assert answered.wait(5)
            client.pong(b"unasked")
            client.send("on")
            assert client.recv(timeout=5) == "on"


def test_a_close_of_either_side_reaches_the_other_with_its_code_and_reason(
    start: Callable[..., Service],
) -> None:
    seen: queue.Queue[Any] = queue.Queue()

    def handler(connection: ServerConnection) -> None:
        try:
            if connection.recv() == "close":
                connection.close(4001, "as you wish")
            connection.recv()
        except websockets.exceptions.ConnectionClosed as closed:
            seen.put(closed.rcvd)

    with library_server(handler) as server:
        service = start(UPSTREAM_URL=url_of(server))
        with library_client(service) as client:
            client.send("close")
            with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
                client.recv(timeout=5)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4001, "as you wish")
        assert seen.get(timeout=5).code == 4001  # The client's answer to it.
        with library_client(service) as client:
            client.send("stay")
            client.close(4002, "enough")
        received = seen.get(timeout=5)
        assert (received.code, received.reason) == (4002, "enough")
        assert freed(service)


def test_a_subprotocol_is_agreed_upon(start: Callable[..., Service]) -> None:
    with library_server(echo, subprotocols=["graphql-ws", "mqtt"]) as server:
        service = start(UPSTREAM_URL=url_of(server))
        with library_client(service, subprotocols=["mqtt", "other"]) as client:
            assert client.subprotocol == "mqtt"


def test_an_application_that_checks_the_origin_lets_a_page_in(
    start: Callable[..., Service],
) -> None:
    with library_server(echo, origins=["http://page.example"]) as server:
        service = start(UPSTREAM_URL=url_of(server))
        with library_client(service, origin="http://page.example") as client:
            client.send("in")
            assert client.recv(timeout=5) == "in"
        with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
            library_client(service, origin="http://evil.example")
        assert refused.value.response.status_code == 403


# The service stops.


def stop_in_order(service: Service) -> None:
    """The service exits with 0, and soon."""
    began = time.monotonic()
    assert service.process.wait(10) == 0, service.log
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("workers", [1, 2])
def test_at_sigterm_a_library_on_either_side_sees_an_orderly_close(
    start: Callable[..., Service], workers: int
) -> None:
    seen: queue.Queue[Any] = queue.Queue()

    def handler(connection: ServerConnection) -> None:
        try:
            echo(connection)
            connection.recv()
        except websockets.exceptions.ConnectionClosed as closed:
            seen.put(closed)

    with library_server(handler) as server:
        service = start(UPSTREAM_URL=url_of(server), WORKERS=workers)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(library_client(service)) for _ in range(6)]
            for client in clients:
                client.send("hello")
                assert client.recv(timeout=5) == "hello"
            service.process.send_signal(signal.SIGTERM)
            for client in clients:
                with pytest.raises(websockets.exceptions.ConnectionClosedOK) as closed:
                    client.recv(timeout=5)
                assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
            for _ in clients:
                ended = seen.get(timeout=5)
                assert isinstance(ended, websockets.exceptions.ConnectionClosedOK), ended
                assert ended.rcvd is not None and ended.rcvd.code == 1001
        stop_in_order(service)


def unmasked(data: bytes) -> bytes:
    """A small masked frame without its mask."""
    assert data[1] & 0x80 and len(data) == 6 + (data[1] & 0x7F)
    payload = bytes(byte ^ data[2 + at % 4] for at, byte in enumerate(data[6:]))
    return bytes((data[0], data[1] & 0x7F)) + payload


def test_at_sigterm_both_ends_get_a_close_frame_and_then_the_end(
    start: Callable[..., Service], application: Application
) -> None:
    service = start(UPSTREAM_URL=application.url)
    with tunnel(service, application) as (ours, theirs):
        ours.send(frame(b"hello", mask=MASK))
        theirs.send(frame(b"hello"))
        assert len(theirs.take(11)) == 11 and len(ours.take(7)) == 7
        service.process.send_signal(signal.SIGTERM)
        assert ours.take(4) == GOING_AWAY
        assert unmasked(theirs.take(8)) == GOING_AWAY
        # Neither answers, and the service does not wait for ever.
        assert ours.rest() == b"" and theirs.rest() == b""
        stop_in_order(service)
    [line] = [line for line in service.access_log if line["target"] == "/chat"]
    assert line["status"] == 101


@pytest.mark.parametrize("size", [5, 300, 70_000])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_at_sigterm_a_frame_of_the_client_that_has_begun_is_let_through(
    start: Callable[..., Service], application: Application, size: int, share: float
) -> None:
    service = start(UPSTREAM_URL=application.url)
    begun = frame(b"z" * size, mask=MASK)
    at = 1 + int(share * (len(begun) - 2))
    with tunnel(service, application) as (ours, theirs):
        ours.send(begun[:at])
        assert theirs.take(at) == begun[:at]
        service.process.send_signal(signal.SIGTERM)
        assert ours.take(4) == GOING_AWAY  # Towards the client nothing had begun.
        ours.send(begun[at:] + frame(b"another", mask=MASK))
        assert theirs.take(len(begun) - at) == begun[at:]
        assert unmasked(theirs.take(8)) == GOING_AWAY
        ours.close()
        theirs.close()
        stop_in_order(service)


@pytest.mark.parametrize("size", [5, 300, 70_000, 2 * MIB])
def test_at_sigterm_a_frame_of_the_application_that_has_begun_is_let_through(
    start: Callable[..., Service], application: Application, size: int
) -> None:
    service = start(UPSTREAM_URL=application.url)
    begun = frame(b"z" * size)
    at = len(begun) // 3
    with tunnel(service, application) as (ours, theirs):
        theirs.send(begun[:at])
        assert ours.take(at) == begun[:at]
        service.process.send_signal(signal.SIGTERM)
        assert unmasked(theirs.take(8)) == GOING_AWAY
        sender = threading.Thread(
            target=theirs.send, args=(begun[at:] + frame(b"another"),), daemon=True
        )
        sender.start()
        assert ours.take(len(begun) - at) == begun[at:]
        assert ours.take(4) == GOING_AWAY
        assert ours.rest() == b""
        sender.join(5)
        ours.close()
        theirs.close()
        stop_in_order(service)


def test_at_sigterm_a_close_may_stand_between_two_fragments_of_a_message(
    start: Callable[..., Service], application: Application
) -> None:
    service = start(UPSTREAM_URL=application.url)
    with tunnel(service, application) as (ours, theirs):
        first, last = frame(b"part ", first=0x01), frame(b"whole", first=0x80)
        theirs.send(first + last[:1])
        ours.send(frame(b"part ", first=0x01, mask=MASK))
        assert ours.take(len(first) + 1) == first + last[:1]
        assert len(theirs.take(11)) == 11
        service.process.send_signal(signal.SIGTERM)
        assert unmasked(theirs.take(8)) == GOING_AWAY
        theirs.send(last[1:])
        assert ours.take(len(last) - 1) == last[1:]
        assert ours.take(4) == GOING_AWAY
        ours.close()
        theirs.close()
        stop_in_order(service)


@pytest.mark.parametrize("who", ["client", "application"])
def test_at_sigterm_a_side_that_ends_in_the_middle_of_its_frame_keeps_nobody_waiting(
    start: Callable[..., Service], application: Application, who: str
) -> None:
    service = start(UPSTREAM_URL=application.url)
    with tunnel(service, application) as (ours, theirs):
        speaker, listener = (ours, theirs) if who == "client" else (theirs, ours)
        speaker.send(b"\x82")
        assert listener.take(1) == b"\x82"
        service.process.send_signal(signal.SIGTERM)
        assert speaker.take(4 if who == "client" else 8)
        speaker.end()
        assert listener.rest() == b""
        stop_in_order(service)


def test_at_sigterm_a_half_closed_tunnel_ends(
    start: Callable[..., Service], application: Application
) -> None:
    service = start(UPSTREAM_URL=application.url)
    with tunnel(service, application) as (ours, theirs), tunnel(service, application) as others:
        ours.end()
        assert theirs.rest() == b""
        others[1].end()
        assert others[0].rest() == b""
        service.process.send_signal(signal.SIGTERM)
        assert ours.rest() == GOING_AWAY
        assert unmasked(others[1].rest()) == GOING_AWAY
        stop_in_order(service)


def test_at_sigterm_bytes_that_wait_for_a_slow_client_come_before_its_close(
    start: Callable[..., Service], application: Application
) -> None:
    service = start(UPSTREAM_URL=application.url)
    with tunnel(service, application) as (ours, theirs):
        fill(theirs)
        service.process.send_signal(signal.SIGTERM)
        unmasked(theirs.take(8))
        received = b""
        pause = threading.Event()
        # For longer than both sides are given to say goodbye, but always reading.
        while data := ours.sock.recv(MIB // 2):
            received += data
            pause.wait(0.2)
        assert received.endswith(GOING_AWAY)
        frames, rest = divmod(len(received) - 4, len(frame(bytes(65536))))
        assert frames > 4 and rest == 0
        stop_in_order(service)


def test_a_tunnel_that_is_agreed_upon_while_the_service_stops_ends_at_once(
    start: Callable[..., Service], application: Application
) -> None:
    service = start(UPSTREAM_URL=application.url)
    application.agreed = b""
    with service.client() as raw:
        raw.send(asking())
        theirs, _ = application.next()
        service.process.send_signal(signal.SIGTERM)
        wait_for(lambda: refuses(service.port), 5, "the service to let nobody in")
        theirs.send(AGREED)
        assert raw.head().startswith(b"HTTP/1.1 101 ")
        ours = Side(raw.sock, raw.buffer)
        assert ours.take(4) == GOING_AWAY
        assert unmasked(theirs.take(8)) == GOING_AWAY
        stop_in_order(service)
        theirs.close()


def test_at_sigterm_a_second_close_does_not_disturb_a_closing_that_is_under_way(
    start: Callable[..., Service], application: Application
) -> None:
    service = start(UPSTREAM_URL=application.url)
    close = frame(struct.pack("!H", 1000), first=0x88)
    with tunnel(service, application) as (ours, theirs):
        theirs.send(close)
        assert ours.take(4) == close
        service.process.send_signal(signal.SIGTERM)
        assert ours.rest() in (b"", GOING_AWAY)
        ours.close()
        theirs.close()
        stop_in_order(service)


# TLS towards the application.


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def tls_running(authority: trustme.CA) -> Iterator[Application]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    server = Application(tls=context)
    yield server
    server.close()


@pytest.fixture(scope="module")
def bundle(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "authority.pem"
    authority.cert_pem.write_to_path(path)
    return path


@pytest.fixture(scope="module")
def tls_service(tls_running: Application, bundle: Path) -> Iterator[Service]:
    with Service(UPSTREAM_URL=tls_running.url, REQUESTS_CA_BUNDLE=bundle) as service:
        yield service


@pytest.mark.parametrize("size", [1, 16_385, 65_536, 4 * MIB])
def test_bytes_pass_both_ways_over_tls(
    tls_service: Service, tls_running: Application, size: int
) -> None:
    there, back = os.urandom(size), os.urandom(size)
    with tunnel(tls_service, tls_running, behind=b"behind") as (ours, theirs):
        assert theirs.take(6) == b"behind"
        # One at a time: the test's own TLS object cannot be used by two threads at once.
        sender = threading.Thread(target=ours.send, args=(there,), daemon=True)
        sender.start()
        assert theirs.take(size) == there
        sender.join(5)
        sender = threading.Thread(target=theirs.send, args=(back,), daemon=True)
        sender.start()
        assert ours.take(size) == back
        sender.join(5)
    assert freed(tls_service)


def test_an_application_over_tls_is_told_that_the_client_has_ended(
    tls_service: Service, tls_running: Application
) -> None:
    with tunnel(tls_service, tls_running) as (ours, theirs):
        theirs.send(b"before")
        ours.send(b"last")
        ours.end()
        assert theirs.rest() == b"last"
        theirs.close()
        assert ours.rest() == b"before"
    assert freed(tls_service)


@pytest.mark.parametrize("orderly", [True, False])
def test_what_an_application_said_over_tls_before_it_ended_reaches_a_slow_client(
    tls_service: Service, tls_running: Application, orderly: bool
) -> None:
    size = 24 * MIB
    with tunnel(tls_service, tls_running) as (ours, theirs):
        assert isinstance(theirs.sock, ssl.SSLSocket)

        def speak() -> None:
            theirs.sock.settimeout(30)
            theirs.send(bytes(size))
            if orderly:
                theirs.sock.settimeout(0.1)  # It says its end, and does not wait for the other's.
                with contextlib.suppress(OSError):
                    theirs.sock.unwrap()  # type: ignore[attr-defined]
            theirs.close()

        speaking = threading.Thread(target=speak, daemon=True)
        speaking.start()
        assert ours.take(1) == b"\0"
        assert counted(tls_service) == (1, 1)
        assert len(ours.rest()) == size - 1
        speaking.join(5)
    assert freed(tls_service)


def test_at_sigterm_an_application_over_tls_gets_a_close_frame_too(
    start: Callable[..., Service], tls_running: Application, bundle: Path
) -> None:
    service = start(UPSTREAM_URL=tls_running.url, REQUESTS_CA_BUNDLE=bundle)
    with tunnel(service, tls_running) as (ours, theirs):
        service.process.send_signal(signal.SIGTERM)
        assert ours.take(4) == GOING_AWAY
        assert unmasked(theirs.take(8)) == GOING_AWAY
        ours.close()
        theirs.close()
        stop_in_order(service)
