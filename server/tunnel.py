"""A tunnel: what a request becomes when both sides agree to go on as a WebSocket.

It takes the place of the exchange, for the client and for the connection. Bytes pass in both
directions as they come, until either side ends. Of the frames it only follows where they end.
"""

from __future__ import annotations

import enum
from typing import Final, Protocol

from server.loop import NEVER, Loop, Timer
from server.stream import HIGH_WATER
from server.upstream import Connection, Upstream
from wire.websocket import Frames, close_frame

# Both sides have this many seconds to end a tunnel after each has been sent a Close frame.
GOODBYE_SECONDS: Final = 1.0
# Once the upstream has ended its half, and taken what the client has sent, the client may be silent
# for this many seconds. An application that has turned a client out would otherwise go on paying
# for it until that client pleases to leave.
HALF_CLOSED_SECONDS: Final = 60.0


class TunnelClient(Protocol):
    """The client's side, as far as a tunnel is concerned."""

    loop: Loop
    deadline: Timer
    queued: int
    ended_reading: bool

    @property
    def draining(self) -> bool: ...
    def write(self, piece: bytes) -> None: ...
    def finish(self) -> None: ...
    def end(self) -> None: ...
    def hang_up(self, *, reset: bool = False, why: str = "") -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def take_ahead(self) -> bytes: ...


class State(enum.Enum):
    """What a tunnel is doing."""

    TUNNELLING = "bytes pass in both directions until either side ends"
    PARTING = "the tunnel says goodbye to both sides"
    ENDED = "all is over"


