"""Requests that two readers may take for different ones, from the published classes of request smuggling.

A case is made for a path of its own, so that whoever has seen a request can be asked which case it was
of. The bytes that one reader takes for a body are a request, `…/smuggled`, for another.
"""

from __future__ import annotations

import contextlib
import functools
import random
import re
import socket
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import h11

from tests.harness.client import RawClient, Reply, chunked, message
from tests.harness.service import Service
from tests.harness.upstream import ScriptedUpstream, Seen

HOST = b"Host: h.example"
CHUNKED = b"Transfer-Encoding: chunked"

# Spellings of the coding that one reader obeys and another ignores.
CODINGS = [
    CHUNKED,
    b"transfer-encoding: CHUNKED",
    b"Transfer-Encoding : chunked",
    b"Transfer-Encoding\t: chunked",
    b" Transfer-Encoding: chunked",
    b"X: x\r\n\tTransfer-Encoding: chunked",
    b"X: x\nTransfer-Encoding: chunked",
    b"X: x\rTransfer-Encoding: chunked",
    b"X: x\r\n\r\x00Transfer-Encoding: chunked",
    b"Transfer-Encoding:\r\n chunked",
    b"Transfer-Encoding:\n chunked",
    b"Transfer-Encoding:\tchunked",
    b"Transfer-Encoding:\x0bchunked",
    b"Transfer-Encoding:\x0cchunked",
    b"Transfer-Encoding:\xa0chunked",
    b"Transfer-Encoding: \x00chunked",
    b"Transfer-Encoding: chunked\x00",
    b"Transfer-Encoding: chunked\x0b",
    b"Transfer-Encoding: chunked;q=1",
    b'Transfer-Encoding: "chunked"',
    b"Transfer-Encoding: 'chunked'",
    b"Transfer-Encoding: xchunked",
    b"Transfer-Encoding: chunkedx",
    b"Transfer-Encoding: chun\x00ked",
    b"Transfer-Encoding: identity",
    b"Transfer-Encoding: identity, chunked",
    b"Transfer-Encoding: chunked, identity",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: , chunked",
    b"Transfer-Encoding: chunked,",
    b"Transfer-Encoding: cow",
    b"Transfer-Encoding: ",
    b"Transfer-Encoding",
    b"Transfer-Encoding chunked",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: cow",
    b"Transfer-Encoding: cow\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    b"Transfer_Encoding: chunked",
    b"Transfer-Encoding\x00: chunked",
    b"\x00Transfer-Encoding: chunked",
    b"Tr\xc3\xa4nsfer-Encoding: chunked",
    b"Transfer\xadEncoding: chunked",
    b"Transfer-Encoding: chun\xc4\xb7ed",
    b"Foo: bar\r\n\rTransfer-Encoding: chunked",
    b"Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked",
    b"TE: chunked",
    b"Content-Encoding: chunked",
]
# Spellings of a length, of which %d is the true one.
LENGTHS = [
    b"Content-Length: %d",
    b"Content-Length : %d",
    b"Content-Length\t: %d",
    b" Content-Length: %d",
    b"Content-Length:\r\n %d",
    b"Content-Length: %d\x00",
    b"Content-Length: \x00%d",
    b"Content-Length: \x0b%d",
    b"Content-Length: +%d",
    b"Content-Length: -%d",
    b"Content-Length: 0%d",
    b"Content-Length: 0x%x",
    b"Content-Length: 0o%o",
    b"Content-Length: %d.0",
    b"Content-Length: %de0",
    b"Content-Length: %d,",
    b"Content-Length: ,%d",
    b"Content-Length: %d, %d",
    b"Content-Length: 0, %d",
    b"Content-Length: %d, 0",
    b"Content-Length: %d 0",
    b"Content-Length: 0 %d",
    b"Content-Length: 1_%d",
    b'Content-Length: "%d"',
    b"Content-Length: %d;x=y",
    b"Content-Length: 18446744073709551616%d",
    b"Content-Length: 18446744073709551616",
    b"Content-Length: \xd9\xa1",
    b"Content-Length: \xb2",
    b"Content-Length:",
    b"Content-Length",
    b"Content_Length: %d",
    b"Content-Length\x00: %d",
    b"Content-Length: %d\r\nContent-Length: %d",
    b"Content-Length: 0\r\nContent-Length: %d",
    b"Content-Length: %d\r\nContent-Length: 0",
    b"Content-Length: 0\r\nContent_Length: %d",
    b"X: x\nContent-Length: %d",
    b"X: x\rContent-Length: %d",
    b"Connection: Content-Length\r\nContent-Length: %d",
    b"Connection: close, Content-Length\r\nContent-Length: %d",
    b"Expect: 100-continue\r\nContent-Length: %d",
    b"Expect: x 100-continue\r\nContent-Length: %d",
    b"Expect: 100-continue, x\r\nContent-Length: %d",
    b"Expect: \r\nContent-Length: %d",
    b"Upgrade: websocket\r\nConnection: upgrade\r\nContent-Length: %d",
    b"Upgrade: websocket\r\nConnection: upgrade, Content-Length\r\nContent-Length: %d",
    b"Upgrade: h2c\r\nConnection: upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\nContent-Length: %d",
    b"X-HTTP-Method-Override: GET\r\nContent-Length: %d",
]
# What is sent as a chunked body; %b is a request for whoever reads it otherwise.
CHUNKS = [
    b"0\r\n\r\n%b",
    b"00000\r\n\r\n%b",
    b"0 \r\n\r\n%b",
    b"0\t;a=b\r\n\r\n%b",
    b"0;a=b\r\n\r\n%b",
    b'0;a="b\r\n\r\n%b',
    b"0;a=b\n\r\n%b",
    b"0;\x00\r\n\r\n%b",
    b"0;a\rb\r\n\r\n%b",
    b"0\n\r\n%b",
    b"0\r\n\n%b",
    b"0\n\n%b",
    b"0\r\r%b",
    b"0\r\n\r%b",
    b"0x0\r\n\r\n%b",
    b"+0\r\n\r\n%b",
    b"-0\r\n\r\n%b",
    b"-1\r\n\r\n%b",
    b"\r\n0\r\n\r\n%b",
    b"\n0\r\n\r\n%b",
    b" 0\r\n\r\n%b",
    b";\r\n\r\n%b",
    b"\r\n\r\n%b",
    b"0\r\nX: y\r\n\r\n%b",
    b"0\r\nContent-Length: 100\r\n\r\n%b",
    b"0\r\nTransfer-Encoding: chunked\r\n\r\n%b",
    b"0\r\nX: y\n\r\n%b",
    b"0\r\nX: y\n\n%b",
    b"0\r\n X: y\r\n\r\n%b",
    b"0\r\nX : y\r\n\r\n%b",
    b"0\r\n%b",
    b"0\r\nno field\r\n\r\n%b",
    b"2\r\nhi\r\n0\r\n\r\n%b",
    b"2\r\nhi0\r\n\r\n%b",
    b"2\r\nhi\n0\r\n\r\n%b",
    b"2\r\nhiXX0\r\n\r\n%b",
    b"2\r\nhi\r\r\n0\r\n\r\n%b",
    b"2\nhi\n0\n\n%b",
    b"2\r\nhixx\r\n0\r\n\r\n%b",
    b"1\r\nhi\r\n0\r\n\r\n%b",
    b"3\r\nhi\r\n0\r\n\r\n%b",
    b"2;\nxx\r\nhi\r\n0\r\n\r\n%b",
    b'2;a=b;c="d;e"\r\nhi\r\n0\r\n\r\n%b',
    b"2  ;a\r\nhi\r\n0\r\n\r\n%b",
    b"2;\r\nhi\r\n0\r\n\r\n%b",
    b"2 2\r\nhi\r\n0\r\n\r\n%b",
    b"1_0\r\nhi\r\n0\r\n\r\n%b",
    b"g\r\nhi\r\n0\r\n\r\n%b",
    b"0000000000000000000000000000000002\r\nhi\r\n0\r\n\r\n%b",
    b"10000000000000002\r\nhi\r\n0\r\n\r\n%b",
    b"100000002\r\nhi\r\n0\r\n\r\n%b",
    b"fffffffffffffffe\r\nhi\r\n0\r\n\r\n%b",
    b"ffffffff\r\nhi\r\n0\r\n\r\n%b",
    b"2\r\nhi\r\n",
    b"%b",
]
# Heads that one reader ends or begins elsewhere than another; %b is the path of the case.
HEADS = [
    b"POST %b/odd HTTP/1.1\nHost: h.example\nContent-Length: 5\n\n",
    b"POST %b/odd HTTP/1.1\r\nHost: h.example\r\n\nX: y\r\n\r\n",
    b"POST %b/odd HTTP/1.1\r\nHost: h.example\n\r\n",
    b"POST %b/odd HTTP/1.1\rHost: h.example\r\r",
    b"POST %b/odd HTTP/1.1\r\n\r\nHost: h.example\r\n\r\n",
    b"POST %b/odd HTTP/1.1\r\n Host: h.example\r\n\r\n",
    b"POST %b/odd\r\nHost: h.example\r\n\r\n",
    b"GET %b/odd HTTP/0.9\r\n\r\n",
    b"GET %b/odd HTTP/1.2\r\nHost: h.example\r\n\r\n",
    b"GET %b/odd HTTP/1.10\r\nHost: h.example\r\n\r\n",
    b"GET %b/odd HTTP/01.1\r\nHost: h.example\r\n\r\n",
    b"GET %b/odd HTTP/1.1x\r\nHost: h.example\r\n\r\n",
    b"GET %b/odd http/1.1\r\nHost: h.example\r\n\r\n",
    b"GET %b/odd HTTP/2.0\r\nHost: h.example\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET %b/odd HTTP/1.1 HTTP/1.1\r\nHost: h.example\r\n\r\n",
    b"GET %b/odd\x0bHTTP/1.1\r\nHost: h.example\r\n\r\n",
    b"GET\t%b/odd\tHTTP/1.1\r\nHost: h.example\r\n\r\n",
    b"GET  %b/odd HTTP/1.1\r\nHost: h.example\r\n\r\n",
    b"GET %b/odd  HTTP/1.1\r\nHost: h.example\r\n\r\n",
    b"GET %b/odd HTTP/1.1 \r\nHost: h.example\r\n\r\n",
    b" GET %b/odd HTTP/1.1\r\nHost: h.example\r\n\r\n",
    b"\r\n\r\nGET %b/odd HTTP/1.1\r\nHost: h.example\r\n\r\n",
    b"\n\nGET %b/odd HTTP/1.1\r\nHost: h.example\r\n\r\n",
    b"\r\rGET %b/odd HTTP/1.1\r\nHost: h.example\r\n\r\n",
    b"\x00GET %b/odd HTTP/1.1\r\nHost: h.example\r\n\r\n",
    b"0\r\n\r\nGET %b/odd HTTP/1.1\r\nHost: h.example\r\n\r\n",
    b"\xef\xbb\xbfGET %b/odd HTTP/1.1\r\nHost: h.example\r\n\r\n",
    b"GET %b/odd\x00 HTTP/1.1\r\nHost: h.example\r\n\r\n",
    b"GET %b/odd\xa0x HTTP/1.1\r\nHost: h.example\r\n\r\n",
    b"GET %b/odd HTTP/1.1\r\nHost: h.example\r\nHost: other.example\r\n\r\n",
    b"GET %b/odd HTTP/1.1\r\nHost: h.example\r\n: x\r\n\r\n",
    b"GET %b/odd HTTP/1.1\r\nHost: h.example\r\nX\r\n\r\n",
    b"GET %b/odd HTTP/1.1\r\nHost: h.example\r\nX: a\x00b\r\n\r\n",
    b"GET %b/odd HTTP/1.1\r\nHost: h.example\r\nX: a\rb\r\n\r\n",
    b"GET %b/odd HTTP/1.1\r\nHost: h.example\r\nX: a\r\r\n\r\n",
    b"GET %b/odd HTTP/1.1\r\nHost: h.example\r\nX: a\r\n\r\r\n\r\n",
    b"GET %b/odd HTTP/1.1\r\nHost: h.example\r\nX:\r\n\r\n",
    b"GET %b/odd HTTP/1.1\r\nHost: h.example\r\nX\xff: y\r\n\r\n",
    b"GET http://h.example%b/odd HTTP/1.1\r\nHost: other.example\r\n\r\n",
    b"GET h.example:80 HTTP/1.1\r\nHost: h.example\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: h.example\r\n\r\n",
    b"CONNECT h.example:80 HTTP/1.1\r\nHost: h.example\r\n\r\n",
    b"GET %b/odd HTTP/1.1\r\nHost: h.example\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
    b"GET %b/odd HTTP/1.1\r\nHost: h.example\r\nUpgrade: websocket\r\n\r\n",
    b"GET %b/odd HTTP/1.0\r\n\r\n",
    b"GET %b/odd HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
]


