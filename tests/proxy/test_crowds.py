"""Many at once: idle streams, idle connections, slow senders, and no descriptors left."""

from __future__ import annotations

import contextlib
import resource
import selectors
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.harness import (
    RawClient,
    ScriptedUpstream,
    Seen,
    Service,
    create_user,
    message,
    ok,
    problem,
    request,
    wait_for,
)

Start = Callable[..., Service]

COUNT = 1000
EVENT = b"6\r\nevent\n\r\n"
KIB = 1024


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """Enough of them for both ends of all these connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard > 5 * COUNT
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Events:
    """An upstream of idle event streams, without a thread for each."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.streams: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.listener, selectors.EVENT_READ)
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select(0.1):
                if key.fileobj is self.listener:
                    sock, _ = self.listener.accept()
                    self._selector.register(sock, selectors.EVENT_READ)
                else:
                    self._read(key.fileobj)  # type: ignore[arg-type]

    def _read(self, sock: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            if sock.recv(65536):
                head = [b"Content-Type: text/event-stream", b"Transfer-Encoding: chunked"]
                sock.sendall(message(b"HTTP/1.1 200 OK", *head))
                self.streams.add(sock)
                return
        self.streams.discard(sock)
        self._selector.unregister(sock)
        sock.close()

    def send(self, data: bytes) -> None:
        for sock in list(self.streams):
            sock.sendall(data)

    def close(self) -> None:
        self._stopping = True
        self._thread.join(10)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]


@pytest.fixture
def events() -> Iterator[Events]:
    upstream = Events()
    yield upstream
    upstream.close()


def upstream_part(service: Service) -> tuple[int, int]:
    part = service.call("GET", "/health").json()["upstream"]
    return part["in_flight"], part["streams"]


def latency(service: Service, target: str, times: int = 40) -> float:
    """Median seconds of a request on a new connection; each must be 200."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        assert service.call("GET", target).status == 200
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def read_all(clients: list[RawClient], end: bytes, seconds: float) -> None:
    """Read until each client's buffer ends with `end`."""
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.sock, selectors.EVENT_READ, client)
        while selector.get_map():
            assert time.monotonic() < deadline, f"{len(selector.get_map())} wait after {seconds} s"
            for key, _ in selector.select(0.1):
                data = key.data.sock.recv(65536)
                assert data, key.data.buffer
                key.data.buffer += data
                if key.data.buffer.endswith(end):
                    selector.unregister(key.fileobj)


@pytest.mark.slow
def test_a_thousand_idle_event_streams_cost_next_to_nothing(
    start: Start, database: str, events: Events
) -> None:
    """With a thread each, 24 of them were an outage."""
    service = start(POSTGRES_URI=database, UPSTREAM_URL=events.url, WORKERS=1)
    user = f"/users/{create_user(service).json()['id']}"
    targets = ("/health", user)
    before = {target: latency(service, target) for target in targets}
    process = psutil.Process(service.process.pid)
    # One, so that whatever is made once is made.
    with service.client() as client:
        client.send(request(b"GET /events HTTP/1.1"))
        client.head()
        threads, memory = process.num_threads(), process.memory_info().rss
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(service.client()) for _ in range(COUNT)]
        for client in clients:
            client.send(request(b"GET /events HTTP/1.1"))
            client.head()
        assert upstream_part(service) == (COUNT, COUNT)
        # What made the connections ends when it has nothing to do.
        wait_for(lambda: process.num_threads() <= threads, 12, "as many threads as before")
        assert process.memory_info().rss - memory < COUNT * 12 * KIB
        during = {target: latency(service, target) for target in targets}
        for target in targets:
            assert during[target] < 2 * before[target] + 0.005, (before, during)
        for number in range(3):
            began = time.monotonic()
            events.send(EVENT)
            read_all(clients, EVENT, 1.0)
            assert time.monotonic() - began < 1, number
        # A silent crowd takes no processor time either.
        used = sum(process.cpu_times()[:2])
        threading.Event().wait(1)
        assert sum(process.cpu_times()[:2]) - used < 0.1
        left = time.monotonic()
    wait_for(lambda: upstream_part(service) == (0, 0), 2, "their places")
    wait_for(lambda: not events.streams, max(0.1, left + 2 - time.monotonic()), "their connections")
    assert process.memory_info().rss - memory < COUNT * 12 * KIB


