"""Writers that remember every answer, and the comparison with what the database then holds."""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from tests.harness import Reply, call, wait_for

# What may be found for one email address: None is no user, a mapping is a user that has these
# members. After an acknowledgement that is one state, the whole user as it was answered.
State = dict[str, Any] | None


class Audit:
    """Concurrent writers at a service; each creates, changes and deletes users of its own.

    `acknowledged`, `refused` and `unknown` count the answers, `acknowledgements` holds the
    moment (`time.monotonic`) of each acknowledgement, `wrong` every answer that can never be
    right here: no answer at all, a conflict with oneself, a user of one's own not found. Where
    workers are killed, answers `may_be_cut`: the outcome of such a write is unknown, and `cut`
    counts them.
    """

    def __init__(self, port: int, writers: int = 4, *, may_be_cut: bool = False) -> None:
        self.port = port
        self.acknowledged = self.refused = self.unknown = self.cut = 0
        self._may_be_cut = may_be_cut
        self.acknowledgements: list[float] = []
        self.slowest = 0.0
        self.wrong: list[str] = []
        self._states: dict[str, list[State]] = {}
        self._run = uuid.uuid4().hex[:8]
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=(number,), daemon=True)
            for number in range(writers)
        ]

    def __enter__(self) -> Audit:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let each writer finish what it has sent."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a writer still waits for an answer"

    def more(self, count: int, seconds: float = 30) -> None:
        """Wait until `count` more writes are acknowledged."""
        goal = self.acknowledged + count
        self._wait(lambda: self.acknowledged >= goal, seconds, f"{count} more acknowledged writes")

    def more_refused(self, count: int, seconds: float = 30) -> None:
        """Wait until `count` more writes are answered with 503."""
        goal = self.refused + self.unknown + count
        self._wait(lambda: self.refused + self.unknown >= goal, seconds, f"{count} more refused")

    def resumed(self, moment: float, seconds: float = 30) -> float:
        """Seconds from `moment` to the first acknowledgement after it, once there is one."""
        self._wait(
            lambda: bool(self.acknowledgements) and self.acknowledgements[-1] > moment,
            seconds,
            "writes to be acknowledged again",
        )
        return min(time for time in self.acknowledgements if time > moment) - moment

    def _wait(self, reached: Callable[[], bool], seconds: float, what: str) -> None:
        wait_for(lambda: self.wrong or reached(), seconds, what)
        assert not self.wrong, self.wrong[0]

    def _write(self, writer: int) -> None:
        for number in itertools.count():
            if self._stopping.is_set():
                return
            email = f"{self._run}-{writer}-{number}@example.com"
            body = {"email": email, "name": "first"}
            self._states[email] = [None]
            if number % 2:
                user = self._send("POST", "/users", 201, body)
            else:
                user = self._send("PUT", f"/users/{uuid.uuid4()}", 201, body)
            if user is None:
                continue
            target = f"/users/{user['id']}"
            change = {"email": email, "name": "second"}
            user = self._send("PATCH" if number % 3 else "PUT", target, 200, change)
            if user is not None and number % 4 == 0:
                self._send("DELETE", target, 204, None, email)

    def _send(
        self, method: str, target: str, status: int, body: Any, email: str | None = None
    ) -> State:
        """Send one write, once; returns the user where it is acknowledged and there is one."""
        if self._stopping.is_set():
            return None
        states = self._states[email or body["email"]]
        after: State = None if body is None else dict(body)
        began = time.monotonic()
        try:
            reply = call(self.port, method, target, body, timeout=30)
        except (OSError, EOFError) as error:
            cut = self._may_be_cut and isinstance(error, ConnectionError | EOFError)
            self._count("cut" if cut else "wrong", f"{method} {target}: no answer: {error!r}")
            states.append(after)
            return None
        finally:
            self.slowest = max(self.slowest, time.monotonic() - began)
        if reply.status == status:
            user: State = reply.json() if reply.body else None
            states[:] = [user]
            if not _fits(user, after):
                self._count("wrong", f"{method} {target}: {reply}")
            self._count("acknowledged")
            return user
        if is_refusal(reply):
            self._count("refused")
        elif is_unknown(reply):
            states.append(after)
            self._count("unknown")
        else:
            states.append(after)
            self._count("wrong", f"{method} {target}: {reply}")
        # What Retry-After asks for, shortened: the moment of recovery is being measured.
        self._stopping.wait(0.02)
        return None

    def _count(self, what: str, detail: str = "") -> None:
        with self._lock:
            if what == "wrong":
                self.wrong.append(detail)
                return
            setattr(self, what, getattr(self, what) + 1)
            if what == "acknowledged":
                self.acknowledgements.append(time.monotonic())

    def findings(self) -> dict[str, list[str]]:
        """Compare with what the service finds now: addresses `lost`, and `present` wrongly.

        `lost`: the last acknowledged state is not there to the letter (its id and times
        included), nor one that an unknown outcome allows. `present`: a user is there although
        its creation was refused, or its deletion acknowledged.
        """
        found = {user["email"]: user for user in all_users(self.port)}
        lost, present = [], []
        for email, states in self._states.items():
            user = found.get(email)
            if any(_fits(user, state) for state in states):
                continue
            if user is not None and states == [None]:
                present.append(f"{email}: {user}")
            else:
                lost.append(f"{email}: {user}, not one of {states}")
        return {"lost": lost, "present": present}


def _fits(user: State, state: State) -> bool:
    if user is None or state is None:
        return user is state
    return state.items() <= user.items()


def is_refusal(reply: Reply) -> bool:
    """Whether this says that the database cannot be used and the write was not done."""
    return _is_unavailable(reply) and "outcome" not in reply.json()


def is_unknown(reply: Reply) -> bool:
    """Whether this says that nobody can tell whether the write was done."""
    return _is_unavailable(reply) and reply.json().get("outcome") == "unknown"


def _is_unavailable(reply: Reply) -> bool:
    return reply.status == 503 and reply.json()["type"] == "urn:gatehouse:database-unavailable"


def all_users(port: int) -> list[dict[str, Any]]:
    """Every user, read page by page."""
    users: list[dict[str, Any]] = []
    target: str | None = "/users?limit=500"
    while target:
        reply = call(port, "GET", target)
        assert reply.status == 200, reply
        page = reply.json()
        users += page["users"]
        target = page["next"]
    return users
