"""Real applications, each with its own client, and what stands between them and Gatehouse.

An application is a program in tests/applications, which `make applications` runs in a virtual
environment of its own: the project's stays small, and no version there has a say here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.harness.client import RawClient, Reply
from tests.harness.service import ROOT, Service, free_port, wait_for

PROGRAMS = ROOT / "tests" / "applications"
PYTHON = ROOT / ".venv-applications" / "bin" / "python"

EVENTS = b"GET /tests-events HTTP/1."
TICK_SECONDS = 0.25


def environment(folder: Path) -> dict[str, str]:
    """What a program sees: its own packages first in PATH, and a home that is nobody's."""
    path = f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(folder), "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}


class Application:
    """A program that serves on a port of 127.0.0.1, `python NAME.py serve PORT`, in `folder`."""

    def __init__(self, name: str, folder: Path, seconds: float) -> None:
        self.port = free_port()
        self._log = (folder / "log").open("wb")
        self._path = folder / "log"
        self.process = subprocess.Popen(
            [PYTHON, PROGRAMS / f"{name}.py", "serve", str(self.port)],
            cwd=folder,
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            wait_for(self._listening, seconds, f"{name} to listen")
        except AssertionError as error:
            self.close()
            raise AssertionError(f"{error}:\n{self.log}") from None

    def _listening(self) -> bool:
        assert self.process.poll() is None, f"exit {self.process.returncode}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    @property
    def log(self) -> str:
        return self._path.read_text(errors="replace")

    def close(self) -> None:
        """End it and every process that it has started: they are one process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()


def use(name: str, url: str, folder: Path, seconds: float) -> Any:
    """What the client of an application found at `url`: `python NAME.py use URL` prints it as one
    JSON document, the last line of its output. AssertionError where it failed, or did not end in
    `seconds`."""
    process = subprocess.Popen(
        [PYTHON, PROGRAMS / f"{name}.py", "use", url],
        cwd=folder,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"the client of {name} took {seconds} s:\n{output}") from None
    assert process.returncode == 0, f"the client of {name} failed:\n{output}"
    return json.loads(output.splitlines()[-1])


class Junction:
    """An application and a source of endless event streams at one address, as an upstream is.

    Few of the applications have an event stream. The first bytes of a connection decide what it
    leads to: the stream, or the application, whose bytes pass untouched. An event comes every
    quarter of a second, with the next number, to all streams at once.
    """

    def __init__(self, application: int) -> None:
        self.number = 0
        self._application = application
        self._streams: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._take, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._loop.call_soon(self._tick)
        self._loop.call_soon(started.set)
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def _tick(self) -> None:
        self.number += 1
        event = b"data: %d\n\n" % self.number
        for stream in self._streams:
            stream.write(b"%x\r\n%s\r\n" % (len(event), event))
        self._loop.call_later(TICK_SECONDS, self._tick)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Python 3.11 prints a traceback for a connection's task that was cancelled: close() does that.
        with contextlib.suppress(OSError, asyncio.CancelledError):
            first = await reader.read(65536)
            if not first.startswith(EVENTS):
                await self._lead(first, reader, writer)
                return
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n"
            )
            self._streams.add(writer)
            await reader.read()
            self._streams.discard(writer)
        writer.close()

    async def _lead(
        self, first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Pass bytes both ways until either side is lost, or both have ended."""
        back, forth = await asyncio.open_connection("127.0.0.1", self._application)
        forth.write(first)
        try:
            await asyncio.gather(_pass(reader, forth), _pass(back, writer))
        finally:
            forth.close()
            writer.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


class Watchers:
    """Clients that each read an endless event stream through one Gatehouse."""

    def __init__(self, service: Service, junction: Junction, count: int) -> None:
        self._junction = junction
        self._clients = [service.client() for _ in range(count)]
        for client in self._clients:
            client.send(EVENTS + b"1\r\nHost: events.example\r\n\r\n")
        for client in self._clients:
            assert Reply(client.head(), b"", True).status == 200

    def check(self) -> None:
        """Each has had every event, in its order, and is having them still."""
        last = self._junction.number + 1
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda client: self._read_on(client, last), self._clients))

    @staticmethod
    def _read_on(client: RawClient, last: int) -> None:
        ending = b"data: %d\n\n\r\n" % last
        while ending not in client.buffer:
            data = client.sock.recv(65536)
            assert data, f"an event stream ended: {client.buffer[-100:]!r}"
            client.buffer += data
        lines = client.buffer.partition(ending)[0] + ending
        numbers = [int(line[6:]) for line in lines.split(b"\n") if line.startswith(b"data: ")]
        assert numbers == list(range(numbers[0], last + 1))

    def close(self) -> None:
        for client in self._clients:
            client.close()