def test_a_thousand_streams_that_begin_at_once_all_begin(start: Start, events: Events) -> None:
    """After a restart all browsers come back in the same second."""
    service = start(UPSTREAM_URL=events.url, WORKERS=1)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(service.client()) for _ in range(COUNT)]
        began = time.monotonic()
        for client in clients:
            client.send(request(b"GET /events HTTP/1.1"))
        read_all(clients, b"\r\n\r\n", 10)
        assert all(client.buffer.startswith(b"HTTP/1.1 200 OK") for client in clients)
        assert upstream_part(service) == (COUNT, COUNT)
        events.send(EVENT)
        read_all(clients, EVENT, 2)
        assert time.monotonic() - began < 10
    wait_for(lambda: upstream_part(service) == (0, 0) and not events.streams, 2, "their places")


# Few descriptors.


def with_descriptors(start: Start, count: int, upstream: ScriptedUpstream) -> Service:
    """A service that may have so many, which it cannot raise."""
    limits = ["sh", "-c", f'ulimit -n {count} && exec "$0" "$@"']
    return start(within=limits, UPSTREAM_URL=upstream.url, WORKERS=1)


def others_are_served(service: Service, times: int = 100) -> None:
    """Each on a connection of its own, and none waits for long."""
    for target in ("/health/live", "/x"):
        for _ in range(times):
            began = time.monotonic()
            assert service.call("GET", target).status == 200
            assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "part",
    [b"", b"G", b"GET /x HTTP/1.1\r\nHost: x\r\nX-Slow: ", b"\r\n"],
    ids=["nothing", "a byte", "half a head", "an empty line"],
)
def test_clients_that_send_their_heads_slowly_keep_nobody_else_out(
    start: Start, upstream: ScriptedUpstream, part: bytes
) -> None:
    """1,000 of them with 1,024 descriptors kept everybody out for as long as they lasted."""
    upstream.script(ok)
    service = with_descriptors(start, 1024, upstream)
    limit = service.call("GET", "/health").json()["upstream"]["limit"]
    assert 64 <= limit < 1024 // 2
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        senders = [stack.enter_context(service.client()) for _ in range(COUNT)]
        for sender in senders:
            with contextlib.suppress(ConnectionError):
                sender.send(part)

        def trickle() -> None:
            while not stop.wait(0.2):
                for sender in senders:
                    with contextlib.suppress(OSError):
                        sender.send(b"\n" if part == b"\r\n" else b"a" if part else b"")

        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(stop.set)
        others_are_served(service)
    others_are_served(service, 5)


def test_idle_connections_make_room_before_anything_else(
    start: Start, upstream: ScriptedUpstream
) -> None:
    """Also before one that is sending its head, however long it has been at it."""
    upstream.script(ok)
    service = with_descriptors(start, 1024, upstream)
    with contextlib.ExitStack() as stack:
        sender = stack.enter_context(service.client())
        sender.send(b"GET /slow HTTP/1.1\r\nHo")
        idle = [stack.enter_context(service.client()) for _ in range(700)]
        for client in idle:
            client.send(request(b"GET /health/live HTTP/1.1"))
            assert client.reply().status == 200
        # As many again, each of whom is served.
        for _ in range(700):
            client = stack.enter_context(service.client())
            client.send(request(b"GET /x HTTP/1.1"))
            assert client.reply().body == b"ok"
        # The oldest have gone, and whoever was in the middle of something has not.
        assert idle[0].closed()
        sender.send(b"st: x\r\n\r\n")
        assert sender.reply().body == b"ok"


def hold_back(upstream: ScriptedUpstream) -> threading.Event:
    """Have the upstream answer /held only once the event is set that this returns."""
    go_on = threading.Event()

    def hold(sock: socket.socket, seen: Seen) -> None:
        if seen.target == b"/held":
            go_on.wait(60)
        ok(sock, seen)

    upstream.script(hold)
    return go_on