def get(path: bytes, *lines: bytes) -> bytes:
    return message(b"GET %b HTTP/1.1" % path, HOST, *lines)


def wanted(line: bytes, size: int) -> bytes:
    """A spelling of a length, with the length in it."""
    return line % ((size,) * (line.count(b"%d") + line.count(b"%x") + line.count(b"%o")))


def odd_messages(path: bytes) -> Iterator[tuple[str, bytes]]:
    """Each case's name and its odd message, with what follows it, for a path of its own."""
    hidden = get(path + b"/smuggled")
    body = chunked() + hidden
    for version in (b"1.1", b"1.0"):
        post = b"POST %b/odd HTTP/%b" % (path, version)
        for coding in CODINGS:
            for said in (None, len(body), 5, 0, 4, len(body) + 1):
                lines = [] if said is None else [b"Content-Length: %d" % said]
                for order in ([*lines, coding], [coding, *lines])[: len(lines) + 1]:
                    name = f"{version.decode()} {order!r}"
                    yield name, message(post, HOST, *order, body=body)
        for length in LENGTHS:
            line = wanted(length, len(hidden))
            yield f"{version.decode()} {length!r}", message(post, HOST, line, body=hidden)
        for body_of in CHUNKS:
            if b"%b" in body_of:
                body_of = body_of % hidden
            name = f"{version.decode()} chunks {body_of!r}"
            yield name, message(post, HOST, CHUNKED, body=body_of)
    for method in (b"GET", b"HEAD", b"OPTIONS", b"DELETE", b"TRACE", b"PUT", b"X"):
        for target in (path + b"/odd", b"/health/live", b"/users", b"/nobody/..%2f"):
            first = b"%b %b HTTP/1.1" % (method, target)
            length = b"Content-Length: %d" % len(hidden)
            yield f"{first!r} length", message(first, HOST, length, body=hidden)
            yield f"{first!r} chunks", message(first, HOST, CHUNKED, body=chunked(hidden))
            yield f"{first!r} no length", message(first, HOST, body=hidden)
    for head in HEADS:
        yield f"{head!r}", (head % path if b"%b" in head else head) + hidden


