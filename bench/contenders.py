"""Who is measured: Gatehouse and the servers beside it, their environments, how each is started."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stage import BENCH, Command, Server, Site, free_port, gatehouse, nginx

SOURCES = BENCH / "peers"
INSTALLED = BENCH / ".peers"
# In each process, as Gatehouse has by default.
POOL_SIZE = 8
# Flask's, as many as Gatehouse has by default.
THREADS = 16


@dataclass(frozen=True)
class Contender:
    """One server: what it is made of, how it is started, and in which scenes it has a part."""

    name: str
    made_of: str
    start: Callable[[Site], Server]
    scenes: frozenset[str]


USERS, PROXY, LARGE = frozenset({"users"}), frozenset({"proxy"}), frozenset({"large"})
TUNNELS, START = frozenset({"tunnels"}), frozenset({"start"})
FRAMEWORK = USERS | PROXY | LARGE | START
SERVER = PROXY | LARGE | TUNNELS | START

OURS = "Gatehouse"
GATEHOUSE = Contender(OURS, "itself", gatehouse, FRAMEWORK | SERVER)


def install(name: str, steps: Callable[[Path], None]) -> Path:
    """Copy the peer's sources to its folder under .peers and set it up where they changed."""
    folder = INSTALLED / name
    digest = hashlib.sha256()
    for source in sorted((SOURCES / name).iterdir()):
        if source.is_file():
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    stamp = folder / "installed"
    if stamp.exists() and stamp.read_text() == digest.hexdigest():
        return folder
    print(f"setting up {name} in {folder} ...", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(SOURCES / name, folder, ignore=shutil.ignore_patterns("__pycache__"))
    steps(folder)
    stamp.write_text(digest.hexdigest())
    return folder


def install_python(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    pip = [str(folder / "venv/bin/python"), "-m", "pip", "install", "--quiet"]
    subprocess.run(
        [*pip, "--disable-pip-version-check", "-r", str(folder / "requirements.txt")], check=True
    )


def install_node(folder: Path) -> None:
    # `prisma generate` asks for the engine of `prisma migrate` before it starts, and would
    # download it; it never runs it, and the client that it makes needs no engine.
    environ = {**os.environ, "PRISMA_SCHEMA_ENGINE_BINARY": shutil.which("true") or "/bin/true"}
    bundle = "--bundle --platform=node --format=esm --packages=external --outfile=server.mjs"
    for command in (
        "npm ci --ignore-scripts --no-audit --no-fund --loglevel=error",
        "npx prisma generate --schema schema.prisma --no-hints",
        f"npx esbuild server.ts {bundle} --log-level=error",
    ):
        subprocess.run(
            command.split(), cwd=folder, env=environ, check=True, stdout=subprocess.DEVNULL
        )


def pinned(name: str, *packages: str) -> str:
    """What a Python peer is made of, with the versions of its requirements.txt."""
    text = (SOURCES / name / "requirements.txt").read_text()
    versions = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))
    return ", ".join(f"{package} {versions[package]}" for package in packages)


def start_fastapi(site: Site) -> Server:
    folder = install("fastapi", install_python)
    port = free_port()
    command: Command = [
        *(str(folder / "venv/bin/uvicorn"), "main:app", "--no-access-log"),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", str(site.processes)),
    ]
    environ = {"POSTGRES_URI": site.uri, "UPSTREAM_URL": site.upstream, "POOL_SIZE": POOL_SIZE}
    return site.stage.start("FastAPI", command, environ, port, folder)


def start_flask(site: Site) -> Server:
    folder = install("flask", install_python)
    port = free_port()
    command: Command = [
        *(str(folder / "venv/bin/gunicorn"), "main:app", "--bind", f"127.0.0.1:{port}"),
        *("--worker-class", "gthread", "--workers", str(site.processes)),
        *("--threads", str(THREADS)),
    ]
    environ = {
        "POSTGRES_URI": site.uri,
        "UPSTREAM_URL": site.upstream,
        "POOL_SIZE": POOL_SIZE,
        "THREADS": THREADS,
    }
    return site.stage.start("Flask", command, environ, port, folder)


