"""Has a WSGI application answer jobs, each on the job's thread."""

from __future__ import annotations

from typing import Any, NamedTuple

from waitress.task import WSGITask

from server.jobs import Job
from wire.environ import environ_of


class Gateway:
    """What asks a WSGI application (PEP 3333). To waitress's tasks it is their server, and the
    channel of each."""

    def __init__(self, application: Any) -> None:
        self.application = application

    @property
    def server(self) -> Gateway:
        return self

    def answer(self, job: Job) -> None:
        """Ask the application, and give the job its answer. Raises Left if the client has gone, and
        what the application raises."""
        Task(self, job).service()


class _Request(NamedTuple):
    """What waitress's task asks of its request."""

    version: str
    command: str


class Task(WSGITask):  # type: ignore[misc]
    """Waitress's WSGI task: it calls the application, and checks what that answers.

    Waitress itself would sort and re-case header names, add `Via`, give HEAD a chunked body and
    close the connection after every 204 and 304; here the client's side writes all answers.
    """

    wrote_header = False
    _whole = False  # whether all of the answer has been given

    def __init__(self, channel: Gateway, job: Job) -> None:
        super().__init__(channel, _Request(job.head.version, job.head.method))
        self._job = job

    def service(self) -> None:
        """Replaces waitress's own, which takes an OSError that the application raises for one of
        the client's socket."""
        self.execute()
        self.finish()

    def get_environment(self) -> dict[str, Any]:
        """Replaces waitress's own, which makes methods upper case, and takes three times as
        long."""
        job = self._job
        environ: dict[str, Any] = environ_of(job.head, job.client.peer[0], job.input, job.length)
        environ["gatehouse.request_id"] = job.head.id
        environ["gatehouse.arrived"] = job.arrived
        environ["gatehouse.lane"] = job.lane.name
        return environ

    def write(self, data: bytes) -> None:
        """Give a piece of the body to the loop, and the head before the first."""
        if not self.complete:
            raise RuntimeError("start_response was not called before the body was written")
        job = self._job
        if not self.wrote_header and self.content_length == len(data):
            self.wrote_header = self._whole = True
            self.content_bytes_written = len(data)
            job.tell(job.give_whole, self.status, self.response_headers, data)
            return
        if not self.wrote_header:
            self.wrote_header = True
            job.tell(job.give_head, self.status, self.response_headers)
        if data:
            self.content_bytes_written += len(data)
            job.give_and_wait(data)

    def finish(self) -> None:
        if not self.wrote_header:
            self.write(b"")
        if not self._whole:
            self._job.tell(self._job.give_end)