# Where a case's path is put in; as long as that, for lengths are counted with it.
PLACE = b"/s000000"


@functools.cache
def odd() -> list[tuple[str, bytes]]:
    return list(odd_messages(PLACE))


def surrounded(number: int, odd_one: bytes) -> bytes:
    """All that a client sends on one connection: the odd message between two plain ones, and one
    that ends the connection."""
    last = get(PLACE + b"/last", b"Connection: close")
    data = get(PLACE + b"/before") + odd_one + get(PLACE + b"/after") + last
    return data.replace(PLACE, b"/s%06d" % number)


def cases() -> Iterator[tuple[str, bytes]]:
    """Each case's name, and what a client sends."""
    for number, (name, data) in enumerate(odd()):
        yield name, surrounded(number, data)


PIECES = [
    *(b"\r\n", b"\r", b"\n", b"\x00", b" ", b"\t", b":", b";", b",", b"\xff", b"\r\n\r\n", b"0"),
    *(
        b"0\r\n\r\n",
        b"Content-Length: 5\r\n",
        CHUNKED + b"\r\n",
        b" x\r\n",
        b"HTTP/1.0",
        b"-",
        b"_",
    ),
    *(b"Connection: content-length\r\n", b"Expect: 100-continue\r\n", b"\r\nX: y", b"\x0b", b"1"),
]


