"""Forwarding a request to the upstream and its answer back, as they came.

`forward` reads as the request travels; the header rules stand beside it. RFC 9110 section 7.6 says
what an intermediary has to do.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Any

from metrics import Board
from problems import (
    BadRequest,
    LoopDetected,
    MethodNotAllowed,
    Problem,
    UpgradeNotSupported,
)
from server.places import Body, Places
from server.upstream import Answer, Client, Upstream
from wire.fields import Field, field_values, listed

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# RFC 9110 section 7.6.1, and what applies to one hop by its own definition (section 11.7).
HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# What the proxy sets, whatever was there before.
SET = frozenset(
    {"host", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-request-id"}
)
# What else says who the client is, and is believed from a trusted proxy only.
BELIEVED = frozenset({"forwarded", "x-real-ip"})
# Alt-Svc names ports of the upstream's own, where there is no Gatehouse.
NOT_RETURNED = HOP_BY_HOP | {"alt-svc", "x-request-id"}

# What Allow says for a target of the upstream's, whose methods Gatehouse does not know.
METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE"
ABSOLUTE_FORM = re.compile(r"https?://[^/?#]+", re.IGNORECASE)


def origin_form(target: str, method: str) -> str:
    """The target as it is sent to an origin server (RFC 9112 section 3.2), otherwise byte for byte.

    An absolute-form target loses its scheme and authority, so it cannot change which host is
    called. Raises BadRequest for a target that no host but a forward proxy could serve.
    """
    if target.startswith("/") or (target == "*" and method == "OPTIONS"):
        return target
    absolute = ABSOLUTE_FORM.match(target)
    if absolute is None:
        raise BadRequest("The request target is malformed.")
    rest = target[absolute.end() :]
    return rest if rest.startswith("/") else "/" + rest


def dropped(fields: Iterable[Field], always: frozenset[str]) -> frozenset[str]:
    """The names whose lines end at this hop: `always`, and those that Connection lists, which
    cannot be the framing."""
    options = listed(field_values(fields, "connection"))
    if not options:
        return always
    return always.union(option.lower() for option in options) - {"content-length"}


def plain_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address, that of IPv4 where it is one in IPv6's clothes. Raises ValueError."""
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


class Proxy:
    """Forwards requests to one upstream.

    `host` and `prefix` are the authority and the path of the upstream's URL, `name` is what this
    instance calls itself in Via, and `limit` how many requests it forwards at once.
    """

    def __init__(
        self,
        upstream: Upstream,
        *,
        host: str,
        prefix: str,
        name: str,
        limit: int,
        preserve_host: bool,
        trusted: tuple[Network, ...],
        board: Board,
    ) -> None:
        self.upstream = upstream
        self.host = host
        self.prefix = prefix.rstrip("/")
        self.name = name
        self.preserve_host = preserve_host
        self.trusted = trusted
        self.board = board
        self.places = Places(limit, board)

    def admit(self, request: Any) -> None:
        """Refuse what can never be forwarded; called when a request's head is complete.

        Raises MethodNotAllowed, UpgradeNotSupported or LoopDetected.
        """
        if request.command == "CONNECT":
            raise MethodNotAllowed("CONNECT is for forward proxies.", headers=[("Allow", METHODS)])
        upgrades = listed(request.values.get("upgrade", []))
        asked = any(upgrade.lower() == "websocket" for upgrade in upgrades)
        if asked and request.version == "1.1":  # RFC 9110 section 7.8: ignored in HTTP/1.0
            raise UpgradeNotSupported
        if any(self.name in hop.split()[1:2] for hop in listed(request.values.get("via", []))):
            raise LoopDetected

    def forward(self, request: Any, client: Client) -> tuple[str, list[Field], Body]:
        """Forward a request; returns the status line, the header lines and the body to answer with.

        Raises the Problem that its caller is to be told, or ClientGone where there is no caller
        any more.
        """
        self.places.enter()
        try:
            answer = self._exchange(request, client)
        except BaseException:
            self.places.leave()
            raise
        fields = self.answer_fields(answer, request.id)
        return f"{answer.status} {answer.reason}", fields, Body(answer, self.places)

    def _exchange(self, request: Any, client: Client) -> Answer:
        head = self.request_head(request, client.addr[0])
        body = request.get_body_stream() if request.body_size else None
        try:
            answer = self.upstream.exchange(request.command, head, body, client)
        except Problem:
            self.board.forwarded(up=False)
            raise
        self.board.forwarded(up=True)
        return answer

    def request_head(self, request: Any, peer: str) -> bytes:
        """The head that is sent to the upstream: Host, the client's lines in their order less those
        for this hop only, the length of a body that came in chunks, and what the proxy sets."""
        fields: list[Field] = request.fields
        trusted = self.trusts(peer)
        own: dict[str, list[str]] = {name: [] for name in SET}
        ending = dropped(fields, HOP_BY_HOP if trusted else HOP_BY_HOP | BELIEVED)
        lines = []
        for name, value in fields:
            key = name.lower()
            # Many applications cannot tell X_Forwarded_For from X-Forwarded-For.
            spelled = key.replace("_", "-") if "_" in key else key
            if spelled in SET:
                if spelled is key:
                    own[key].append(value)
            elif not {key, spelled} & ending and (spelled is key or spelled not in BELIEVED):
                lines.append(f"{name}: {value}")
        if request.chunked:
            lines.append(f"Content-Length: {request.body_size}")

        host = own["host"][0]
        forwarded_for, proto, forwarded_host = [peer], "http", host
        if trusted:
            forwarded_for = [*filter(None, listed(own["x-forwarded-for"])), peer]
            forwarded_host = (own["x-forwarded-host"] or [host])[0]
            if own["x-forwarded-proto"] in (["https"], ["http"]):
                proto = own["x-forwarded-proto"][0]
        via = [*(value for value in own["via"] if value), f"{request.version} {self.name}"]
        target = request.target if request.target == "*" else self.prefix + request.target
        return "\r\n".join(
            (
                f"{request.command} {target} HTTP/1.1",
                f"Host: {host if self.preserve_host else self.host}",
                *lines,
                f"X-Forwarded-For: {', '.join(forwarded_for)}",
                f"X-Forwarded-Proto: {proto}",
                f"X-Forwarded-Host: {forwarded_host}",
                f"Via: {', '.join(via)}",
                f"X-Request-Id: {request.id}\r\n\r\n",
            )
        ).encode("latin-1")

    def answer_fields(self, answer: Answer, request_id: str) -> list[Field]:
        """The header lines that go back to the client: the upstream's in their order, less those
        for its own hop only, and the request's id."""
        ending = dropped(answer.fields, NOT_RETURNED)
        fields = [field for field in answer.fields if field[0].lower() not in ending]
        fields.append(("X-Request-Id", request_id))
        return fields

    def trusts(self, peer: str) -> bool:
        """Whether what `peer` says of the client is believed."""
        if not self.trusted:
            return False
        address = plain_address(peer)
        return any(address in network for network in self.trusted)

    def caller(self, request: Any, peer: str) -> str:
        """The address of the client: the nearest in X-Forwarded-For that is not itself a trusted
        proxy, where the peer is one; else the peer."""
        if self.trusts(peer):
            for hop in reversed(listed(request.values.get("x-forwarded-for", []))):
                # Not the zone of an IPv6 address: it may be any text, and means nothing here.
                address = hop.partition("%")[0]
                try:
                    if not self.trusts(address):
                        return str(plain_address(address))
                except ValueError:
                    break
        return peer
