"""`app.py --dev`, which `make run` runs: all parts start, work, survive, and stop."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.harness import (
    DEAD_DATABASE,
    call,
    chunked,
    copied,
    exchange,
    free_port,
    request,
    unprivileged,
    wait_for,
)


class Dev:
    """A run in a checkout; `lines` are those of its output up to the last thing to try. `within` is a
    command that runs it."""

    def __init__(
        self, checkout: Path, port: int, within: Sequence[str] = (), **settings: str
    ) -> None:
        environ = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
        self.process = subprocess.Popen(
            [*within, sys.executable, "app.py", "--dev"],
            cwd=checkout,
            env=environ | {"PORT": str(port)} | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if "curl -N" in line:
                break

    @property
    def to_try(self) -> list[str]:
        return [line.strip() for line in self.lines if line.startswith("  curl ")]

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def checkout() -> Iterator[Path]:
    """A copy at a path with a space, too long for a Unix socket in it; no process survives."""
    # Not pytest's tmp_path: as root PostgreSQL runs as a user of its own, who must get in there.
    folder = Path(tempfile.mkdtemp(prefix="gatehouse-dev-"))
    folder.chmod(0o755)
    copy = folder / ("a long path " + "x" * 100)
    copy.mkdir()
    yield copied(copy)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if folder in Path(process.cwd()).parents:
                process.kill()
                process.wait(10)
    shutil.rmtree(folder)


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def gone(processes: list[psutil.Process]) -> bool:
    return not any(alive(process) for process in processes)


def test_all_parts_start_work_and_stop(checkout: Path) -> None:
    files, port = set(checkout.iterdir()), free_port()
    run = Dev(checkout, port)
    create, health, events = (shlex.split(line) for line in run.to_try)
    given = ["-H", "Content-Type: application/json", "-d"]
    assert create[:5] == ["curl", f"http://127.0.0.1:{port}/users", *given]
    answer = call(port, "POST", "/users", create[5].encode(), {"Content-Type": "application/json"})
    assert answer.status == 201, answer
    user = answer.json()
    assert health == ["curl", f"http://127.0.0.1:{port}/health"]
    assert call(port, "GET", "/health").json()["status"] == "ok"
    assert events == ["curl", "-N", f"http://127.0.0.1:{port}/events"]
    stream = call(port, "GET", "/events?n=2")
    assert stream.complete and stream.body.count(b"\ndata: tick ") == 2
    echo = call(port, "PATCH", "/any//where?x=%7e", b"body").json()
    assert (echo["method"], echo["target"], echo["body"]) == ("PATCH", "/any//where?x=%7e", "body")

    sent = request(b"POST /else HTTP/1.1", b"Transfer-Encoding: chunked") + chunked(b"x" * 99999)
    assert exchange(port, sent, "POST").json()["body"] == "x" * 99999

    # An endless stream that someone watches does not hold up the end.
    watcher = socket.create_connection(("127.0.0.1", port))
    watcher.sendall(b"GET /events HTTP/1.1\r\nHost: h\r\n\r\n")
    assert watcher.recv(1) == b"H"
    children = run.children()
    assert run.end(signal.SIGINT) == 0
    watcher.close()
    assert gone(children)
    assert {path.name for path in set(checkout.iterdir()) - files} <= {".data", "__pycache__"}

    run = Dev(checkout, port)
    assert call(port, "GET", f"/users/{user['id']}").json() == user
    children = run.children()
    assert run.end(signal.SIGTERM) == 0
    assert gone(children)


@pytest.mark.slow
def test_a_killed_run_is_no_trouble_for_the_next(checkout: Path) -> None:
    # It is no setting, so that it has no effect here either.
    (checkout / ".env").write_text("PGOPTIONS=--no-such-option=1\n")
    run = Dev(checkout, port := free_port())
    children = run.children()
    left = [process for process in children if process.name() == "postgres"]
    others = [process for process in children if process not in left]
    run.end(signal.SIGKILL)
    # Gatehouse kept the port.
    wait_for(lambda: gone(others), what="the end of Gatehouse")
    assert left and not gone(left)
    run = Dev(checkout, port)
    assert gone(left)
    assert call(port, "GET", "/health").json()["database"]["status"] == "up"
    assert run.end(signal.SIGTERM) == 0
    # A machine that was restarted may have given the number to another process.
    (checkout / ".data/postgres/postmaster.pid").write_text(f"{os.getpid()}\n")
    run = Dev(checkout, port := free_port())
    assert call(port, "GET", "/health").json()["database"]["status"] == "up"

    second = Dev(checkout, free_port())
    assert second.lines == ["another `make run` is using .data/"]
    assert second.process.wait(10) == 1

    (postgres,) = (
        child
        for child in run.children()
        if child.ppid() == run.process.pid and child.name() == "postgres"
    )
    postgres.kill()
    # Gatehouse is not down because its database is.
    told = next(line for line in run.process.stdout or () if "ended" in line)
    assert told == (
        "PostgreSQL (see .data/postgres.log) ended by itself, with exit code -9;"
        " Gatehouse goes on without it until you start `make run` again\n"
    )
    assert call(port, "GET", "/anything").status == 200
    assert call(port, "GET", "/users").json()["type"] == "urn:gatehouse:database-unavailable"
    assert call(port, "GET", "/health").json()["status"] == "degraded"

    children = run.children()
    (gatehouse,) = (child for child in children if "app.py" in child.cmdline())
    gatehouse.kill()
    out, _ = run.process.communicate(timeout=30)
    assert run.process.returncode == 1
    assert "Gatehouse ended by itself, with exit code -9\n" in out
    assert gone(children)


def test_what_cannot_work_is_told_before_anything_is_started(checkout: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        run = Dev(checkout, taken.getsockname()[1])
        assert run.process.wait(10) == 1
        (line,) = run.lines
        assert str(taken.getsockname()[1]) in line and "in use" in line
    run = Dev(checkout, 0, THREADS="x", WORKERS="y")
    assert run.process.wait(10) == 2
    assert sorted(line.split()[0] for line in run.lines) == ["THREADS", "WORKERS"]
    assert not (checkout / ".data").exists()


def test_a_misspelt_setting_is_told_before_anything_is_started(checkout: Path) -> None:
    (checkout / ".env").write_text("USERS_TOKENS=one\nTHREADS=few\n")
    run = Dev(checkout, 0)
    assert run.process.wait(10) == 2
    assert [line.split()[0] for line in run.lines] == ["THREADS", "USERS_TOKENS"]
    assert not (checkout / ".data").exists()


@pytest.mark.parametrize("form", ["POSTGRES_URI", "POSTGRES_URI_FILE"])
def test_a_database_that_was_named_is_the_one_that_is_used(checkout: Path, form: str) -> None:
    """No other is started in its place, and whoever has copied .env.example is told why."""
    (checkout / "uri").write_text(DEAD_DATABASE + "\n")
    given = DEAD_DATABASE if form == "POSTGRES_URI" else str(checkout / "uri")
    run = Dev(checkout, free_port(), **{form: given})
    assert run.process.wait(30) == 1
    assert run.lines[-1] == (
        f"the migrations could not be applied; without {form} in the environment a database is"
        " started here"
    )
    (checkout / ".env").write_text(f"{form}={given}\n")
    run = Dev(checkout, free_port())
    assert run.process.wait(30) == 1
    assert run.lines[-1].endswith(f"; without {form} in .env a database is started here")
    assert not (checkout / ".data").exists()


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root runs PostgreSQL as another user")


def refused(run: Dev) -> str:
    """The one line with which a run ends that cannot begin."""
    assert run.process.wait(30) == 1
    (line,) = run.lines
    return line


def test_root_lets_others_enter_and_see_nothing_else(as_root: None, checkout: Path) -> None:
    """Every folder up to `/` could be read by everybody after a run, /root too."""
    for mode, then in ((0o700, 0o701), (0o711, 0o711), (0o755, 0o755)):
        checkout.parent.chmod(mode)
        run = Dev(checkout, free_port())
        told = [line for line in run.lines if line.startswith("Others may enter ")]
        assert told == [
            f"Others may enter {checkout.parent} from now on: as root PostgreSQL runs as pgserver"
        ] * (mode != then)
        assert run.to_try
        assert run.end(signal.SIGTERM) == 0
        assert checkout.parent.stat().st_mode & 0o777 == then


def test_root_lets_others_read_the_programs(as_root: None, checkout: Path) -> None:
    """`make install` under umask 077."""
    library = checkout / "pg/lib/libpq.so"
    library.parent.mkdir(parents=True)
    library.touch(0o600)
    asked = "import dev, pathlib; dev.let_in(pathlib.Path('pg').resolve())"
    subprocess.run([sys.executable, "-c", asked], cwd=checkout, check=True)
    assert library.stat().st_mode & 0o777 == 0o604


def test_root_leaves_another_users_data_alone(as_root: None, checkout: Path) -> None:
    """It took the folder, and that user could never use it again."""
    data = checkout / ".data"
    data.mkdir()
    os.chown(data, 12345, 12345)
    told = f"{data} belongs to user 12345: run `make run` as that user"
    assert refused(Dev(checkout, free_port())) == told
    assert not [*data.iterdir()]


def test_a_folder_that_may_not_be_written_is_one_line(checkout: Path) -> None:
    data = checkout / ".data"
    data.mkdir(mode=0o555)
    told = refused(Dev(checkout, free_port(), unprivileged()))
    assert told.startswith(f"{data} belongs to ") and "cannot be written: remove it, or " in told
    data.rmdir()
    data.touch()
    told = refused(Dev(checkout, free_port()))
    assert told == f"{data} cannot be used as a folder: File exists"
    data.unlink()
    checkout.chmod(0o555)
    told = refused(Dev(checkout, free_port(), unprivileged()))
    checkout.chmod(0o755)
    assert told == f"{data} cannot be made: Permission denied"
