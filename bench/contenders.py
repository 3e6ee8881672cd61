"""The services that Gatehouse is measured against: their environments and how each is started."""

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

from stage import BENCH, Command, Server, Stage, cpus, free_port, nginx_command

SOURCES = BENCH / "peers"
INSTALLED = BENCH / ".peers"
# In each process, as Gatehouse has by default.
POOL_SIZE = 8
# Flask's; with 32, Gatehouse's default, it is slower.
THREADS = 16


@dataclass(frozen=True)
class Contender:
    """One peer: what it is made of, and whether it has /users or only proxies."""

    name: str
    made_of: str
    start: Callable[[Stage, str, str, bool], Server]
    users: bool = True


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


def start_fastapi(stage: Stage, uri: str, upstream: str, log: bool) -> Server:
    folder = install("fastapi", install_python)
    port = free_port()
    command: Command = [
        str(folder / "venv/bin/uvicorn"),
        "main:app",
        *("--host", "127.0.0.1", "--port", str(port), "--workers", str(cpus())),
        "--access-log" if log else "--no-access-log",
    ]
    environ = {"POSTGRES_URI": uri, "UPSTREAM_URL": upstream, "POOL_SIZE": POOL_SIZE}
    return stage.start("FastAPI", command, environ, port, folder)


def start_flask(stage: Stage, uri: str, upstream: str, log: bool) -> Server:
    folder = install("flask", install_python)
    port = free_port()
    command: Command = [
        *(str(folder / "venv/bin/gunicorn"), "main:app", "--bind", f"127.0.0.1:{port}"),
        *("--worker-class", "gthread", "--workers", str(cpus()), "--threads", str(THREADS)),
        *(("--access-logfile", "-") if log else ()),
    ]
    environ = {
        "POSTGRES_URI": uri,
        "UPSTREAM_URL": upstream,
        "POOL_SIZE": POOL_SIZE,
        "THREADS": THREADS,
    }
    return stage.start("Flask", command, environ, port, folder)


def start_hono(stage: Stage, uri: str, upstream: str, log: bool) -> Server:
    folder = install("hono", install_node)
    port = free_port()
    environ = {
        "NODE_ENV": "production",
        "PORT": port,
        "WORKERS": cpus(),
        "POSTGRES_URI": uri,
        "UPSTREAM_URL": upstream,
        "POOL_SIZE": POOL_SIZE,
        "ACCESS_LOG": "on" if log else "off",
    }
    return stage.start("Hono", ["node", "server.mjs"], environ, port, folder)


def start_nginx(stage: Stage, uri: str, upstream: str, log: bool) -> Server:
    return run_nginx(stage, "nginx", upstream, log, "")


def start_tuned_nginx(stage: Stage, uri: str, upstream: str, log: bool) -> Server:
    tuned = (
        "proxy_buffer_size 64k; proxy_buffers 8 64k; proxy_busy_buffers_size 128k;"
        " proxy_max_temp_file_size 0;"
    )
    return run_nginx(stage, "nginx-tuned", upstream, log, tuned)


def run_nginx(stage: Stage, name: str, upstream: str, log: bool, buffers: str) -> Server:
    port = free_port()
    http = f"""
  access_log {f"{stage.folder}/{name}-access.log" if log else "off"};
  {buffers}
  upstream application {{
    server {upstream.removeprefix("http://")};
    keepalive 256;
    keepalive_requests 1000000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{
      proxy_pass http://application;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header X-Forwarded-For $remote_addr;
    }}
  }}"""
    return stage.start(name, nginx_command(stage, name, http), {}, port)


def contenders() -> list[Contender]:
    """Those that can run here, each with what a reader must know of how it is set up."""
    found = [
        Contender(
            "FastAPI",
            pinned("fastapi", "fastapi", "asyncpg", "httpx", "uvicorn", "uvloop"),
            start_fastapi,
        ),
        Contender(
            "Flask",
            pinned("flask", "Flask", "SQLAlchemy", "psycopg2-binary", "requests", "gunicorn")
            + f", {THREADS} threads a worker",
            start_flask,
        ),
    ]
    if shutil.which("node") and shutil.which("npm"):
        package = json.loads((SOURCES / "hono/package.json").read_text())["dependencies"]
        node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
        found.append(
            Contender(
                "Hono",
                f"hono {package['hono']}, Prisma {package['@prisma/client']} with its pg adapter,"
                f" fetch, Node {node.stdout.strip().removeprefix('v')} in cluster mode",
                start_hono,
            )
        )
    if shutil.which("nginx"):
        version = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=True)
        number = version.stderr.strip().rpartition("/")[2]
        found += [
            Contender("nginx", f"{number}, proxying only: the limit", start_nginx, users=False),
            Contender(
                "nginx, tuned",
                "the same with buffers of 64 KiB and no temporary files, for large bodies",
                start_tuned_nginx,
                users=False,
            ),
        ]
    return found
