"""What is measured, scene by scene: each starts what it needs, and stops it."""

from __future__ import annotations

import contextlib
import functools
import http.client
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import crowds
import load
import meter
import stage
import verify
from contenders import BARE, GATEHOUSE, OURS, Contender
from rounds import Row, Rows, Sample, Void, in_turns
from stage import Database, Server, Site, Stage

LARGE_MIB = 64
SEEDED = 10_000
# What searching is measured with: more would measure PostgreSQL alone.
SEARCHERS = 4


@dataclass(frozen=True)
class Plan:
    """How much is measured: `rounds` of `seconds` after `warm_up` seconds; the largest table, the
    rows of an import, and how many connections are idle, at most."""

    name: str
    rounds: int
    seconds: int
    warm_up: int
    users: int
    rows: int
    idle: int

    @property
    def few(self) -> int:
        """Rounds of what takes long, or is compared with itself."""
        return min(self.rounds, 3)


CALLS = ("a user by id", "a page of 50", "a create", "a proxied answer of 1 KB")
CONNECTIONS = (1, 16, 64, 256)
MESSAGES = {"of 125 bytes": 125, "of 64 KiB": 1 << 16}
FORMATS = {"CSV": "text/csv", "NDJSON": "application/x-ndjson"}
PAGE, FEW, MANY = "a page, no search", "a search that few match", "a search that all match"


class Targets:
    """Files of request targets for a database."""

    def __init__(self, folder: Path, database: Database, uri: str) -> None:
        folder.mkdir()
        self.folder = folder
        ids = database.drawn(uri, "id")
        self.known = ids[0]
        self.user = self.write("user", [f"/users/{user}" for user in ids])
        self.page = self.write("page", ["/users?limit=50"])
        self.small = self.write("small", ["/small?page=1&sort=name"])
        # Anywhere in the table, not only at its beginning.
        self.pages = self.write("pages", [f"/users?limit=50&after={user}" for user in ids])

    def write(self, name: str, targets: list[str]) -> Path:
        path = self.folder / name
        path.write_text("".join(target + "\n" for target in targets))
        return path

    def of(self, call: str) -> Path | None:
        """Those of one of CALLS; None for a create."""
        return dict(zip(CALLS, (self.user, self.page, None, self.small), strict=True))[call]


class Bench:
    """What scenes have in common: made when the first of them asks for it, ended at the end."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        plan: Plan,
        contenders: Sequence[Contender],
        against: str | None,
    ) -> None:
        self.stack, self.plan, self.contenders, self.against = stack, plan, contenders, against
        self.stage: Stage = stack.enter_context(stage.stage())
        self.databases: list[Database] = []

    def server(self, started: contextlib.AbstractContextManager[Database]) -> Database:
        self.databases.append(self.stack.enter_context(started))
        return self.databases[-1]

    @functools.cached_property
    def database(self) -> Database:
        return self.server(stage.embedded_postgres())

    @functools.cached_property
    def uri(self) -> str:
        return self.database.create("bench", SEEDED)

    @functools.cached_property
    def targets(self) -> Targets:
        return Targets(self.stage.folder / "targets", self.database, self.uri)

    @functools.cached_property
    def tables(self) -> Tables:
        return Tables(self)

    @functools.cached_property
    def upstream(self) -> Server:
        return stage.upstream(self.stage)

    @functools.cached_property
    def site(self) -> Site:
        return Site(self.stage, self.uri, url(self.upstream))

    def taking_part(self, scene: str) -> list[Contender]:
        return [each for each in self.contenders if scene in each.scenes]


class Tables:
    """Tables of several sizes on a PostgreSQL that can search, where there is one."""

    def __init__(self, bench: Bench) -> None:
        self.database = bench.server(stage.searching_postgres())
        self.sites: dict[int, Site] = {}
        self.targets: dict[int, Targets] = {}
        for size in sorted((1_000, 100_000, bench.plan.users)):
            print(f"filling a table of {size:,} users ...", flush=True)
            uri = self.database.create(f"users_{size}", size)
            self.sites[size] = replace(bench.site, uri=uri)
            folder = bench.stage.folder / f"targets-{size}"
            self.targets[size] = Targets(folder, self.database, uri)


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


@contextlib.contextmanager
def started(contenders: Sequence[Contender], site: Site) -> Iterator[dict[str, Server]]:
    """Their servers, all at once."""
    servers: dict[str, Server] = {}
    try:
        for contender in contenders:
            servers[contender.name] = contender.start(site)
        yield servers
    finally:
        for server in servers.values():
            site.stage.stop(server)


def warm_up(rows: Sequence[str], measure: Callable[[str], Sample]) -> None:
    for name in rows:
        with contextlib.suppress(Void):  # which will be seen when it is measured
            measure(name)


def answers_right(server: Server, check: Callable[..., None], *given: object) -> None:
    """Raises RuntimeError with the end of the server's log where it does not."""
    try:
        check(server.port, *given)
    except (AssertionError, OSError, http.client.HTTPException) as problem:
        raise RuntimeError(f"{server.name}: {problem}\n{server.tail()}") from problem