@contextlib.contextmanager
def under_way(start: Start, upstream: ScriptedUpstream, share: float) -> Iterator[Service]:
    """A service of few descriptors, whose upstream holds this share of the requests that it may have
    while the block runs. Then each of them is answered."""
    go_on = hold_back(upstream)
    service = with_descriptors(start, 512, upstream)
    limit = service.call("GET", "/health").json()["upstream"]["limit"]
    with contextlib.ExitStack() as stack:
        count = int(limit * share)
        held = [stack.enter_context(service.client(timeout=60)) for _ in range(count)]
        for client in held:
            client.send(request(b"GET /held HTTP/1.1"))
        wait_for(lambda: upstream_part(service)[0] == count)
        yield service
        go_on.set()
        for client in held:
            assert client.reply().body == b"ok"


def test_requests_under_way_are_not_cut_to_make_room(
    start: Start, upstream: ScriptedUpstream
) -> None:
    with contextlib.ExitStack() as stack, under_way(start, upstream, 0.5) as service:
        for _ in range(400):
            stack.enter_context(service.client()).send(b"GET /x HTTP/1.1\r\n")
        others_are_served(service, 20)


def test_when_the_upstream_has_all_that_it_may_have_others_are_told_so(
    start: Start, upstream: ScriptedUpstream
) -> None:
    """They took all connections that there may be, and nobody could ask even for /health."""
    with under_way(start, upstream, 1) as service:
        for _ in range(100):
            problem(service.call("GET", "/x"), 503, "upstream-busy")
            assert service.call("GET", "/health/live").status == 200


def test_a_process_without_a_free_descriptor_waits_for_one_without_spinning(
    start: Start, upstream: ScriptedUpstream
) -> None:
    """The kernel goes on saying that somebody knocks."""
    go_on = hold_back(upstream)
    service = start(UPSTREAM_URL=upstream.url, WORKERS=1)
    process = psutil.Process(service.process.pid)
    # Whoever looked whether it had started is gone, and leaves no gap among the descriptors later.
    wait_for(lambda: all(one.status == "LISTEN" for one in process.net_connections("tcp")))
    with service.client() as kept:
        kept.send(request(b"GET /x HTTP/1.1"))
        assert kept.reply().body == b"ok"
        _, hard = process.rlimit(psutil.RLIMIT_NOFILE)
        # What it has is in use: nothing can be closed to make room.
        kept.send(request(b"GET /held HTTP/1.1"))
        wait_for(lambda: len(upstream.seen) == 2)
        process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds(), hard))
        waiting = [service.client() for _ in range(20)]
        for client in waiting:
            client.send(request(b"GET /health/live HTTP/1.1"))
        used, began = sum(process.cpu_times()[:2]), time.monotonic()
        threading.Event().wait(1)
        assert sum(process.cpu_times()[:2]) - used < 0.3 * (time.monotonic() - began)
        # Its answer leaves two that are idle, the upstream's and its own: one after another comes
        # in, is served, and makes room.
        go_on.set()
        assert kept.reply().body == b"ok"
        for client in waiting:
            assert client.reply().status == 200
        assert kept.closed()
        process.rlimit(psutil.RLIMIT_NOFILE, (hard, hard))
        assert service.call("GET", "/x").body == b"ok"
        assert "Traceback" not in service.log


# Clients that are idle.


def test_an_idle_client_is_closed_after_the_keepalive_timeout(
    start: Start, upstream: ScriptedUpstream
) -> None:
    upstream.script(ok)
    service = start(UPSTREAM_URL=upstream.url, KEEPALIVE_TIMEOUT=1, WORKERS=1)
    for target in (b"/x", b"/health/live"):
        with service.client() as client:
            for _ in range(4):  # It is idle from its last answer on.
                client.send(request(b"GET %s HTTP/1.1" % target))
                assert client.reply().status == 200
                threading.Event().wait(0.5)
            idle = time.monotonic()
            assert client.closed()
            assert 0.2 < time.monotonic() - idle < 3


