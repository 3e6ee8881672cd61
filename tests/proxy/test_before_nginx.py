"""nginx behind Gatehouse, as the application's own server."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import RawClient, Service, free_port, request, wait_for
from tests.proxy.test_behind_proxies import listening

CONFIGURATION = """
daemon off; pid {folder}/pid; error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
    uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
    gzip on; gzip_min_length 1; default_type text/html;
    server {{
        listen 127.0.0.1:{port};
        location /plain {{ return 200 "a page"; }}
        location /told {{ gzip_proxied any; return 200 "a page"; }}
    }}
}}
"""


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[int]:
    """Its port."""
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    port = free_port()
    (tmp_path / "nginx.conf").write_text(CONFIGURATION.format(folder=tmp_path, port=port))
    command = ["nginx", "-e", "stderr", "-c", str(tmp_path / "nginx.conf")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(lambda: listening(port) or process.poll() is not None, 20, "nginx")
        assert process.poll() is None, (tmp_path / "log").read_text()
        yield port
    finally:
        process.terminate()
        process.wait(20)


def test_nginx_compresses_for_a_proxy_only_if_it_is_told_to(
    start: Callable[..., Service], nginx: int
) -> None:
    """As docs/troubleshooting.md says: it goes by `Via`."""
    service = start(UPSTREAM_URL=f"http://127.0.0.1:{nginx}")
    found = {}
    for port in (nginx, service.port):
        for path in (b"/plain", b"/told"):
            with RawClient(port) as client:
                client.send(request(b"GET %s HTTP/1.1" % path, b"Accept-Encoding: gzip"))
                found[port == nginx, path] = client.reply().get("Content-Encoding")
    directly, through = True, False
    assert found == {
        (directly, b"/plain"): "gzip",
        (directly, b"/told"): "gzip",
        (through, b"/plain"): None,
        (through, b"/told"): "gzip",
    }