def mutated(data: bytes, chance: random.Random, times: int) -> bytes:
    """A message with some of its bytes changed."""
    for _ in range(times):
        # Most changes are in the head, where most is decided.
        reach = len(data) if chance.random() < 0.4 else data.find(b"\r\n\r\n") + 4
        at = chance.randrange(max(1, reach))
        match chance.randrange(4):
            case 0:
                data = data[:at] + chance.choice(PIECES) + data[at:]
            case 1:
                data = data[:at] + data[at + chance.randint(1, 4) :]
            case 2:
                data = data[:at] + bytes((chance.randrange(256),)) + data[at + 1 :]
            case _:
                data = data[: at + chance.randint(1, 30)] + data[at:]
    return data


def changed(seed: int) -> tuple[str, bytes]:
    """A case with some of its bytes changed, the same for the same seed."""
    chance = random.Random(seed)
    name, data = chance.choice(odd())
    data = mutated(data, chance, chance.randint(1, 4))
    return f"{name}, changed by {seed}", surrounded(500_000 + seed, data)


POISON = message(b"HTTP/1.1 200 OK", b"X-Poison: 1", b"Content-Length: 6", body=b"poison")
OK = b"HTTP/1.1 200 OK"
TWO = b"Content-Length: 2"
# Answers that two readers may end at different places, or take for a different number of them.
ANSWERS = [
    message(OK, TWO, body=b"ok"),
    message(OK, CHUNKED, body=chunked(b"ok")),
    message(OK, body=b"ok"),
    message(OK, CHUNKED, b"Content-Length: 3", body=chunked(b"ok")),
    message(OK, b"Content-Length: 0", CHUNKED, body=chunked(b"ok")),
    message(OK, CHUNKED, b"Content-Length: x", body=chunked(b"ok")),
    message(OK, TWO, TWO, body=b"ok"),
    message(OK, b"Content-Length: 0", TWO, body=b"ok"),
    message(OK, b"Content-Length: 2, 2", body=b"ok"),
    message(OK, b"Content-Length: 02", body=b"ok"),
    message(OK, b"Content-Length: +2", body=b"ok"),
    message(OK, b"Content-Length : 2", body=b"ok"),
    message(OK, b"Content-Length:\r\n 2", body=b"ok"),
    message(OK, b"Content_Length: 200", TWO, body=b"ok"),
    message(OK, b"Transfer_Encoding: chunked", TWO, body=b"ok"),
    message(OK, b"Transfer-Encoding : chunked", body=chunked(b"ok")),
    message(OK, b"Transfer-Encoding:\r\n chunked", body=chunked(b"ok")),
    message(OK, b"Transfer-Encoding: xchunked", body=chunked(b"ok")),
    message(OK, b"Transfer-Encoding: gzip, chunked", body=chunked(b"ok")),
    message(OK, CHUNKED, CHUNKED, body=chunked(b"ok")),
    message(OK, b"X: a\nContent-Length: 0", TWO, body=b"ok"),
    message(OK, b"X: a\rContent-Length: 0", TWO, body=b"ok"),
    message(OK, b"X: a\x00b", TWO, body=b"ok"),
    message(OK, b"Connection: content-length", TWO, body=b"ok"),
    message(OK, CHUNKED, body=b"2  \r\nok\r\n0\r\n\r\n"),
    message(OK, CHUNKED, body=b"2\nok\n0\n\n"),
    message(OK, CHUNKED, body=b"2\r\nokXX0\r\n\r\n"),
    message(OK, CHUNKED, body=b"-2\r\nok\r\n0\r\n\r\n"),
    message(OK, CHUNKED, body=b"10000000000000002\r\nok\r\n0\r\n\r\n"),
    message(b"HTTP/1.0 200 OK", CHUNKED, body=chunked(b"ok")),
    message(b"HTTP/1.0 200 OK", b"Connection: keep-alive", TWO, body=b"ok"),
    message(b"HTTP/1.1 100 Continue") * 5 + message(OK, TWO, body=b"ok"),
    message(b"HTTP/1.1 103 Early Hints", b"Link: </a>") * 3 + message(OK, TWO, body=b"ok"),
    message(b"HTTP/1.1 103 Early Hints", b"Content-Length: 19") + message(OK, TWO, body=b"ok"),
    message(b"HTTP/1.1 102 Processing", CHUNKED) + message(OK, TWO, body=b"ok"),
    message(b"HTTP/1.1 101 Switching Protocols", b"Upgrade: websocket", b"Connection: upgrade"),
    message(b"HTTP/1.1 204 No Content", b"Content-Length: 6", body=b"poison"),
    message(b"HTTP/1.1 204 No Content", CHUNKED, body=chunked(b"poison")),
    message(b"HTTP/1.1 304 Not Modified", b"Content-Length: 6", body=b"poison"),
    message(b"HTTP/1.1 205 Reset Content", b"Content-Length: 0"),
    message(b"HTTP/1.1 2000 OK", TWO, body=b"ok"),
    message(b"HTTP/2 200 OK", TWO, body=b"ok"),
]


