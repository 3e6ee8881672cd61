"""Header lines pass or do not pass as the tables of docs/proxy.md say, and no others are touched.

What is sent is a list of ordinary headers, what services/proxy.py names, and what the tables name.
So a rule that is in only one of the two places fails here.
"""

from __future__ import annotations

import re

import pytest

from services import proxy
from tests.harness import DEAD_DATABASE, ROOT, ScriptedUpstream, Service, message, request
from tests.house.test_docs import rows

# These say where a message ends and whom it is for; other tests are about them.
FRAMING = {"host", "content-length", "transfer-encoding"}
REQUEST = """
    Accept Accept-Charset Accept-Encoding Accept-Language Authorization Cache-Control
    CF-Connecting-IP Client-IP Content-Encoding Content-Language Content-Type Cookie Cookie2 Date DNT
    Fastly-Client-IP From If-Match If-Modified-Since If-None-Match If-Range If-Unmodified-Since
    Front-End-Https HTTP2-Settings Link Max-Forwards Origin Pragma Prefer Priority Purpose Range
    Referer Save-Data Sec-Ch-Ua Sec-Fetch-Dest Sec-Fetch-Mode Sec-Fetch-Site Sec-GPC
    Sec-WebSocket-Key Sec-WebSocket-Protocol Server Set-Cookie Traceparent Tracestate
    True-Client-IP Upgrade-Insecure-Requests User-Agent Warning X-Amzn-Trace-Id X-API-Key
    X-B3-TraceId X-Client-IP X-Cluster-Client-IP X-Correlation-Id X-CSRF-Token
    X-HTTP-Method-Override X-Original-URL X-Powered-By X-Remote-User X-Requested-With X-Rewrite-URL
    X-Scheme X-Sendfile X-URL-Scheme
"""
ANSWER = """
    Accept-CH Accept-Patch Accept-Ranges Access-Control-Allow-Credentials
    Access-Control-Allow-Headers Access-Control-Allow-Methods Access-Control-Allow-Origin
    Access-Control-Expose-Headers Access-Control-Max-Age Age Allow Cache-Control CDN-Cache-Control
    Clear-Site-Data Content-Disposition Content-Encoding Content-Language Content-Location
    Content-MD5 Content-Range Content-Security-Policy Content-Security-Policy-Report-Only
    Content-Type Cross-Origin-Embedder-Policy Cross-Origin-Opener-Policy
    Cross-Origin-Resource-Policy Date Deprecation ETag Expect-CT Expires Feature-Policy Last-Modified
    Link Location NEL Origin-Agent-Cluster P3P Permissions-Policy Pragma Preference-Applied
    Public-Key-Pins RateLimit-Limit Referrer-Policy Refresh Report-To Reporting-Endpoints
    Retry-After Sec-WebSocket-Accept Server Server-Timing Set-Cookie Set-Cookie2 SourceMap
    Strict-Transport-Security Sunset Surrogate-Control Timing-Allow-Origin Tk Vary Via Warning
    WWW-Authenticate X-Accel-Buffering X-Accel-Redirect X-AspNet-Version X-Cache
    X-Content-Type-Options X-DNS-Prefetch-Control X-Frame-Options X-Generator
    X-Permitted-Cross-Domain-Policies X-Powered-By X-RateLimit-Limit X-Real-IP X-Robots-Tag
    X-Runtime X-Sendfile X-UA-Compatible X-Varnish X-XSS-Protection
"""


def told(heading: str) -> tuple[set[str], set[str], str]:
    """The names that a table removes and those that it sets, in lower case, and what the names
    begin with that it removes all of ("X-Forwarded-…")."""
    page = (ROOT / "docs" / "proxy.md").read_text()
    section = page.partition(f"\n### {heading}\n")[2].partition("\n### ")[0]
    removed, given, prefix = set(), set(), "?"
    for cell, becomes, *_ in rows(section):
        names = re.findall(r"`([A-Z][A-Za-z-]*(?:-…)?)`", cell)
        if becomes.startswith("removed"):
            removed |= {name.lower() for name in names if "…" not in name}
            prefix = next((name[:-1].lower() for name in names if "…" in name), prefix)
        elif names and cell == f"`{names[0]}`" and not becomes.startswith("passes"):
            given.add(names[0].lower())
    return removed, given, prefix


def sample(text: str, *tables: set[str]) -> list[str]:
    """A line for each name of the text, and for what it could be mistaken for; no name twice."""
    names = text.split()
    known = {name.lower() for name in names} | FRAMING
    others = set().union(proxy.OURS, proxy.NOT_RETURNED, *tables) - known
    alike = {name.replace("-", "_") for name in others if "-" in name}
    return [f"{name}: sample!{n}" for n, name in enumerate([*names, *sorted(others | alike)])]


def name_of(line: str) -> str:
    return line.partition(":")[0].lower()


def assert_as_told(
    sent: list[str], arrived: list[str], removed: set[str], given: set[str], own: set[str]
) -> None:
    """What is neither removed nor set arrived as it was sent, what is set arrived otherwise, and
    what is this hop's `own` may have been added."""
    untouched = [line for line in sent if name_of(line) not in removed | given]
    came = [line for line in arrived if name_of(line) not in given | own]
    where = "docs/proxy.md and services/proxy.py differ in what becomes of"
    assert came == untouched, f"{where} {sorted(set(came) ^ set(untouched)) or 'their order'}"
    for name in given:
        lines = [line for line in arrived if name_of(line) == name]
        assert len(lines) == 1 and lines[0] not in sent, f"{where} {name}"


@pytest.fixture(scope="module")
def database() -> str:
    """No database: no proxied request may depend on one."""
    return DEAD_DATABASE


def test_the_header_lines_of_a_request_pass_as_the_table_says(
    service: Service, upstream: ScriptedUpstream
) -> None:
    removed, given, prefix = told("Requests")
    sent = sample(REQUEST, removed, given, {f"{prefix}port", f"{prefix}user"})
    ours = removed | given | FRAMING
    alike = {name_of(line).replace("_", "-"): name_of(line) for line in sent}
    removed |= {name for spelt, name in alike.items() if spelt in ours and name != spelt}
    removed |= {
        name_of(line) for line in sent if name_of(line).replace("_", "-").startswith(prefix)
    }
    with service.client() as client:
        client.send(request(b"GET / HTTP/1.1", *(line.encode() for line in sent)))
        assert client.reply().status == 200
    arrived = upstream.seen[-1].head.decode().split("\r\n")[1:]
    assert_as_told(sent, arrived, removed - given, given - {"host"}, {"host"})


def test_the_header_lines_of_an_answer_pass_as_the_table_says(
    service: Service, upstream: ScriptedUpstream
) -> None:
    removed, given, _ = told("Answers")
    sent = sample(ANSWER, removed, given)
    lines = [line.encode() for line in (*sent, "Content-Length: 0")]
    upstream.script(message(b"HTTP/1.1 200 OK", *lines))
    with service.client() as client:
        client.send(request())
        arrived = client.head().decode().split("\r\n")[1:]
    assert_as_told(sent, arrived, removed, given, {"content-length", "connection"})
