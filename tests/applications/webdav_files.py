"""WebDAV: a client moves and copies files, where each target is a whole URL, and locks one."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

from program import run

LOCK = """<?xml version="1.0"?><lockinfo xmlns="DAV:"><lockscope><exclusive/></lockscope>
<locktype><write/></locktype><owner>ann</owner></lockinfo>"""
LARGE = bytes(range(256)) * 12_000


def serve(port: int) -> None:
    folder = str(Path(__file__).parent)
    gunicorn = [sys.executable, "-m", "gunicorn", "--threads=4", "--pythonpath", folder]
    os.execv(sys.executable, [*gunicorn, f"--bind=127.0.0.1:{port}", "webdav_files:application()"])


def application() -> Any:
    """What gunicorn serves."""
    from wsgidav.wsgidav_app import WsgiDAVApp

    Path("files").mkdir(exist_ok=True)
    return WsgiDAVApp(
        {
            "provider_mapping": {"/": "files"},
            "http_authenticator": {"accept_basic": True, "accept_digest": True},
            "simple_dc": {"user_mapping": {"*": {"ann": {"password": "secret"}}}},
            "lock_storage": True,
        }
    )


def use(base: str) -> Any:
    import httpx
    from webdav4.client import Client

    client = Client(base, auth=("ann", "secret"))
    client.mkdir("a folder")
    client.upload_fileobj(io.BytesIO(LARGE), "a folder/naïve %&.bin")
    client.copy("a folder", "another")
    client.move("another/naïve %&.bin", "another/moved.bin")
    listed = [(entry["name"], entry["content_length"]) for entry in client.ls("another")]
    copy = io.BytesIO()
    client.download_fileobj("another/moved.bin", copy)

    file = f"{base}/another/moved.bin"
    with httpx.Client(auth=httpx.DigestAuth("ann", "secret")) as editor:
        locked = editor.request("LOCK", file, content=LOCK)
        token = locked.headers["Lock-Token"]
        refused = editor.put(file, content="no")
        # The condition names the file by its whole URL (RFC 4918 section 10.4).
        written = editor.put(file, content="mine", headers={"If": f"<{file}> ({token})"})
        freed = editor.request("UNLOCK", file, headers={"Lock-Token": token})
        where = {"Destination": "http://elsewhere.example/moved.bin"}
        elsewhere = editor.request("MOVE", file, headers=where)
    stranger = httpx.request("PROPFIND", base)
    client.remove("a folder")
    client.remove("another")
    return {
        "listed": listed,
        "same": copy.getvalue() == LARGE,
        "lock": [answer.status_code for answer in (locked, refused, written, freed)],
        "refused": [elsewhere.status_code, stranger.status_code],
        "left": client.ls("/"),
    }


if __name__ == "__main__":
    run(serve, use)
