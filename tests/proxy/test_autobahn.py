"""The cases of the Autobahn test suite, sections 1 to 7 and 9, told as bytes: each comes to the same
through Gatehouse as without it, byte for byte and to the same end.

The suite itself does not run on the Pythons that Gatehouse runs on; its cases are numbered here as
there. The application is the `wsproto` library, whose events come in the order of the bytes: what it
answers does not depend on how these arrived.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Message, Ping, Request

from tests.harness import RawClient, Service, message

KIB, MIB = 1 << 10, 1 << 20
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
HANDSHAKE = message(
    b"GET / HTTP/1.1",
    b"Host: a",
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    b"Sec-WebSocket-Version: 13",
)
MASK = b"\x37\xfa\x21\x3d"


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0) -> bytes:
    """A client's frame."""
    first, size = (0x80 if fin else 0) | rsv << 4 | opcode, len(payload)
    if size < 126:
        head = bytes((first, 0x80 | size))
    elif size < 65536:
        head = bytes((first, 0x80 | 126)) + struct.pack("!H", size)
    else:
        head = bytes((first, 0x80 | 127)) + struct.pack("!Q", size)
    key = int.from_bytes(MASK * (size // 4 + 1), "big") >> 8 * (4 - size % 4)
    hidden = (int.from_bytes(payload, "big") ^ key).to_bytes(size, "big")
    return head + MASK + hidden


def close(code: int | None = 1000, reason: bytes = b"") -> bytes:
    return frame(CLOSE, b"" if code is None else struct.pack("!H", code) + reason)


def chopped(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def fragments(opcode: int, *payloads: bytes) -> list[bytes]:
    """A message in as many frames as there are payloads."""
    last = len(payloads) - 1
    return [frame(0 if at else opcode, one, fin=at == last) for at, one in enumerate(payloads)]


# What is sent, piece by piece, and the code of the Close that comes back (None where it has none).
Case = tuple[list[bytes], int | None]
CASES: dict[str, Case] = {}


def case(number: str, *pieces: bytes, code: int | None = 1000, last: bytes | None = None) -> None:
    CASES[number] = ([*pieces, close() if last is None else last], code)


# 1: framing.
for section, opcode in ((1, TEXT), (2, BINARY)):
    for at, size in enumerate((0, 125, 126, 127, 128, 65535, 65536), 1):
        case(f"1.{section}.{at}", frame(opcode, b"*" * size))
    case(f"1.{section}.8", *chopped(frame(opcode, b"*" * 65536), 997))

# 2: pings and pongs.
case("2.1", frame(PING))
case("2.2", frame(PING, b"Hello, world!"))
case("2.3", frame(PING, b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff"))
case("2.4", frame(PING, b"\xfe" * 125))
case("2.5", frame(PING, b"\xfe" * 126), code=1002)
case("2.6", *chopped(frame(PING, b"\xfe" * 125), 1))
case("2.7", frame(PONG))
case("2.8", frame(PONG, b"unsolicited pong payload"))
case("2.9", frame(PONG, b"unsolicited pong payload"), frame(PING, b"ping payload"))
case("2.10", *[frame(PING, b"payload-%d" % number) for number in range(10)])
case("2.11", *[part for n in range(10) for part in chopped(frame(PING, b"payload-%d" % n), 1)])

# 3: reserved bits.
case("3.1", frame(TEXT, b"Hello, world!", rsv=1), code=1002)
case("3.2", frame(TEXT, b"Hello, world!"), frame(TEXT, b"Hello, world!", rsv=2), frame(PING), code=1002)  # fmt: skip
case("3.3", frame(TEXT, b"Hello, world!") + frame(TEXT, b"Hello, world!", rsv=3) + frame(PING), code=1002)  # fmt: skip
case("3.4", *chopped(frame(TEXT, b"Hello, world!") + frame(TEXT, b"Hello, world!", rsv=4) + frame(PING), 1), code=1002)  # fmt: skip
case("3.5", frame(BINARY, b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff", rsv=5), code=1002)
case("3.6", frame(PING, b"Hello, world!", rsv=6), code=1002)
case("3.7", frame(CLOSE, rsv=7), code=1002)

# 4: reserved opcodes.
for section, reserved in ((1, range(3, 8)), (2, range(11, 16))):
    for at, opcode in enumerate(reserved, 1):
        before = frame(TEXT, b"Hello, world!") if at > 2 else b""
        pieces = before + frame(opcode, b"" if at in (1, 3) else b"reserved") + frame(PING)
        case(f"4.{section}.{at}", *(chopped(pieces, 1) if at > 3 else [pieces]), code=1002)

# 5: fragments.
case("5.1", *fragments(PING, b"fragment1", b"fragment2"), code=1002)
case("5.2", *fragments(PONG, b"fragment1", b"fragment2"), code=1002)
case("5.3", *fragments(TEXT, b"fragment1", b"fragment2"))
case("5.4", b"".join(fragments(TEXT, b"fragment1", b"fragment2")))
case("5.5", *chopped(b"".join(fragments(TEXT, b"fragment1", b"fragment2")), 1))
first, second = fragments(TEXT, b"fragment1", b"fragment2")
case("5.6", first, frame(PING, b"ping payload"), second)
case("5.7", first + frame(PING, b"ping payload") + second)
case("5.8", *chopped(first + frame(PING, b"ping payload") + second, 1))
for number, fin in (("5.9", True), ("5.12", False)):
    start = int(number[2:])
    stray = frame(0, b"non-continuation payload", fin=fin) + frame(TEXT, b"Hello, world!")
    case(f"5.{start}", stray[:30], stray[30:], code=1002)
    case(f"5.{start + 1}", stray, code=1002)
    case(f"5.{start + 2}", *chopped(stray, 1), code=1002)
case("5.15", first + second + frame(0, b"fragment3", fin=False) + frame(TEXT, b"fragment4"), code=1002)  # fmt: skip
case("5.16", frame(0, b"fragment1", fin=False), frame(TEXT, b"fragment2", fin=False), frame(0, b"fragment3"), code=1002)  # fmt: skip
case("5.17", frame(0, b"fragment1"), frame(TEXT, b"fragment2", fin=False), frame(0, b"fragment3"), code=1002)  # fmt: skip
case("5.18", frame(TEXT, b"fragment1", fin=False), frame(TEXT, b"fragment2"), code=1002)
five = fragments(TEXT, b"fragment1", b"fragment2", b"fragment3", b"fragment4", b"fragment5")
pinged = [*five[:2], frame(PING, b"pongme 1!"), *five[2:4], frame(PING, b"pongme 2!"), five[4]]
case("5.19", *pinged)
case("5.20", b"".join(pinged))

# 6: UTF-8.
GREEK = "Hello-µ@ßöäüàá-UTF-8!!".encode()
BROKEN = b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80\x65\x64\x69\x74\x65\x64"
case("6.1.1", frame(TEXT))
case("6.1.2", *fragments(TEXT, b"", b"", b""))
case("6.1.3", *fragments(TEXT, b"", b"middle frame payload", b""))
case("6.2.1", frame(TEXT, GREEK))
case("6.2.2", *fragments(TEXT, GREEK[:12], GREEK[12:]))
case("6.2.3", *fragments(TEXT, *(chopped(GREEK, 1))))
case("6.2.4", *fragments(TEXT, *(chopped("κόσμε".encode(), 1))))
case("6.3.1", frame(TEXT, BROKEN), code=1007)
case("6.3.2", *fragments(TEXT, *(chopped(BROKEN, 1))), code=1007)
case("6.4.1", *fragments(TEXT, BROKEN[:11], BROKEN[11:13], BROKEN[13:]), code=1007)
case("6.4.2", *fragments(TEXT, BROKEN[:12], BROKEN[12:13], BROKEN[13:]), code=1007)
case("6.4.3", *chopped(frame(TEXT, BROKEN), 19), code=1007)
case("6.4.4", *chopped(frame(TEXT, BROKEN), 20), code=1007)
VALID = [
    "κόσμε", "\0", "\x7f", "\x80", "\u07ff", "\u0800", "\uffff", "\U00010000", "\U0010ffff",
    "\ud7ff", "\ue000", "\ufffd", "\ufffe", "\ufdd0", "\U0001fffe", "\U0010fffe",
]  # fmt: skip
for at, text in enumerate(VALID, 1):
    case(f"6.5.{at} and the like", frame(TEXT, text.encode()))
INVALID = [
    b"\xce", b"\xce\xba\xe1", b"\xce\xba\xe1\xbd", b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80",
    b"\xf7\xbf\xbf\xbf", b"\xfb\xbf\xbf\xbf\xbf", b"\xf4\x90\x80\x80", b"\x80", b"\xbf", b"\x80\xbf",
    b"\x80\xbf\x80\xbf\x80\xbf\x80", bytes(range(0x80, 0xC0)), b" ".join(bytes([n]) for n in range(0xC0, 0xE0)),
    b" ".join(bytes([n]) for n in range(0xE0, 0xF0)), b"\xc0", b"\xe0\x80", b"\xf0\x80\x80", b"\xdf",
    b"\xef\xbf", b"\xfe", b"\xff", b"\xfe\xfe\xff\xff", b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf",
    b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf", b"\xc0\x80", b"\xed\xa0\x80", b"\xed\xad\xbf",
    b"\xed\xae\x80", b"\xed\xbf\xbf", b"\xed\xa0\x80\xed\xb0\x80", b"\xed\xaf\xbf\xed\xbf\xbf",
]  # fmt: skip
for at, data in enumerate(INVALID, 1):
    case(f"6.6 to 6.23, {at}", frame(TEXT, data), code=1007)

# 7: closing.
case("7.1.1", frame(TEXT, b"Hello World!"))
case("7.1.2", close())
case("7.1.3", close(), frame(PING))
case("7.1.4", close(), frame(TEXT, b"Hello World!"))
case("7.1.5", frame(TEXT, b"fragment1", fin=False), close(), frame(0, b"fragment2"))
case(
    "7.1.6", frame(TEXT, b"BAsd7&jh23" * 25_600), frame(TEXT, b"Hello World!"), close(), frame(PING)
)
case("7.3.1", last=close(None), code=None)
case("7.3.2", last=frame(CLOSE, b"a"), code=1002)
case("7.3.3", last=close())
case("7.3.4", last=close(1000, b"Hello World!"))
case("7.3.5", last=close(1000, b"*" * 123))
case("7.3.6", last=close(1000, b"*" * 124), code=1002)
case("7.5.1", last=close(1000, BROKEN), code=1007)
for at, number in enumerate((1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999), 1):  # fmt: skip
    case(f"7.7.{at}", last=close(number), code=number)
for at, number in enumerate((0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999), 1):
    case(f"7.9.{at}", last=close(number), code=1002)
case("7.13.1", last=close(5000), code=1002)
case("7.13.2", last=close(65535), code=1002)

# 9: limits.
for section, opcode in ((1, TEXT), (2, BINARY)):
    for at, size in enumerate((64 * KIB, 256 * KIB, MIB, 4 * MIB, 8 * MIB, 16 * MIB), 1):
        case(f"9.{section}.{at}", frame(opcode, b"*" * size))
for section, opcode in ((3, TEXT), (4, BINARY)):
    for at, size in enumerate((4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB), 1):
        case(f"9.{section}.{at}", *fragments(opcode, *chopped(b"*" * (4 * MIB), size)))
for section, opcode in ((5, TEXT), (6, BINARY)):
    for at, size in enumerate((64, 128, 256, 512, 1024, 2048), 1):
        case(f"9.{section}.{at}", *chopped(frame(opcode, b"*" * MIB), size * 8))
for section, opcode in ((7, TEXT), (8, BINARY)):
    for at, size in enumerate((0, 16, 64, 256, 1024, 4096), 1):
        case(f"9.{section}.{at}", *[frame(opcode, b"*" * size)] * 1000)


class Echo:
    """An application that sends back each message, at the place in its order where it ended."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock = self.listener.accept()[0]
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        protocol = WSConnection(ConnectionType.SERVER)
        pieces: list[Any] = []
        ended = False
        with sock, contextlib.suppress(OSError):
            # To the end, also behind a Close: a socket that is closed with unread bytes is reset.
            while data := sock.recv(65536):
                if ended:
                    continue
                protocol.receive_data(data)
                for event in protocol.events():
                    if isinstance(event, Request):
                        sock.sendall(protocol.send(AcceptConnection()))
                    elif isinstance(event, Message):
                        pieces.append(event.data)
                        if event.message_finished:
                            whole = type(event.data)().join(pieces)
                            sock.sendall(protocol.send(type(event)(data=whole)))
                            pieces.clear()
                    elif isinstance(event, Ping):
                        sock.sendall(protocol.send(event.response()))
                    elif isinstance(event, CloseConnection):
                        sock.sendall(protocol.send(event.response()))
                        sock.shutdown(socket.SHUT_WR)
                        ended = True
                        break


def outcome(port: int, pieces: list[bytes]) -> bytes:
    """All that comes back over a WebSocket to this port, to its orderly end."""
    with RawClient(port, timeout=30) as client:
        client.send(HANDSHAKE)
        assert client.head().startswith(b"HTTP/1.1 101 ")
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def send() -> None:
            # The application may have ended before it has had all of it.
            with contextlib.suppress(OSError):
                for piece in pieces:
                    client.send(piece)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        received = [client.buffer]
        while data := client.sock.recv(MIB):
            received.append(data)
        sender.join(30)
        assert not sender.is_alive()
    return b"".join(received)


def last_close(received: bytes) -> int | None:
    """The code of the last frame, which has to be a Close."""
    at = code = 0
    while at < len(received):
        first, length = received[at], received[at + 1]
        at += 2
        if length >= 126:
            width = 2 if length == 126 else 8
            length = int.from_bytes(received[at : at + width], "big")
            at += width
        code = int.from_bytes(received[at : at + 2], "big") if length else -1
        at += length
    assert at == len(received) and first == 0x80 | CLOSE
    return None if code < 0 else code


PLACE = re.compile(rb"\x88.(\x03\xef'utf-8' codec [ -~]* in position )[0-9]+", re.DOTALL)


def placeless(received: bytes) -> bytes:
    """What has come, without the place of the fault in the reason of a Close, and without the
    length of that. The application counts from the beginning of what it has read at once, which
    TCP promises to nobody."""
    return PLACE.sub(lambda found: found[1], received)


@pytest.fixture(scope="module")
def application() -> Iterator[Echo]:
    echo = Echo()
    yield echo
    with contextlib.suppress(OSError):
        echo.listener.shutdown(socket.SHUT_RDWR)
    echo.listener.close()


@pytest.fixture(scope="module")
def service(application: Echo) -> Iterator[Service]:
    with Service(UPSTREAM_URL=f"http://127.0.0.1:{application.port}") as service:
        yield service


@pytest.mark.parametrize("number", CASES)
def test_a_case_comes_to_the_same_as_without_gatehouse(
    service: Service, application: Echo, number: str
) -> None:
    pieces, code = CASES[number]
    directly = outcome(application.port, pieces)
    assert last_close(directly) == code, directly[-200:]
    through = outcome(service.port, pieces)
    assert placeless(through) == placeless(directly), (through[-200:], directly[-200:])


def test_all_sections_are_here() -> None:
    sections = {number.split(".")[0] for number in CASES}
    assert sections == {"1", "2", "3", "4", "5", "6", "7", "9"}