def changed_answer(seed: int) -> tuple[bytes, bool]:
    """An answer with some of its bytes changed, and perhaps another behind it; and whether the
    connection is ended after it."""
    chance = random.Random(seed)
    data = mutated(chance.choice(ANSWERS), chance, chance.randrange(4))
    return data + chance.choice([b"", POISON]), chance.random() < 0.6


def converse(port: int, data: bytes, seconds: float) -> bytes:
    """Send `data` and read all that comes. One who waits for more of a body is told that there is
    none, after `seconds` of silence. AssertionError where the connection is not ended then."""
    found, refused = read_by_h11(data)
    if not refused and not any(size < 0 for *_, size in found):
        seconds = 10  # Nobody waits for anything more of this one.
    received = b""
    with RawClient(port, seconds) as client, contextlib.suppress(ConnectionError):
        client.send(data)
        try:
            while piece := client.sock.recv(65536):
                received += piece
        except TimeoutError:
            client.sock.settimeout(10)
            client.sock.shutdown(socket.SHUT_WR)
            try:
                while piece := client.sock.recv(65536):
                    received += piece
            except TimeoutError:
                raise AssertionError(f"{data!r}: not ended after\n{received!r}") from None
    return received


def converse_all(
    port: int, conversations: Iterable[tuple[str, bytes]], seconds: float = 0.5
) -> list[tuple[str, bytes, bytes]]:
    """Hold them several at a time; each one's name, what was sent and what came."""
    with ThreadPoolExecutor(16) as pool:
        held = [
            (name, data, pool.submit(converse, port, data, seconds)) for name, data in conversations
        ]
        return [(name, data, future.result()) for name, data, future in held]


