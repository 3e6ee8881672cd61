"""One worker: it accepts clients, writes the logs, gives memory back, and stops in order."""

from __future__ import annotations

import errno
import gc
import logging
import select
import socket
import sys
import time

from metrics import AWAKE, CLIENTS, LIMIT, LINES_DROPPED
from server.client import Client
from server.connector import UpstreamConnector
from server.desk import Desk, Served
from server.lanes import Lane
from server.listener import (
    connection_room,
    let_nobody_in,
    most_streams,
    somebody_waits,
    waiting_clients,
)
from server.logs import Output
from server.loop import NEVER, READ, Loop, Timer
from server.memory import give_large_pieces_back, give_memory_back
from server.options import Options
from server.room import Room
from server.stream import PROBING
from server.tunnel import Tunnel
from server.upstream import Upstream
from server.wsgi import Gateway

log = logging.getLogger("gatehouse")

# Threads that make connections to the upstream: how many at most, and how many without a delay.
CONNECTING_THREADS, CONNECTING_EAGERLY = 64, 4
# Freed memory is given back when there were more than CROWD clients and half of them have gone, and
# after a large answer of the application's.
CROWD = 100
# While a worker drains, an idle connection is kept for this many seconds: its client may just be
# sending a request.
IDLE_GOODBYE_SECONDS = 2.0
# A worker that has more than MOST_AHEAD clients more than the one with the fewest waits this many
# seconds before it accepts: that one may be waiting for the processor. If the difference may be
# none, all of them wait in turn while clients come and go, and nobody accepts.
MOST_AHEAD = 2
GIVE_WAY_SECONDS = 0.001
# How often in a row a worker waits for the others while their numbers of clients do not change:
# they may all be stopped.
MOST_IN_VAIN = 100
# A worker accepts nobody until the others are awake, or until this many seconds have passed.
WAKING_SECONDS = 1.0
# How long a thread may keep the interpreter while others want it.
SWITCH_SECONDS = 0.001
# At its end a worker waits at most this many seconds for the reader of a log.
LAST_LINES_SECONDS = 1.0
# If no descriptor is free, the worker tries again to accept after this many seconds.
CROWDED_SECONDS = 0.025
# A worker that has closed an idle connection, to have a descriptor, tries again after this many
# seconds. That is in a later turn, because sockets are closed at the end of a turn. In the same one
# it would close all that are idle, one after the other.
DROPPED_SECONDS = 0.001