def test_a_client_that_waits_for_its_answer_is_not_idle(
    start: Start, upstream: ScriptedUpstream
) -> None:
    def slowly(sock: socket.socket, seen: Seen) -> None:
        threading.Event().wait(2)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
        threading.Event().wait(2)
        sock.sendall(b"k")

    upstream.script(slowly)
    service = start(UPSTREAM_URL=upstream.url, KEEPALIVE_TIMEOUT=1)
    with service.client() as client:
        client.send(request(b"GET /slow HTTP/1.1"))
        assert client.reply().body == b"ok"


@pytest.mark.slow
@pytest.mark.parametrize("framing", [b"Content-Length: 8388608", b"Transfer-Encoding: chunked"])
def test_readers_that_take_a_few_bytes_cost_the_others_nothing_and_give_memory_back(
    start: Start, framing: bytes
) -> None:
    """32 bytes in five seconds, each of 300. What was kept for them stayed with the process."""
    block = bytes(65536)
    piece = block if b"Length" in framing else b"10000\r\n" + block + b"\r\n"

    def pour(sock: socket.socket, seen: Seen) -> None:
        if seen.target == b"/x":
            return ok(sock, seen)
        sock.sendall(message(b"HTTP/1.1 200 OK", framing))
        for _ in range(128):
            sock.sendall(piece)
        return None

    upstream = ScriptedUpstream(pour)
    service = start(UPSTREAM_URL=upstream.url, WORKERS=1)
    process = psutil.Process(service.process.pid)
    others_are_served(service, 20)
    before = process.memory_info().rss
    with contextlib.ExitStack() as stack:
        stack.callback(upstream.close)
        readers = []
        for _ in range(300):
            reader = stack.enter_context(RawClient(service.port, room=4096))
            reader.send(request(b"GET /big HTTP/1.1"))
            assert reader.sock.recv(32).startswith(b"HTTP/1.1 200 OK\r\n")
            readers.append(reader)
        for _ in range(3):
            others_are_served(service, 20)
            for reader in readers:
                assert len(reader.sock.recv(32)) == 32
        assert upstream_part(service) == (len(readers), 0)
        # Each has a buffer full that it has not taken.
        assert process.memory_info().rss - before < len(readers) * 640 * KIB
    wait_for(lambda: upstream_part(service) == (0, 0), 2, "their places")
    wait_for(lambda: process.memory_info().rss - before < 8 * KIB * KIB, 5, "the memory")


def test_whoever_stops_in_the_middle_of_a_body_makes_room(
    start: Start, upstream: ScriptedUpstream
) -> None:
    """With a byte every minute a few hundred of them kept everybody else out, for ever."""
    upstream.script(ok)
    service = with_descriptors(start, 1024, upstream)
    with contextlib.ExitStack() as stack:
        for number in range(900):  # More than there may be at once.
            client = stack.enter_context(service.client())
            target = (b"/x", b"/health/live", b"/users")[number % 3]
            client.send(
                message(b"POST %b HTTP/1.1" % target, b"Host: x", b"Content-Length: 9", body=b"a")
            )
        others_are_served(service, 20)


def test_whoever_is_only_being_listened_to_makes_room(
    start: Start, upstream: ScriptedUpstream
) -> None:
    """Of a request that was refused, the rest is read for half a minute. A few hundred of them kept
    everybody else out for as long."""
    upstream.script(ok)
    service = with_descriptors(start, 1024, upstream)
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        refused: list[RawClient] = []

        def trickle() -> None:
            while not stop.wait(0.5):
                for client in list(refused):
                    with contextlib.suppress(OSError):
                        client.send(b"a")

        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(stop.set)
        for _ in range(900):  # More than there may be at once.
            refused.append(stack.enter_context(service.client()))
            refused[-1].send(message(b"POST /x HTTP/1.1", b"Host: x", b"Content-Length: 1x"))
            assert refused[-1].reply().status == 400
        others_are_served(service, 20)
