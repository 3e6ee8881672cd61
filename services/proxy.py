"""What the proxy does to heads: which header passes, which is set, and which ends here.

Heads in, heads out; RFC 9110 section 7.6 says what an intermediary has to do.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from typing import Final

from problems import LoopDetected, MethodNotAllowed
from wire.answer import Answer
from wire.headers import listed
from wire.request import Head

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# The headers of RFC 9110 section 7.6.1, and those that are for one hop by their own definition
# (section 11.7).
HOP_BY_HOP: Final = frozenset(
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
# The headers that the proxy sets, whatever was there before.
SET: Final = frozenset(
    {"host", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-request-id"}
)
# These say who the client is too, and are believed only from a trusted proxy. The same goes for
# every X-Forwarded-…, because applications know -Prefix, -Port, -Ssl, -User and more.
BELIEVED: Final = frozenset({"forwarded", "x-real-ip"})
FORWARDED: Final = "x-forwarded-"
# These say where a message ends: Connection cannot name them away.
FRAMING: Final = frozenset({"content-length", "transfer-encoding"})
# These never pass as they came: those of one hop end here, and those that frame are set anew.
ENDING: Final = HOP_BY_HOP | FRAMING
# Many applications cannot tell X_Forwarded_For from X-Forwarded-For, nor Content_Length from
# Content-Length, and for PHP X.Real.IP is X-Real-IP. So a header of one of these sets does not pass
# with any other mark in the place of a hyphen either. This is for requests only: in an answer such
# a name is one like any other.
OURS: Final = ENDING | SET | BELIEVED
MARK: Final = re.compile("[^a-z0-9-]")
# How much of a name is looked at for that. Hardly any is longer, and 64 KB of marks take five
# milliseconds.
LONGEST_NAME: Final = 100
# How many addresses of X-Forwarded-For are looked at for the caller, from the last one on.
MOST_HOPS: Final = 50
# Alt-Svc names ports of the upstream itself: a client that went there would go past Gatehouse.
NOT_RETURNED: Final = HOP_BY_HOP | {"alt-svc", "x-request-id"}
UPGRADE: Final = b"Connection: upgrade\r\nUpgrade: websocket\r\n"

# The Allow header for a target that the upstream has. Gatehouse does not know its methods.
ALLOW: Final = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE"
# The port after an address, or a name that stands for one (RFC 7239 section 6).
PORT: Final = re.compile(r":(?:[0-9]*|_[A-Za-z0-9._-]+)\Z")


def address_of(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address in a member of X-Forwarded-For, which may have a port, brackets or a zone. An
    IPv4 address that is mapped into IPv6 is returned as IPv4. Raises ValueError."""
    text = text.strip().strip('"')
    if text.startswith("[") or text.count(":") == 1:
        text = PORT.sub("", text)
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    # The zone of an IPv6 address is dropped: it may be any text, and means nothing here.
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