def start_hono(site: Site) -> Server:
    folder = install("hono", install_node)
    port = free_port()
    environ = {
        "NODE_ENV": "production",
        "PORT": port,
        "WORKERS": site.processes,
        "POSTGRES_URI": site.uri,
        "UPSTREAM_URL": site.upstream,
        "POOL_SIZE": POOL_SIZE,
    }
    return site.stage.start("Hono", ["node", "server.mjs"], environ, port, folder)


def start_nginx(site: Site, name: str = "nginx", buffers: str = "") -> Server:
    port = free_port()
    http = f"""
  {buffers}
  map $http_upgrade $connection_upgrade {{ default upgrade; "" ""; }}
  upstream application {{
    server {site.upstream.removeprefix("http://")};
    keepalive 256;
    keepalive_requests 1000000000;
  }}
  access_log {site.stage.folder}/{name}-{port}-access.log;
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{
      proxy_pass http://application;
      proxy_http_version 1.1;
      proxy_read_timeout 3600s;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $connection_upgrade;
      proxy_set_header X-Forwarded-For $remote_addr;
    }}
    location = /events {{
      proxy_pass http://application;
      proxy_read_timeout 3600s;
      proxy_buffering off;
    }}
  }}"""
    return nginx(site, name, port, http)


def start_tuned_nginx(site: Site) -> Server:
    tuned = (
        "proxy_buffer_size 64k; proxy_buffers 8 64k; proxy_busy_buffers_size 128k;"
        " proxy_max_temp_file_size 0;"
    )
    return start_nginx(site, "nginx-tuned", tuned)


def start_caddy(site: Site) -> Server:
    port = free_port()
    configuration = site.stage.folder / f"Caddyfile-{port}"
    configuration.write_text(f"""{{
  admin off
  auto_https off
}}
http://:{port} {{
  bind 127.0.0.1
  reverse_proxy {site.upstream} {{
    transport http {{
      keepalive_idle_conns_per_host 256
    }}
  }}
}}
""")
    command = ["caddy", "run", "--adapter", "caddyfile", "--config", str(configuration)]
    # It would keep what it learns in the home of whoever runs this.
    folders = {"XDG_DATA_HOME": site.stage.folder, "XDG_CONFIG_HOME": site.stage.folder}
    return site.stage.start("Caddy", command, folders, port)


def start_bare(site: Site) -> Server:
    port = free_port()
    command = [sys.executable, str(SOURCES / "bare/main.py")]
    return site.stage.start("bare", command, {"PORT": port, "UPSTREAM_URL": site.upstream}, port)


BARE = Contender("bare", "bottle, requests and waitress and nothing else", start_bare, START)


def version(*command: str) -> str:
    """What a program says of its version, without the words around it."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return found[0] if found else "of an unknown version"


def contenders() -> list[Contender]:
    """Gatehouse and those that can run here beside it."""
    found = [
        GATEHOUSE,
        Contender(
            "FastAPI",
            pinned("fastapi", "fastapi", "asyncpg", "httpx", "uvicorn", "uvloop"),
            start_fastapi,
            FRAMEWORK,
        ),
        Contender(
            "Flask",
            pinned("flask", "Flask", "SQLAlchemy", "psycopg2-binary", "requests", "gunicorn")
            + f", {THREADS} threads a worker",
            start_flask,
            FRAMEWORK,
        ),
    ]
    if shutil.which("node") and shutil.which("npm"):
        package = json.loads((SOURCES / "hono/package.json").read_text())["dependencies"]
        made_of = (
            f"hono {package['hono']}, Prisma {package['@prisma/client']} with its pg adapter,"
            f" fetch, Node {version('node', '--version')} in cluster mode"
        )
        found.append(Contender("Hono", made_of, start_hono, FRAMEWORK))
    if shutil.which("nginx"):
        number = version("nginx", "-v")
        tuned = "the same with buffers of 64 KiB and no temporary files, for large bodies"
        found += [
            Contender("nginx", f"{number}, with 256 kept connections", start_nginx, SERVER),
            Contender("nginx, tuned", tuned, start_tuned_nginx, LARGE),
        ]
    if shutil.which("caddy"):
        number = version("caddy", "version")
        found.append(
            Contender("Caddy", f"{number}, with 256 kept connections", start_caddy, SERVER)
        )
    return found
