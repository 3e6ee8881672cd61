"""An upstream over TLS: whom it trusts, and that the end of a connection is not taken for the end of
a body."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.harness import (
    RawClient,
    ScriptedUpstream,
    Seen,
    Service,
    chunked,
    echo_at_once,
    message,
    ok,
    problem,
    request,
    wait_for,
)

OK = b"HTTP/1.1 200 OK"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def bundle(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "authority.pem"
    authority.cert_pem.write_to_path(path)
    return path


def server_context(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


@pytest.fixture(scope="module")
def upstream(authority: trustme.CA) -> Iterator[ScriptedUpstream]:
    server = ScriptedUpstream(tls=server_context(authority, "127.0.0.1"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def service(upstream: ScriptedUpstream, bundle: Path) -> Iterator[Service]:
    with Service(UPSTREAM_URL=upstream.url, REQUESTS_CA_BUNDLE=bundle) as running:
        yield running


def test_an_upstream_over_tls_is_called_and_its_connection_used_again(
    service: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(ok)
    with service.client() as client:
        for _ in range(3):
            client.send(request(b"GET /a?b HTTP/1.1"))
            assert client.reply().body == b"ok"
    assert [seen.target for seen in upstream.seen] == [b"/a?b"] * 3
    assert len({seen.connection for seen in upstream.seen}) == 1
    # How the client came here is what is forwarded, not how the upstream is called.
    assert upstream.seen[0].get("X-Forwarded-Proto") == "http"


def test_an_upstream_whom_nobody_vouches_for_is_not_called(upstream: ScriptedUpstream) -> None:
    upstream.script(ok)
    with Service(UPSTREAM_URL=upstream.url) as service:
        problem(service.call("POST", "/", b"secret"), 502, "upstream-unreachable")
        assert "CERTIFICATE_VERIFY_FAILED" in service.log
    assert upstream.seen == []


def test_an_upstream_with_another_s_certificate_is_not_called(
    authority: trustme.CA, bundle: Path
) -> None:
    upstream = ScriptedUpstream(tls=server_context(authority, "other.example"))
    with Service(UPSTREAM_URL=upstream.url, REQUESTS_CA_BUNDLE=bundle) as service:
        problem(service.call("POST", "/", b"secret"), 502, "upstream-unreachable")
    assert upstream.seen == []
    upstream.close()


def test_whom_it_trusts_is_read_once(
    upstream: ScriptedUpstream, authority: trustme.CA, tmp_path: Path
) -> None:
    """Each connection read the whole bundle, which took 30 milliseconds of CPU time."""
    upstream.script(ok)
    bundle = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(bundle)
    settings = {"REQUESTS_CA_BUNDLE": bundle, "UPSTREAM_KEEPALIVE_TIMEOUT": 0, "WORKERS": 1}
    with Service(UPSTREAM_URL=upstream.url, **settings) as service:
        assert service.call("GET", "/").body == b"ok"
        bundle.unlink()
        assert service.call("GET", "/").body == b"ok"
    assert len({seen.connection for seen in upstream.seen}) == 2


def test_an_upstream_is_asked_for_by_its_name(authority: trustme.CA, bundle: Path) -> None:
    """Its name was looked up, and TLS asked for the address that was found."""
    asked: list[str | None] = []
    context = server_context(authority, "localhost")
    context.sni_callback = lambda sock, name, of: asked.append(name)  # type: ignore[assignment]
    upstream = ScriptedUpstream(tls=context)
    url = upstream.url.replace("127.0.0.1", "localhost")
    with Service(UPSTREAM_URL=url, REQUESTS_CA_BUNDLE=bundle) as service:
        assert service.call("GET", "/").status == 200
    assert asked == ["localhost"]
    upstream.close()


def test_an_upstream_that_does_not_speak_tls_is_502() -> None:
    def refuse(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock:
            sock.sendall(message(b"HTTP/1.1 400 Bad Request", b"Connection: close"))
            sock.recv(65536)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=refuse, args=(listener,), daemon=True).start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        with Service(UPSTREAM_URL=url) as service:
            problem(service.call("GET", "/"), 502, "upstream-unreachable")


@pytest.mark.parametrize(
    "answer",
    [
        message(OK, body=b"half"),
        message(OK, b"Content-Length: 8", body=b"half"),
        message(OK, b"Transfer-Encoding: chunked", body=b"4\r\nhalf\r\n"),
    ],
    ids=["close", "length", "chunks"],
)
def test_a_body_that_is_cut_does_not_look_whole(
    service: Service, upstream: ScriptedUpstream, answer: bytes
) -> None:
    """Who cuts a TCP connection has not ended TLS: RFC 9112 section 9.8."""

    def cut(sock: socket.socket, seen: Seen) -> bool:
        sock.sendall(answer)
        return False

    upstream.script(cut)
    reply = service.call("GET", "/")
    assert (reply.status, reply.body, reply.complete) == (200, b"half", False)


def test_a_body_that_ends_with_its_connection_is_whole_where_tls_was_ended(
    service: Service, upstream: ScriptedUpstream
) -> None:
    def end(sock: socket.socket, seen: Seen) -> bool:
        assert isinstance(sock, ssl.SSLSocket)
        sock.sendall(message(OK, body=b"whole"))
        with contextlib.suppress(OSError):
            sock.unwrap()
        return False

    upstream.script(end)
    reply = service.call("GET", "/")
    assert (reply.status, reply.body, reply.complete) == (200, b"whole", True)


def test_large_bodies_pass_both_ways(service: Service, upstream: ScriptedUpstream) -> None:
    """Session tickets, which come while the request is sent, are no early answer."""
    body = os.urandom(8 << 20)
    upstream.script(
        lambda sock, seen: sock.sendall(
            message(OK, b"Content-Length: %d" % len(seen.body), body=seen.body)
        )
    )
    for _ in range(2):
        reply = service.call("POST", "/", body)
        assert (reply.status, reply.complete) == (200, True)
        assert reply.body == body


def test_an_upstream_that_answers_as_it_reads_gets_all_of_the_body(
    service: Service, upstream: ScriptedUpstream
) -> None:
    upstream.script(b"")
    upstream.early = echo_at_once
    body = os.urandom(8 << 20)
    head = request(b"POST /echo HTTP/1.1", b"Content-Length: %d" % len(body))
    with service.client() as client:
        reply = client.converse(head + body, "POST")
    assert (reply.status, reply.complete) == (200, True)
    assert reply.body == body


@pytest.mark.parametrize("size", [60_000, 70_000, 3_000_000])
def test_an_answer_that_comes_instead_of_reading_the_body_is_passed_on(
    service: Service, upstream: ScriptedUpstream, size: int
) -> None:
    """Now and then, on a busy machine, the reset comes while the body is written; TLS has another
    word for a broken pipe then, and that was 502."""

    def refuse(sock: socket.socket, seen: Seen) -> bool:
        # It says that it closes: else the next request might be on its way to it already.
        head = (b"HTTP/1.1 413 Too Big", b"Content-Length: 3", b"Connection: close")
        sock.sendall(message(*head, body=b"big"))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        return False

    upstream.script(b"")
    upstream.early = refuse
    for _ in range(5):
        data = request(b"PUT / HTTP/1.1", b"Content-Length: %d" % size, body=bytes(size))
        reply = service.exchange(data, "PUT")
        assert (reply.status, reply.body) == (413, b"big")


def test_pieces_flow_as_they_arrive(service: Service, upstream: ScriptedUpstream) -> None:
    taken = threading.Semaphore(0)

    def speak(sock: socket.socket, seen: Seen) -> None:
        sock.sendall(message(OK, b"Transfer-Encoding: chunked"))
        for number in range(3):
            sock.sendall(b"7\r\nevent %d\r\n" % number)
            assert taken.acquire(timeout=10)
        sock.sendall(b"0\r\n\r\n")

    upstream.script(speak)
    with service.client() as client:
        client.send(request(b"GET /events HTTP/1.1"))
        body = client.head() and client.buffer
        for number in range(3):
            while b"event %d" % number not in body:
                body += client.sock.recv(65536)
            taken.release()


def test_a_client_that_leaves_frees_its_connection(
    service: Service, upstream: ScriptedUpstream
) -> None:
    reading, closed = threading.Event(), threading.Event()

    def pour(sock: socket.socket, seen: Seen) -> None:
        sock.sendall(message(OK, b"Transfer-Encoding: chunked", body=chunked(b"x")[:-5]))
        reading.set()
        with contextlib.suppress(OSError):
            sock.settimeout(10)
            if not sock.recv(1):
                closed.set()
            return
        closed.set()

    upstream.script(pour)
    client = RawClient(service.port)
    client.send(request(b"GET / HTTP/1.1"))
    assert reading.wait(10)
    client.close()
    assert closed.wait(2)
    wait_for(lambda: service.call("GET", "/health").json()["upstream"]["in_flight"] == 0)
