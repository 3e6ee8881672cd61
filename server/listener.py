"""The listening socket: binding it, and closing it without cutting a client off."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import select
import socket
import struct
import sys

# How many clients may wait to be accepted.
BACKLOG = 1024
SO_ATTACH_FILTER = 26  # of Linux; the socket module does not have it
# Descriptors that are neither client connections nor connections to the upstream: those of the
# database, the logs, and of what libraries open for a moment.
SPARE_DESCRIPTORS = 192
# Connections of clients with no request at the upstream: when it has all that it may have, others
# can still be told so, and ask for /health.
PLACES_BESIDE = 64
# A worker may have so many requests with the upstream at least, however few descriptors there are.
FEWEST_STREAMS = 64
FEWEST_CONNECTIONS = 2 * FEWEST_STREAMS + PLACES_BESIDE
FEWEST_DESCRIPTORS = FEWEST_CONNECTIONS + SPARE_DESCRIPTORS
# Linux allows a process no more by default (fs.nr_open).
MOST_DESCRIPTORS = 1 << 20


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens: clients that come before a worker is ready wait for it. Raises
    OSError."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
    try:
        sock.bind(address)
        # Two processes may bind to one address, and only one of them may listen.
        sock.listen(BACKLOG)
        return sock
    except OSError:
        sock.close()
        raise


def let_nobody_in(listener: socket.socket) -> None:
    """Have the kernel ignore new connections, so that the queue can be emptied before the socket is
    closed. The kernel of a client that connects meanwhile gets no answer and tries again, and is
    refused then. On other systems than Linux such a client may be cut off."""
    if sys.platform == "linux":
        # A packet filter of one instruction, BPF_RET 0: drop. See filter.txt of the kernel.
        drop = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
        program = struct.pack("HP", 1, ctypes.addressof(drop))
        with contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def waiting_clients(listener: socket.socket) -> int:
    """How many clients wait to be accepted. Only Linux tells: elsewhere it is how many may wait."""
    if sys.platform != "linux":
        return BACKLOG + 1
    # Of a socket that listens, tcpi_unacked of struct tcp_info is that number.
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    return int.from_bytes(info[24:28], sys.byteorder)


def somebody_waits(listener: socket.socket) -> bool:
    """Whether a client waits to be accepted."""
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    return bool(poller.poll(0))


def raise_descriptor_limit() -> int:
    """Allow this process as many descriptors as it may have; returns how many these are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # If there is no hard limit, setrlimit still wants a number for the soft one.
    most = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    except (ValueError, OSError):
        return soft
    return max(soft, most)


def most_streams() -> int:
    """How many requests, streams and tunnels a worker may have at once: each takes two descriptors,
    one for the client and one for the upstream."""
    return (connection_room() - PLACES_BESIDE) // 2


def connection_room() -> int:
    """How many connections a worker may have, of clients and to the upstream."""
    return max(FEWEST_CONNECTIONS, raise_descriptor_limit() - SPARE_DESCRIPTORS)
