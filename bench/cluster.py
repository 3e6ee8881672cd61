"""Failovers of a real cluster under write load, with an audit of every answer.

Patroni, etcd and PostgreSQL from the system's packages (Debian: patroni, etcd-server, postgresql,
haproxy, pgbouncer), three members on 127.0.0.1, each behind relays of its own: those at which
clients, standbys and HAProxy reach it, and the one at which it reaches etcd. In turn the primary is
switched over, killed, and cut off from everything. Exits with 1 where an acknowledged write is lost
or a refused one is there. Asynchronous standbys receive nothing for a while before each kill, and
what is lost then is counted.

    python bench/cluster.py --failovers 20
    python bench/cluster.py --through haproxy --failovers 6
    python bench/cluster.py --through pgbouncer --failovers 6
    python bench/cluster.py --asynchronous --failovers 6
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import psycopg2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.harness import Service, free_port, pw_migrate, wait_for
from tests.harness.audit import Audit
from tests.harness.servers import Relay

USER = "postgres"
PATH = os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin"
# So many writes at least are acknowledged while asynchronous standbys receive nothing.
UNSENT = 100


def binaries() -> Path:
    """The folder of the newest PostgreSQL of the system's packages."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name)
    )
    if not found or not all(shutil.which(name, path=PATH) for name in ("patroni", "etcd")):
        raise SystemExit("this needs Debian's packages patroni, etcd-server and postgresql")
    return found[-1]


class Process:
    """A process of its own session, run as `user`; its output goes to a file in `folder`."""

    def __init__(self, folder: Path, name: str, *command: object, user: str | None = USER) -> None:
        self.log = (folder / f"{name}.log").open("ab")
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            user=user if os.geteuid() == 0 else None,
            env={"PATH": PATH, "ETCD_UNSUPPORTED_ARCH": "arm64"},
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)
        self.log.close()


