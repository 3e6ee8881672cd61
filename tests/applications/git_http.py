"""git clones and pushes over HTTP, to git's own http-backend; a large pack goes in chunks."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from program import run

PACK_BYTES = 60_000_000
# Random bytes do not get smaller: git need not try.
WHO = ["-c", "user.name=Ann", "-c", "user.email=ann@example.com", "-c", "core.compression=0"]


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *WHO, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def serve(port: int) -> None:
    git("init", "--quiet", "--bare", "shop.git")
    git("-C", "shop.git", "config", "http.receivepack", "true")
    gunicorn = [sys.executable, "-m", "gunicorn", "--threads=4", "--timeout=120"]
    gunicorn += ["--pythonpath", str(Path(__file__).parent), f"--bind=127.0.0.1:{port}"]
    os.execv(sys.executable, [*gunicorn, "git_http:application"])


def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """git http-backend, which speaks CGI (RFC 3875), as an application of gunicorn's."""
    meta = {name: value for name, value in environ.items() if isinstance(value, str)}
    meta |= {"PATH": os.environ["PATH"], "GIT_PROJECT_ROOT": str(Path.cwd())}
    meta |= {"GIT_HTTP_EXPORT_ALL": "1", "REMOTE_USER": "ann"}
    backend = subprocess.Popen(
        ["git", "http-backend"], env=meta, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert backend.stdin and backend.stdout
    while piece := environ["wsgi.input"].read(65536):
        backend.stdin.write(piece)
    backend.stdin.close()
    fields, status = [], "200 OK"
    while line := backend.stdout.readline().strip().decode():
        name, _, value = line.partition(": ")
        if name == "Status":
            status = value
        else:
            fields.append((name, value))
    start_response(status, fields)
    yield from iter(lambda: backend.stdout.read(65536), b"")
    backend.wait()


def use(base: str) -> Any:
    url = f"{base}/shop.git"
    git("init", "--quiet", "first")
    Path("first/large.bin").write_bytes(secrets.token_bytes(PACK_BYTES))
    Path("first/small.txt").write_text("hello\n")
    git("-C", "first", "add", ".")
    git("-C", "first", "commit", "--quiet", "-m", "All of it")
    branch = f"main-{secrets.token_hex(4)}"
    git("-C", "first", "push", "--quiet", url, f"HEAD:refs/heads/{branch}")
    git("clone", "--quiet", "--branch", branch, url, "second")
    Path("second/small.txt").write_text("hello again\n")
    git("-C", "second", "commit", "--quiet", "-a", "-m", "A small change")
    git("-C", "second", "push", "--quiet", "origin", f"HEAD:{branch}")
    git("-C", "first", "pull", "--quiet", url, branch)
    heads = [git("-C", folder, "rev-parse", "HEAD") for folder in ("first", "second")]
    listed = git("ls-remote", url, f"refs/heads/{branch}").split()[0]
    refused = subprocess.run(["git", "ls-remote", f"{base}/none.git"], capture_output=True)
    return {
        "same": heads[0] == heads[1] == listed,
        "text": Path("first/small.txt").read_text(),
        "large": Path("second/large.bin").stat().st_size,
        "whole": git("-C", "second", "fsck", "--full", "--no-progress"),
        "refused": [refused.returncode, b"not found" in refused.stderr],
    }


if __name__ == "__main__":
    run(serve, use)