class Proxy:
    """The rules for one upstream.

    `host` and `prefix` are the authority and the path of the upstream's URL, and `name` is what
    this instance calls itself in Via. `trusted` are the networks of the trusted proxies, which are
    believed when they say who the client is.
    """

    def __init__(
        self,
        *,
        host: str,
        prefix: str,
        name: str,
        preserve_host: bool,
        trusted: tuple[Network, ...],
    ) -> None:
        self.host = host
        self.prefix = prefix.rstrip("/")
        self.name = name
        self.preserve_host = preserve_host
        self.trusted = trusted
        # This instance in Via (RFC 9110 section 7.6.3): a protocol and the name.
        self._passed = re.compile(rf"(?:\A|,)[ \t]*+[^ \t,]++[ \t]++{re.escape(name)}(?![^ \t,])")
        self.trusts = lru_cache(1024)(self._trusts)

    def admit(self, head: Head) -> None:
        """Refuse what can never be forwarded. Raises MethodNotAllowed or LoopDetected."""
        if head.method == "CONNECT":
            raise MethodNotAllowed("CONNECT is for forward proxies.", headers=[("Allow", ALLOW)])
        if any(self._passed.search(line) for line in head.values.get("via", ())):
            raise LoopDetected

    def request_head(self, head: Head, peer: str, length: int | None) -> bytes:
        """The head that is sent to the upstream. It has Host, the client's lines in their order
        without those for this hop, the framing, and what the proxy sets. If the body came in chunks
        and has been gathered, `length` is how long it is, in bytes; None keeps the framing that the
        body came with."""
        trusted = self.trusts(peer)
        values = head.values
        ending = ENDING
        if "connection" in values:
            # Connection may name more headers that end here, but not what a trusted proxy says of
            # its client: many proxies pass on the Connection of that client.
            ending = ending.union(
                option
                for option in map(str.lower, listed(values["connection"]))
                if option not in BELIEVED and not option.startswith(FORWARDED)
            )
        # Whether a name has another mark than a hyphen. Hardly any head has such a name. To look at
        # all of its names together costs each request much less than to look at one after another.
        marked = not "".join(values).replace("-", "").isalnum()
        lines: list[bytes] = []
        for line in head.lines:
            key = line.key
            if key in SET or key in ending:
                if key == "content-length" and head.length is not None:
                    # `007` and `7` are one length: the number goes out.
                    lines.append(b"%b: %d\r\n" % (line.text.partition(b":")[0], head.length))
            elif marked and self._is_ours(key, ending):
                pass
            elif trusted or not (key in BELIEVED or key.startswith(FORWARDED)):
                lines.append(line.text)
        if length is not None:
            lines.append(b"Content-Length: %d\r\n" % length)
        elif head.chunked:
            lines.append(b"Transfer-Encoding: chunked\r\n")
        if head.upgrade:
            lines.append(UPGRADE)

        host = head.host
        forwarded_for, proto, forwarded_host = peer, "http", host
        if trusted:
            hops = filter(None, listed(values.get("x-forwarded-for", [])))
            forwarded_for = ", ".join([*hops, peer])
            forwarded_host = values.get("x-forwarded-host", [host])[0] or host
            # Some proxies say ws or wss of a WebSocket.
            protos = filter(None, listed(values.get("x-forwarded-proto", [])))
            if next(protos, "").lower() in ("https", "wss"):
                proto = "https"
        via = f"{head.version} {self.name}"
        if "via" in values:
            via = ", ".join([*filter(None, values["via"]), via])
        origin = head.origin
        target = origin if origin == "*" else self.prefix + origin
        named = f"X-Forwarded-Host: {forwarded_host}\r\n" if forwarded_host else ""
        before = (
            f"{head.method} {target} HTTP/1.1\r\n"
            f"Host: {host if self.preserve_host and host else self.host}\r\n"
        )
        after = (
            f"X-Forwarded-For: {forwarded_for}\r\n"
            f"X-Forwarded-Proto: {proto}\r\n"
            f"{named}"
            f"Via: {via}\r\n"
            f"X-Request-Id: {head.id}\r\n\r\n"
        )
        return before.encode("latin-1") + b"".join(lines) + after.encode("latin-1")

    def _is_ours(self, key: str, ending: frozenset[str]) -> bool:
        """Whether a name with other marks than hyphens stands for one that does not pass."""
        key = key[:LONGEST_NAME]
        spelled = MARK.sub("-", key)
        ours = spelled in OURS or spelled in ending or spelled.startswith(FORWARDED)
        return ours and spelled != key

    def answer_lines(self, answer: Answer, head: Head) -> bytes:
        """The header lines that go back to the client: the upstream's in their order, without those
        for its own hop, and the request's id."""
        upgrade = UPGRADE if answer.status == 101 else b""
        own = b"X-Request-Id: %b\r\n" % head.id.encode()
        return self.interim_lines(answer) + upgrade + own

    def interim_lines(self, answer: Answer) -> bytes:
        """The same for an interim answer (1xx), which does not have the request's id."""
        ending = NOT_RETURNED
        if answer.options and not ending.issuperset(answer.options):
            ending = ending.union(answer.options) - {"content-length"}
        if answer.status == 204 or answer.status < 200:
            ending = ending | {"content-length"}  # RFC 9110 section 8.6
        return b"".join([line.text for line in answer.lines if line.key not in ending])

    def _trusts(self, peer: str) -> bool:
        """Whether what `peer` says of the client is believed."""
        if not self.trusted:
            return False
        address = address_of(peer)
        return any(address in network for network in self.trusted)

    def caller(self, head: Head, peer: str) -> str:
        """The address of the client. If the peer is a trusted proxy, that is the last address in
        X-Forwarded-For that is not a trusted proxy's; if all of them are, it is the first one. It
        is the peer's own if it is not trusted, or has sent something else than addresses."""
        found = peer
        if self.trusted and self.trusts(peer):
            hops = ",".join(head.values.get("x-forwarded-for", ())).rsplit(",", MOST_HOPS)
            for hop in reversed(hops[-MOST_HOPS:]):
                if not hop.strip():
                    continue  # An empty member counts for nothing (RFC 9110 section 5.6.1).
                try:
                    found = str(address_of(hop))
                except ValueError:
                    return peer
                if not self.trusts(found):
                    break
        return found