class Member:
    """One Patroni and its PostgreSQL, and the relays that are its network."""

    def __init__(self, folder: Path, name: str, etcd: int, synchronous: bool) -> None:
        self.folder, self.name = folder, name
        self.postgres, self.api = free_port(), free_port()
        self.network = Relay(self.postgres)
        self.to_etcd = Relay(etcd)
        self.health = Relay(self.api)
        role = {"username": USER, "password": USER}
        dcs = {
            "ttl": 20,
            "loop_wait": 1,
            "retry_timeout": 3,
            "primary_start_timeout": 0,
            "maximum_lag_on_failover": 2**30,
            "synchronous_mode": synchronous,
            "synchronous_mode_strict": synchronous,
            "postgresql": {"use_pg_rewind": True, "parameters": {"wal_log_hints": "on"}},
        }
        config = {
            "scope": "gatehouse",
            "name": name,
            "restapi": {
                "listen": f"127.0.0.1:{self.api}",
                "connect_address": f"127.0.0.1:{self.health.port}",
            },
            # As proxies, or it would find out etcd's own port and go there.
            "etcd3": {"hosts": [f"127.0.0.1:{self.to_etcd.port}"], "use_proxies": True},
            "bootstrap": {"dcs": dcs, "initdb": [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}]},
            "postgresql": {
                "listen": f"127.0.0.1:{self.postgres}",
                "connect_address": f"127.0.0.1:{self.network.port}",
                "data_dir": str(folder / f"{name}-data"),
                "bin_dir": str(binaries()),
                "authentication": {"superuser": role, "replication": role, "rewind": role},
                "parameters": {
                    "unix_socket_directories": str(folder),
                    "shared_buffers": "16MB",
                    "wal_sender_timeout": "10s",
                },
                "pg_hba": [
                    "local all all trust",
                    "host all all 127.0.0.1/32 trust",
                    "host replication all 127.0.0.1/32 trust",
                ],
            },
        }
        path = folder / f"{name}.yml"
        path.write_text(json.dumps(config))
        self.process = Process(folder, name, "patroni", path)

    def ask(self, path: str, body: Any = None) -> Any:
        """What Patroni's API answers; None where it does not."""
        data = None if body is None else json.dumps(body).encode()
        try:
            url = f"http://127.0.0.1:{self.api}{path}"
            with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as reply:
                text = reply.read()
        except (OSError, urllib.error.HTTPError):
            return None
        try:
            return json.loads(text)
        except ValueError:
            return text

    def postmaster(self) -> psutil.Process:
        pid = (self.folder / f"{self.name}-data" / "postmaster.pid").read_text().split()[0]
        return psutil.Process(int(pid))

    def kill_postgres(self) -> None:
        """kill -9 of the postmaster and all its children."""
        postmaster = self.postmaster()
        postmaster.suspend()
        for process in [postmaster, *postmaster.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def send_no_more(self) -> None:
        """Keep from the standbys what is written from now on, until PostgreSQL is killed."""
        for process in self.postmaster().children():
            if "walsender" in " ".join(process.cmdline()):
                process.suspend()

    def written(self) -> int:
        """How many bytes of write-ahead log there have been."""
        with (
            contextlib.closing(
                psycopg2.connect(host="127.0.0.1", port=self.postgres, user=USER, dbname="postgres")
            ) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("SELECT pg_current_wal_lsn() - '0/0'")
            return int(cursor.fetchall()[0][0])

    def cut_off(self) -> None:
        for relay in (self.network, self.to_etcd, self.health):
            relay.blackhole()

    def heal(self) -> None:
        for relay in (self.network, self.to_etcd, self.health):
            relay.heal()

    def stop(self) -> None:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cwd() == str(self.folder / f"{self.name}-data"):
                    process.kill()
        self.process.stop()


class Cluster:
    def __init__(self, stack: contextlib.ExitStack, members: int, synchronous: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gatehouse-cluster-"))
        stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        if os.geteuid() == 0:
            shutil.chown(self.folder, USER)
        self.stack = stack
        client, peer = free_port(), free_port()
        urls = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
        etcd = Process(
            self.folder, "etcd", "etcd", "--data-dir", self.folder / "etcd-data",
            "--listen-client-urls", urls[0], "--advertise-client-urls", urls[0],
            "--listen-peer-urls", urls[1], "--initial-advertise-peer-urls", urls[1],
            "--initial-cluster", f"default={urls[1]}",
        )  # fmt: skip
        stack.callback(etcd.stop)
        wait_for(lambda: self._decided(urls[0]), 20, "etcd to know its version")
        self.synchronous = synchronous
        self.members: list[Member] = []
        for number in range(members):
            member = Member(self.folder, f"m{number}", client, synchronous)
            stack.callback(member.stop)
            self.members.append(member)
            self.wait_whole()

    @staticmethod
    def _decided(url: str) -> bool:
        # Patroni, which asks for it, ends where it is not a number yet.
        try:
            with urllib.request.urlopen(f"{url}/version", timeout=5) as reply:
                return "not_decided" not in reply.read().decode()
        except OSError:
            return False

    def known(self) -> list[dict[str, Any]]:
        """The members, as the first that answers says."""
        for member in self.members:
            if isinstance(found := member.ask("/cluster"), dict):
                return list(found["members"])
        return []

    def leader(self, gone: Member | None = None) -> Member | None:
        """The member that says of itself that it is the primary, `gone` left out: who is cut off
        may go on saying so."""
        for member in self.members:
            if member is not gone and member.ask("/primary") is not None:
                return member
        return None

    def is_whole(self) -> bool:
        known = self.known()
        running = [each for each in known if each["state"] in ("running", "streaming")]
        roles = {each["role"] for each in running}
        synchronous = not self.synchronous or len(self.members) == 1 or "sync_standby" in roles
        return (
            len(running) == len(self.members)
            and "leader" in roles
            and synchronous
            and len({each.get("timeline") for each in known}) == 1
        )

    def wait_whole(self) -> None:
        wait_for(self.is_whole, 120, f"a whole cluster: {self.folder}")

    def uri(self, through: str, database: str) -> str:
        if through == "hosts":
            hosts = ",".join(f"127.0.0.1:{member.network.port}" for member in self.members)
            return f"postgresql://{USER}@{hosts}/{database}?target_session_attrs=read-write"
        port = self.haproxy()
        if through == "pgbouncer":
            port = self.pgbouncer(port)
        return f"postgresql://{USER}@127.0.0.1:{port}/{database}"

    def haproxy(self) -> int:
        """HAProxy as Patroni's documentation has it."""
        port = free_port()
        servers = "".join(
            f"    server {member.name} 127.0.0.1:{member.network.port} check port {member.health.port}\n"
            for member in self.members
        )
        (self.folder / "haproxy.cfg").write_text(
            "defaults\n    mode tcp\n    timeout client 30m\n    timeout connect 4s\n"
            "    timeout server 30m\n    timeout check 2s\n"
            f"listen primary\n    bind 127.0.0.1:{port}\n    option httpchk OPTIONS /primary\n"
            "    http-check expect status 200\n    default-server inter 1s fall 2 rise 1"
            f" on-marked-down shutdown-sessions\n{servers}"
        )
        self.stack.callback(
            Process(self.folder, "haproxy", "haproxy", "-db", "-f", "haproxy.cfg").stop
        )
        return port

    def pgbouncer(self, server: int) -> int:
        port = free_port()
        (self.folder / "users.txt").write_text(f'"{USER}" ""\n')
        (self.folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={server}\n[pgbouncer]\nlisten_addr=127.0.0.1\n"
            f"listen_port={port}\nunix_socket_dir=\nauth_type=trust\nauth_file=users.txt\n"
            "pool_mode=transaction\nserver_login_retry=1\n"
        )
        self.stack.callback(Process(self.folder, "pgbouncer", "pgbouncer", "pgbouncer.ini").stop)
        return port


def more(audit: Audit, count: int) -> None:
    """Wait until `count` more writes are acknowledged, whatever else was answered meanwhile."""
    goal = audit.acknowledged + count
    wait_for(lambda: audit.acknowledged >= goal, 60, f"{count} more acknowledged writes")


def take_away(leader: Member, how: str) -> float:
    """Take the primary away; returns when."""
    moment = time.monotonic()
    if how == "switchover":
        answered = leader.ask("/switchover", {"leader": leader.name})
        assert answered is not None, "Patroni refused the switchover"
    elif how == "kill":
        leader.kill_postgres()
    else:
        leader.cut_off()
    return moment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--failovers", type=int, default=20)
    parser.add_argument("--through", choices=("hosts", "haproxy", "pgbouncer"), default="hosts")
    parser.add_argument("--asynchronous", action="store_true", help="standbys may be behind")
    parser.add_argument("--members", type=int, default=3)
    given = parser.parse_args()
    binaries()
    # So that all that was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    times: dict[str, list[float]] = {"switchover": [], "kill": [], "partition": []}
    unsent = unsent_bytes = 0
    with contextlib.ExitStack() as stack:
        cluster = Cluster(stack, given.members, not given.asynchronous)
        uri = cluster.uri(given.through, "postgres")
        wait_for(lambda: pw_migrate("migrate", uri=uri).returncode == 0, 60, "the migrations")
        service = stack.enter_context(
            Service(POSTGRES_URI=uri, WORKERS=2, ACCESS_LOG="off", DB_CONNECT_TIMEOUT=4)
        )
        audit = stack.enter_context(Audit(service.port))
        for number, how in zip(range(given.failovers), itertools.cycle(times), strict=False):
            more(audit, 50)
            leader = wait_for(cluster.leader, 60, "a primary")
            if given.asynchronous and how == "kill":
                writes, written = audit.acknowledged, leader.written()
                leader.send_no_more()
                more(audit, UNSENT)
                unsent_bytes += leader.written() - written
                unsent += audit.acknowledged - writes
            moment = take_away(leader, how)
            while cluster.leader(gone=leader) is None:
                assert time.monotonic() - moment < 90, "there is no new primary"
                time.sleep(0.1)
            more(audit, 1)
            took = time.monotonic() - moment
            times[how].append(took)
            print(f"  {number + 1}: {how} of {leader.name}: {took:.1f} s", flush=True)
            leader.heal()
            cluster.wait_whole()
        more(audit, 50)
        audit.stop()
        findings = audit.findings()
    print(
        f"{'asynchronous' if given.asynchronous else 'synchronous'}, through {given.through},"
        f" {given.failovers} failovers: {audit.acknowledged} writes acknowledged,"
        f" {audit.refused} refused, {audit.unknown} unknown; lost: {len(findings['lost'])},"
        f" refused ones present: {len(findings['present'])}, false answers: {len(audit.wrong)}"
    )
    if unsent:
        print(
            f"  {unsent} writes were acknowledged while no standby received anything, in"
            f" {unsent_bytes:,} bytes of write-ahead log, {unsent_bytes / unsent:,.0f} each"
        )
    for how, found in times.items():
        if found:
            print(f"  {how}: writes again after {min(found):.1f} to {max(found):.1f} s")
    for line in [*findings["lost"], *findings["present"], *audit.wrong][:5]:
        print(f"    {line}")
    undone = len(findings["lost"]) + len(findings["present"])  # An undone DELETE is a user present.
    wrong = undone > unsent if given.asynchronous else undone or audit.wrong
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
