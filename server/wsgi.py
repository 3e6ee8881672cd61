"""Has a WSGI application answer a job, on the job's thread."""

from __future__ import annotations

from typing import Any

from waitress.task import WSGITask

from server.jobs import Job


def answer(application: Any, job: Job) -> None:
    """Ask the application (PEP 3333), and give the job its answer. Raises Left if the client has
    gone, and what the application raises."""
    Task(application, job).service()


class _Channel:
    """What waitress's task asks of its channel."""

    def __init__(self, application: Any, job: Job) -> None:
        self.addr = job.client.peer
        self.server = self
        self.application = application
        self.adj = self
        self._job = job

    # What the task asks of the server and of its adjustments, both of which this is.
    url_prefix = ""
    ident = "gatehouse"
    effective_port = 0
    server_name = "gatehouse"

    def check_client_disconnected(self) -> bool:
        return self._job.over


class _Request:
    """What waitress's task asks of its request."""

    url_scheme = "http"

    def __init__(self, job: Job) -> None:
        head = job.head
        self.version = head.version
        self.command = head.method
        self.path = head.path
        self.query = head.query
        self.request_uri = head.target
        # A name with an underscore is dropped, as waitress does: the environ has the same name for
        # it as for the one with a hyphen.
        self.headers = {
            name.upper().replace("-", "_"): ("; " if name == "cookie" else ", ").join(values)
            for name, values in head.values.items()
            if "_" not in name
        }
        self.get_body_stream = lambda: job.input


class Task(WSGITask):  # type: ignore[misc]
    """Waitress's WSGI task: it makes the environ, calls the application and checks what that
    answers. Only the writing of the answer is replaced.

    Waitress itself would sort and re-case header names, add `Via`, give HEAD a chunked body and
    close the connection after every 204 and 304; here the client's side writes all answers.
    """

    wrote_header = False

    def __init__(self, application: Any, job: Job) -> None:
        super().__init__(_Channel(application, job), _Request(job))
        self._job = job

    def service(self) -> None:
        """Replaces waitress's own, which takes an OSError that the application raises for one of
        the client's socket."""
        self.execute()
        self.finish()

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        environ["REQUEST_METHOD"] = self._job.head.method  # Waitress makes it upper case.
        environ["gatehouse.request_id"] = self._job.head.id
        environ["gatehouse.arrived"] = self._job.arrived
        environ["gatehouse.lane"] = self._job.lane.name
        return environ

    def write(self, data: bytes) -> None:
        """Give a piece of the body to the loop, and the head before the first."""
        if not self.complete:
            raise RuntimeError("start_response was not called before the body was written")
        job = self._job
        whole = self.content_length is not None and len(data) == self.content_length
        if not self.wrote_header and whole:
            self.wrote_header = True
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
        if not self._job.over:
            self._job.tell(self._job.give_end)