def say_which(sock: socket.socket, seen: Seen) -> None:
    """An upstream's answer: the id of the request."""
    identity = (seen.get("X-Request-Id") or "").encode()
    body = b"" if seen.method == "HEAD" else identity
    sock.sendall(message(b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(identity), body=body))


Logged = dict[str, dict[str, Any]]
# What an upstream has seen: id, method, target, and how many bytes its body had.
Sight = tuple[str, str, str, int]


def sights(upstream: ScriptedUpstream) -> list[Sight]:
    return [
        (one.get("X-Request-Id") or "", one.method, one.target.decode("latin-1"), len(one.body))
        for one in upstream.seen
    ]


def logged(service: Service) -> Logged:
    """The lines of the access log by the request's id, which no two have."""
    lines = {line["request_id"]: line for line in service.access_log}
    assert len(lines) == len(service.access_log)
    return lines


def read_by_h11(data: bytes) -> tuple[list[tuple[str, str, int]], bool]:
    """What another reader finds in `data`, as method, target and size of the body of each request, -1
    where that is not whole; and whether it refuses what follows these. h11 refuses more than Gatehouse: empty lines between
    two requests, bytes beyond ASCII in a target, white space before a chunk's extension, and a
    second request after one in HTTP/1.0."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    found: list[tuple[str, str, int]] = []
    try:
        while True:
            match connection.next_event():
                case h11.Request(method=method, target=target, http_version=version):
                    asked, size = (method.decode(), target.decode("latin-1")), 0
                case h11.Data(data=piece):
                    size += len(piece)
                case h11.EndOfMessage():
                    found.append((*asked, size))
                    if asked[0] == "CONNECT":
                        return found, False
                    connection.send(
                        h11.Response(status_code=200, headers=[("Content-Length", "0")])
                    )
                    connection.send(h11.EndOfMessage())
                    if connection.our_state is h11.MUST_CLOSE:
                        return found, version == b"1.0"
                    connection.start_next_cycle()
                case _:
                    if connection.their_state is h11.SEND_BODY:
                        found.append((*asked, -1))
                    return found, False
    except h11.RemoteProtocolError:
        return found, True


class Recorded(RawClient):
    """What a client has read, to be taken apart."""

    def __init__(self, received: bytes) -> None:
        self.buffer = received
        self.sock: Any = self

    def recv(self, _: int) -> bytes:
        return b""


REQUEST_ID = re.compile(rb"\r\nX-Request-Id: ([^\r]*)\r\n", re.IGNORECASE)
REFUSED = (400, 505)


def answers(received: bytes, log: Logged, story: str) -> Iterator[tuple[dict[str, Any], Reply]]:
    """The answers that a client has read, each with the line that the log has of it."""
    recorded = Recorded(received)
    while recorded.buffer:
        identity = REQUEST_ID.search(recorded.buffer)
        assert identity is not None, story
        line = log.get(identity[1].decode())
        assert line is not None, story
        reply = recorded.reply(line["method"])
        assert reply.status == line["status"], story
        assert reply.get("X-Request-Id") == line["request_id"], story
        yield line, reply


def check_answers(held: Iterable[tuple[str, bytes, bytes]], log: Logged) -> dict[str, int]:
    """What clients have read: whole answers, in their order, each to a request that the log has;
    where the upstream made it, to that one: it answers with the id that it was asked by. And these
    requests are those that another reader finds in what was sent. The size of each one's body, as
    that has it, by its id."""
    sizes: dict[str, int] = {}
    for name, data, received in held:
        story = f"{name}\n{data!r}\n{received!r}"
        found, refused = read_by_h11(data)
        number = 0
        for line, reply in answers(received, log, story):
            assert reply.complete, story
            owned = re.match("(http://[^/]*)?/(users|health)", line["target"])
            assert reply.status < 500 or reply.status == 505 or owned, story
            # Some servers answer `OPTIONS *` for themselves.
            own = owned or line["target"] == "*" or line["method"] == "HEAD"
            if reply.status == 200 and not own:
                assert reply.body == line["request_id"].encode(), story
            if reply.status in REFUSED and reply.get("Content-Type") == "application/problem+json":
                continue  # by Gatehouse, whatever it said
            if number < len(found):
                assert (line["method"], line["target"]) == found[number][:2], story
                if found[number][2] >= 0:
                    sizes[line["request_id"]] = found[number][2]
            else:
                assert refused, story
            number += 1
    return sizes


def check_seen(seen: Iterable[Sight], log: Logged, sizes: dict[str, int]) -> None:
    """What an upstream has seen: no request that Gatehouse does not know of, none twice, and each
    with the body that it has."""
    ids = set()
    for identity, method, target, size in seen:
        line = log.get(identity)
        assert line is not None, f"nobody asked for {method} {target} {identity}"
        assert (line["method"], origin(line["target"])) == (method, target), line
        assert identity not in ids, f"{method} {target} was seen twice"
        assert sizes.get(identity, size) == size, f"{method} {target} had a body of {size} bytes"
        ids.add(identity)


def origin(target: str) -> str:
    """A target as it is forwarded."""
    return re.sub(r"^http://[^/]*", "", target)