def calls(bench: Bench) -> dict[str, Rows]:
    """The four calls."""
    plan, targets = bench.plan, bench.targets
    contenders = {each.name: each for each in bench.taking_part("proxy")}
    found: dict[str, Rows] = {}
    with started(list(contenders.values()), bench.site) as servers:
        for name, server in servers.items():
            if "users" in contenders[name].scenes:
                answers_right(server, verify.check_users, targets.known)
            answers_right(server, verify.check_proxy, bench.upstream.port)
        for call in CALLS:
            scene = "proxy" if call == CALLS[3] else "users"
            names = [name for name in servers if scene in contenders[name].scenes]
            measure = call_of(bench, servers, call, plan.seconds)
            warm_up(names, call_of(bench, servers, call, plan.warm_up))
            found[call] = in_turns(names, plan.rounds, measure, call)
        found["memory"] = {
            name: Row([{"memory_mib": meter.memory_mib(server.pid)}])
            for name, server in servers.items()
        }
    return found


def call_of(
    bench: Bench, servers: dict[str, Server], call: str, seconds: int
) -> Callable[[str], Sample]:
    database = None if call == CALLS[3] else bench.database
    file = bench.targets.of(call)
    return lambda name: load.requests(servers[name], file, seconds, database=database)


def large(bench: Bench) -> dict[str, Rows]:
    """64 MiB through the proxy, four at a time; amounts are MiB."""
    with started(bench.taking_part("large"), bench.site) as servers:

        def measure(name: str) -> Sample:
            return load.downloads(servers[name], "/large", LARGE_MIB << 20)

        warm_up(list(servers), measure)
        return {"64 MiB": in_turns(list(servers), bench.plan.rounds, measure, "64 MiB")}


def growth(bench: Bench) -> dict[str, Rows]:
    """More connections, and larger tables."""
    plan, tables = bench.plan, bench.tables
    found: dict[str, Rows] = {}
    counts = {str(count): count for count in CONNECTIONS}
    with started([GATEHOUSE], bench.site) as servers:
        for call in (CALLS[0], CALLS[3]):

            def measure(count: str, call: str = call) -> Sample:
                file = bench.targets.of(call)
                return load.requests(servers[OURS], file, plan.seconds, counts[count])

            warm_up(["16"], measure)
            found[call] = in_turns(list(counts), plan.few, measure, f"{call}, connections")
    with contextlib.ExitStack() as stack:
        services = {
            f"{size:,}": (
                stack.enter_context(started([GATEHOUSE], site))[OURS],
                tables.targets[size],
            )
            for size, site in tables.sites.items()
        }

        def page(size: str) -> Sample:
            service, targets = services[size]
            return load.requests(service, targets.pages, plan.seconds, database=tables.database)

        warm_up(list(services), page)
        found["a page of so many users"] = in_turns(
            list(services), plan.few, page, "a page of so many users"
        )
    return found


def search(bench: Bench) -> dict[str, Rows]:
    """Searches that few and that all match, beside a page, in the largest table."""
    plan, tables = bench.plan, bench.tables
    site, targets = tables.sites[plan.users], tables.targets[plan.users]
    found = tables.database.drawn(site.uri, "lower(split_part(name, ' ', 2))")
    after = tables.database.drawn(site.uri, "id")
    files = {
        PAGE: targets.pages,
        FEW: targets.write("few", [f"/users?limit=50&q={text}" for text in found]),
        MANY: targets.write("many", [f"/users?limit=50&q=example&after={user}" for user in after]),
    }
    has_index = tables.database.fetch(
        "SELECT 1 FROM pg_indexes WHERE indexname = 'users_search'", site.uri
    )
    with started([GATEHOUSE], site) as servers:

        def measure(name: str) -> Sample:
            if name == FEW and not has_index:
                raise Void("this PostgreSQL has no pg_trgm; Debian's package postgresql has it")
            service = servers[OURS]
            return load.requests(service, files[name], plan.seconds, SEARCHERS, tables.database)

        warm_up(list(files), measure)
        return {"search": in_turns(list(files), plan.rounds, measure, "search")}


def export(bench: Bench) -> dict[str, Rows]:
    """All users of the largest table, in each format."""
    plan, tables = bench.plan, bench.tables
    with started([GATEHOUSE], tables.sites[plan.users]) as servers:

        def measure(name: str) -> Sample:
            return load.export(servers[OURS], FORMATS[name], tables.database, plan.users)

        return {"export": in_turns(list(FORMATS), min(plan.rounds, 2), measure, "export")}


def imports(bench: Bench) -> dict[str, Rows]:
    """New users in one request, and each in a create of its own."""
    plan = bench.plan
    uri = bench.database.create("imports", SEEDED)
    with started([GATEHOUSE], replace(bench.site, uri=uri)) as servers:

        def measure(name: str) -> Sample:
            if name == "import":
                return load.import_(servers[OURS], bench.database, plan.rows)
            return load.requests(servers[OURS], None, plan.seconds, database=bench.database)

        return {"import": in_turns(["import", "creates"], plan.few, measure, "import")}