class Server:
    """One worker's sockets, and the loop that looks after them. `alone` says that no other process
    listens on the same socket."""

    def __init__(self, served: Served, listener: socket.socket, options: Options) -> None:
        self.served = served
        self.options = options
        self.loop = Loop()
        self.alone = True
        self.stopping = False
        self._listener = listener
        self._accepting = False
        most = most_streams()
        self.upstream = Upstream(
            self.loop,
            Lane(self.loop, "connecting", CONNECTING_THREADS, eager=CONNECTING_EAGERLY),
            UpstreamConnector(options.upstream_url, options.ca_bundle),
            limit=min(options.limit or most, most),
            connect_timeout=options.connect_timeout,
            keepalive=options.upstream_keepalive,
            board=served.board,
        )
        lanes = {
            name: Lane(self.loop, name, limit, options.eager.get(name))
            for name, limit in options.threads.items()
        }
        answer = Gateway(served).answer
        self.desk = Desk(self.loop, served, options, self.upstream, lanes, answer)
        self._clients = self.desk.clients
        self._room = Room(self._clients, self.upstream, connection_room())
        self.upstream.make_room = self._room.make
        self._log = Output(1) if options.access_log else None
        # The log too has lines that may wait for a reader.
        stream = getattr(next(iter(logging.root.handlers), None), "stream", None)
        outputs = {"access log": self._log, "log": stream}
        self._outputs = {name: one for name, one in outputs.items() if isinstance(one, Output)}
        # By output: how many dropped lines the log has not told of yet.
        self._untold = dict.fromkeys(self._outputs, 0)
        self._again = Timer(self.loop, self._accept)
        self._tick = Timer(self.loop, self._see_to_all)
        self._deadline = NEVER
        self._others: tuple[int, ...] = ()
        self._in_vain = 0
        self._most_clients = 0  # since the last time that memory was given back

    # Serving.

    def run(self) -> None:
        """Serve until `stop` is called and what was under way is answered."""
        board = self.served.board
        board.set(LIMIT, self.upstream.limit)
        # The objects that exist now live as long as the worker: the garbage collector need not look
        # through them in the middle of a turn.
        gc.freeze()
        # A job's thread that computes lets the loop's thread go on after this time. By default it
        # would be five milliseconds, which are added to each request that comes meanwhile.
        sys.setswitchinterval(SWITCH_SECONDS)
        give_large_pieces_back()
        self._await_others()
        self._listener.setblocking(False)
        # Connections inherit these options. The first has small pieces sent at once.
        for option in ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), *PROBING):
            self._listener.setsockopt(*option)
        self._watch_listener(True)
        self._tick.set(self.loop.now)
        desk = self.desk
        while not (desk.draining and (not self._clients or self.loop.now >= self._deadline)):
            self.loop.turn()
            if desk.lines:
                self._write_log()
            if self.stopping and not desk.draining:
                self._drain()
        if under_way := sum(client.head is not None for client in self._clients):
            requests = "request" if under_way == 1 else "requests"
            log.warning("%d %s cut: SHUTDOWN_TIMEOUT is over", under_way, requests)
        for client in list(self._clients):
            self.loop.attempt(client.abandon)  # An answer that is cut here must not look whole.
        self.upstream.close()
        self.loop.turn_over()
        if desk.lines:
            self._write_log()
        self._see_to_logs(min(self._deadline, time.monotonic() + LAST_LINES_SECONDS))
        self.loop.shut()

    def stop(self) -> None:
        """Begin to drain; callable from a signal handler and from any thread."""
        self.stopping = True
        self.loop.wake()

    def _await_others(self) -> None:
        # A worker must not accept before the others are awake: the first would get all clients.
        board, until = self.served.board, time.monotonic() + WAKING_SECONDS
        board.set(AWAKE, 1)
        while not (self.stopping or all(board.others(AWAKE)) or time.monotonic() > until):
            time.sleep(0.005)

    # Accepting clients.

    def _watch_listener(self, accepting: bool) -> None:
        if accepting != self._accepting:
            before, after = (READ, 0) if self._accepting else (0, READ)
            self.loop.watch(self._listener.fileno(), self, before, after)
            self._accepting = accepting

    def on_event(self, events: int) -> None:
        """A client connects. Accept it, or leave it to a worker that has far fewer, for a moment:
        that worker may not be awake. If the others accept nobody, do not wait for them."""
        if not self.alone:
            clients, others = len(self._clients), self.served.board.others(CLIENTS)
            if others != self._others:
                self._others, self._in_vain = others, 0
            ahead = clients - min(others, default=clients)
            if ahead > MOST_AHEAD and self._in_vain < MOST_IN_VAIN:
                self._in_vain += 1
                self._look_again(GIVE_WAY_SECONDS)
                return
        self._accept()

    def _look_again(self, seconds: float) -> None:
        self._watch_listener(False)
        self._again.set(self.loop.now + seconds)

    def _accept(self) -> None:
        if self.desk.draining:
            return
        try:
            self._watch_listener(True)
        except OSError:  # The kernel has no memory for that at the moment.
            self._again.set(self.loop.now + CROWDED_SECONDS)
            return
        # With other processes at the socket, accept one client at a time: they may want the next.
        # Alone, accept those that wait.
        for _ in range(16 if self.alone else 1):
            if not self._let_in():
                return

    def _let_in(self) -> bool:
        if self._room.full:
            if not somebody_waits(self._listener):
                return False
            if not self._room.drop_one():
                self._look_again(CROWDED_SECONDS)
                return False
        try:
            sock, address = self._listener.accept()
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionAbortedError:
            return True  # This one has left. The next may be waiting.
        except OSError as error:
            # No descriptor is free. The client goes on waiting, and the selector would report it at
            # every turn. So make room, or wait a moment.
            short = error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
            dropped = short and self._room.drop_one()
            self._look_again(DROPPED_SECONDS if dropped else CROWDED_SECONDS)
            return False
        sock.setblocking(False)
        # A socket that listens for both IPv6 and IPv4 shows IPv4 addresses with a prefix.
        peer = (address[0].removeprefix("::ffff:"), address[1])
        try:
            client = Client(self.desk, sock, peer)
        except OSError:  # The kernel has no memory to watch it.
            sock.close()
            self._look_again(CROWDED_SECONDS)
            return False
        self.desk.came(client)
        return True

    # Now and then.

    def _see_to_all(self) -> None:
        self._tick.set(self.loop.now + 1.0)
        self._see_to_logs()
        self.upstream.look()
        self.served.board.turned(self.loop.longest_turn)
        self.loop.longest_turn = 0.0
        self._room.forget_closed()
        self._most_clients = max(self._most_clients, len(self._clients))
        crowd_has_left = self._most_clients > CROWD and len(self._clients) < self._most_clients / 2
        if crowd_has_left or self.desk.was_large:
            self._most_clients, self.desk.was_large = len(self._clients), False
            give_memory_back()

    def _write_log(self) -> None:
        """Write the lines of this turn, as many at once as a pipe takes in one piece."""
        lines = self.desk.take_lines()
        assert self._log is not None
        at = size = 0
        for number, line in enumerate(lines):
            size += len(line)
            if size > select.PIPE_BUF:
                self._log.write("".join(lines[at:number]))
                at, size = number, len(line)
        self._log.write("".join(lines[at:]))

    def _see_to_logs(self, until: float = 0.0) -> None:
        for name, output in self._outputs.items():
            output.finish(until)
            self._count_dropped(name, output.dropped())
        for name, number in self._untold.items():
            if not number:
                continue
            were = "%d line of the %s was" if number == 1 else "%d lines of the %s were"
            why = self._outputs[name].why
            log.warning(were + " dropped, for nobody took them: %s", number, name, why)
            teller = self._outputs.get("log")
            lost = teller.dropped() if teller is not None else 0
            if lost:  # The warning itself was dropped. It is written again at the next look.
                self._count_dropped("log", lost - 1)
                return
            self._untold[name] = 0

    def _count_dropped(self, name: str, number: int) -> None:
        self._untold[name] += number
        if number:
            self.served.board.add(LINES_DROPPED, number)

    # Stopping.

    def _drain(self) -> None:
        """Begin to stop: answer what is under way, and accept no more clients."""
        desk = self.desk
        desk.draining = True
        now = self.loop.now
        self._deadline = now + self.options.shutdown_timeout
        Timer(self.loop).set(self._deadline)  # Otherwise the loop might sleep a second longer.
        # This also ends connections whose answer began before, and did not say that they end.
        desk.keepalive = min(desk.keepalive, IDLE_GOODBYE_SECONDS)
        if self.alone:
            let_nobody_in(self._listener)
        # The kernel has accepted the clients in the queue: closing the socket now would reset them,
        # unless another process has it too. Then more may come, without end, which are not ours.
        for _ in range(waiting_clients(self._listener)):
            if not self._let_in():
                break
        self._watch_listener(False)
        self._listener.close()
        for client in list(self._clients):
            responder = client.responder
            if isinstance(responder, Tunnel):
                self.loop.attempt(responder.part)
            elif client.held:
                self.loop.attempt(client.flush)
        goodbye = Timer(self.loop, self._close_idle)
        goodbye.set(now + min(IDLE_GOODBYE_SECONDS, self.options.shutdown_timeout))

    def _close_idle(self) -> None:
        """Close the connections whose clients have sent nothing since."""
        for client in list(self._clients):
            if client.idle:
                self.loop.attempt(client.hang_up)