class Tunnel:
    """`silence` is how many seconds it may be silent. Its exchange has been counted as a request
    that is with the upstream. The tunnel goes on counting as that, and as a stream too."""

    __slots__ = (
        "_connection",
        "_silence",
        "_to_client",
        "_to_upstream",
        "_upstream",
        "client",
        "state",
    )

    wants_body = True  # It takes all bytes from the client, until its end.
    hurries_client = False

    def __init__(
        self, client: TunnelClient, connection: Connection, upstream: Upstream, silence: float
    ) -> None:
        self.client = client
        self.state = State.TUNNELLING
        self._connection: Connection | None = connection
        self._upstream = upstream
        self._silence = silence
        self._to_client: Frames | None = Frames()  # None if nothing more may be sent there
        self._to_upstream: Frames | None = Frames()
        connection.exchange = self
        client.deadline.action = self._time_is_up
        upstream.count_streams(1)

    def begin(self, first: bytes) -> None:
        """Pass on the bytes that the upstream has sent after its handshake, and those that the
        client has sent ahead."""
        self._heard()
        if first:
            self.from_upstream(first)
        ahead = self.client.take_ahead()
        if ahead:
            self.from_client(ahead)
        self.client.resume()
        if self.client.draining:
            self.part()

    def _heard(self) -> None:
        # While the client does not keep up, the upstream is not read, so that its silence means
        # nothing. server/client.py cuts a client that takes nothing at all.
        paused = self._connection is not None and self._connection.paused
        when = NEVER if paused else self.client.loop.now + self._patience
        self.client.deadline.set(when)

    @property
    def _patience(self) -> float:
        """For how many seconds nothing may come."""
        connection = self._connection
        if self._to_client is not None or connection is None or connection.queued:
            return self._silence
        return min(self._silence, HALF_CLOSED_SECONDS)

    def _time_is_up(self) -> None:
        silent = f"nothing came from either side for {self._patience:g} s"
        self.client.hang_up(why=silent if self.state is State.TUNNELLING else "")

    # Bytes.

    def from_client(self, data: bytes) -> bytes:
        """Bytes from the client. Returns those that belong to a next request: none."""
        connection, frames = self._connection, self._to_upstream
        if connection is None or frames is None:
            return b""
        if self.state is State.TUNNELLING:
            frames.feed(data)
            self._heard()
            connection.send(data)
        else:
            self._say_goodbye_to_upstream(connection, frames, data)
        if connection.queued > HIGH_WATER:
            self.client.pause()
        return b""

    def from_upstream(self, data: bytes) -> None:
        """Bytes from the upstream."""
        connection, frames = self._connection, self._to_client
        if connection is None or frames is None:
            return
        if self.state is State.TUNNELLING:
            frames.feed(data)
            self._heard()
            self.client.write(data)
        else:
            self._say_goodbye_to_client(frames, data)
        if self.client.queued > HIGH_WATER:
            connection.pause()
            if self.state is State.TUNNELLING:
                self._heard()

    # One side has taken all that was sent to it.

    def client_drained(self) -> None:
        """The client has taken all."""
        if self._connection is not None:
            self._connection.resume()
        self._changed()

    def upstream_progressed(self) -> None:
        """The upstream has taken some of it."""
        if self.state is State.TUNNELLING:
            self._heard()

    def upstream_drained(self) -> None:
        """The upstream has taken all."""
        self._changed()
        self.client.resume()

    def _changed(self) -> None:
        """A side has taken what was sent to it, or has ended."""
        if self.state is State.TUNNELLING:
            self._heard()
        self._parted()
        self._end_if_over()

    # One side ends.

    def client_ended(self) -> None:
        """The client sends no more: its end is passed on."""
        if self._connection is not None:
            self._connection.end()
        self._to_upstream = None
        self._changed()

    def upstream_ended(self) -> None:
        """The upstream sends no more."""
        if self._connection is not None and self._connection.stopped_reading:
            self.upstream_failed()  # It was reset: sending to it has found that out.
            return
        self.client.end()
        self._to_client = None
        self._changed()

    def upstream_failed(self) -> None:
        """The upstream has gone. The client gets what that has sent before, and then the end."""
        self._let_go()
        self.client.finish()

    def _end_if_over(self) -> None:
        """End if both sides have ended, and have taken what was sent to them."""
        connection = self._connection
        if connection is None or not (self.client.ended_reading and connection.ended_reading):
            return
        if not (self.client.queued or connection.queued):
            self.client.hang_up()

    # The service stops.

    def part(self) -> None:
        """End in order: send each side a Close frame, as soon as the present frame has ended. The
        application sees an orderly end, and a browser connects again."""
        connection = self._connection
        if self.state is not State.TUNNELLING or connection is None:
            return
        self.state = State.PARTING
        self.client.deadline.cancel()
        if self._to_client is not None:
            self._say_goodbye_to_client(self._to_client, b"")
        if self._to_upstream is not None:
            self._say_goodbye_to_upstream(connection, self._to_upstream, b"")
        self._parted()

    def _say_goodbye_to_client(self, frames: Frames, data: bytes) -> None:
        self.client.write(data[: frames.until_boundary(data)])
        if frames.at_boundary:
            self._to_client = None
            self.client.write(close_frame(masked=False))
            self.client.end()
            self._parted()

    def _say_goodbye_to_upstream(self, connection: Connection, frames: Frames, data: bytes) -> None:
        connection.send(data[: frames.until_boundary(data)])
        if frames.at_boundary:
            self._to_upstream = None
            connection.send(close_frame(masked=True))
            self._parted()

    def _parted(self) -> None:
        """Once both sides have taken their Close frame, they have GOODBYE_SECONDS to end."""
        connection, deadline = self._connection, self.client.deadline
        if self.state is not State.PARTING or connection is None or deadline.when < NEVER:
            return
        told = self._to_client is None and self._to_upstream is None
        if told and not (self.client.queued or connection.queued):
            deadline.set(self.client.loop.now + GOODBYE_SECONDS)

    # The end.

    def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        self.client.deadline.cancel()
        if connection is not None:
            connection.release(keep=False)

    def settled(self) -> None:
        """The client has all that was sent to it, or is gone."""
        self._let_go()
        if self.state is not State.ENDED:
            self.state = State.ENDED
            self.client.deadline.action = None
            self._upstream.count_streams(-1)
            self._upstream.leave()

    def abandon(self) -> None:
        """A method of it failed, which never should happen: end it. The loop calls this."""
        try:
            self.client.hang_up(reset=True)
        finally:
            self.settled()