def idle(bench: Bench) -> dict[str, Rows]:
    """Idle event streams and tunnels, and small answers through the proxy beside them."""
    count = min(bench.plan.idle, crowds.most())
    events = stage.event_upstream(bench.stage)
    site = replace(bench.site, upstream=url(events), connections=2 * count + 1024)
    contenders = {each.name: each for each in bench.taking_part("tunnels")}
    found: dict[str, Rows] = {}
    for kind in crowds.KINDS:

        def measure(name: str, kind: str = kind) -> Sample:
            # Each time in a new process, which has no memory left over from the last crowd.
            with started([contenders[name]], site) as servers:
                return crowd(bench, servers[name], kind, count)

        found[kind] = in_turns(list(contenders), bench.plan.few, measure, f"idle {kind}")
    bench.stage.stop(events)
    return found


def crowd(bench: Bench, server: Server, kind: str, count: int) -> Sample:
    """So many of a kind, and what that costs the server."""
    without = load.requests(server, bench.targets.small, bench.plan.seconds)
    before = meter.memory_mib(server.pid)
    try:
        with crowds.opened(server.port, kind, count):
            memory, threads = meter.memory_mib(server.pid), meter.threads(server.pid)
            beside = load.requests(server, bench.targets.small, bench.plan.seconds)
    except OSError as problem:
        raise Void(repr(problem)) from problem
    return {
        "count": count,
        "kib_each": (memory - before) * 1024 / count,
        "threads": threads,
        "rate": beside["rate"],
        "rate_without": without["rate"],
        "p99_ms": beside["p99_ms"],
        "p99_ms_without": without["p99_ms"],
    }


def websockets(bench: Bench) -> dict[str, Rows]:
    """Messages that come back, through the proxy and straight to the upstream."""
    events = stage.event_upstream(bench.stage)
    found: dict[str, Rows] = {}
    with started(
        bench.taking_part("tunnels"), replace(bench.site, upstream=url(events))
    ) as servers:
        reached = {**servers, "no proxy": events}
        for what, size in MESSAGES.items():

            def measure(name: str, size: int = size) -> Sample:
                return load.echoes(reached[name], size, bench.plan.seconds)

            warm_up(list(reached), measure)
            found[what] = in_turns(list(reached), bench.plan.rounds, measure, f"messages {what}")
    bench.stage.stop(events)
    return found


def start(bench: Bench) -> dict[str, Rows]:
    """One process of each: how soon it answers, and what memory it has then and after a load."""
    contenders = {each.name: each for each in [*bench.taking_part("start"), BARE]}
    site = replace(bench.site, processes=1)

    def measure(name: str) -> Sample:
        begun = time.perf_counter()
        with started([contenders[name]], site) as servers:
            server = servers[name]
            status = verify.exchange(server.port, "GET", "/small")[0]
            seconds = time.perf_counter() - begun
            verify.expect("the first answer", status, 200)
            first = meter.memory_mib(server.pid)
            load.requests(server, bench.targets.small, bench.plan.warm_up)
            loaded = meter.memory_mib(server.pid)
        return {"start_ms": seconds * 1000, "first_mib": first, "loaded_mib": loaded}

    return {"start": in_turns(list(contenders), bench.plan.few, measure, "start")}


def against(bench: Bench) -> dict[str, Rows]:
    """The four calls of Gatehouse as it is and as it was at a commit."""
    if bench.against is None:
        return {}
    folder = bench.stage.folder / "against"
    folder.mkdir()
    project = stage.project_of(bench.against, folder)
    name = f"at {bench.against}"
    # Each has a table that is filled alike and that nothing else has written to.
    site = replace(bench.site, uri=bench.database.create("now", SEEDED))
    then = replace(bench.site, uri=bench.database.create("before", SEEDED, project))
    users = {
        OURS: Targets(bench.stage.folder / "targets-now", bench.database, site.uri),
        name: Targets(bench.stage.folder / "targets-then", bench.database, then.uri),
    }
    former = Contender(name, "", lambda site: stage.gatehouse(site, project), frozenset())
    found: dict[str, Rows] = {}
    with started([GATEHOUSE], site) as ours, started([former], then) as theirs:
        servers = ours | theirs
        for call in CALLS:

            def measure(who: str, call: str = call) -> Sample:
                file = users[who].of(call)
                seconds, database = bench.plan.seconds, bench.database
                return load.requests(servers[who], file, seconds, database=database)

            warm_up(list(servers), measure)
            found[call] = in_turns(list(servers), bench.plan.rounds, measure, f"against, {call}")
    return found


SCENES: dict[str, Callable[[Bench], dict[str, Rows]]] = {
    "calls": calls,
    "large": large,
    "websockets": websockets,
    "idle": idle,
    "start": start,
    "import": imports,
    "growth": growth,
    "search": search,
    "export": export,
    "against": against,
}
