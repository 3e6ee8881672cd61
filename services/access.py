"""Who may use /users: whoever has a token; if none is set, this machine alone."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Mapping, Sequence

from problems import Unauthorized
from services.proxy import address_of

# Headers that a browser sends by itself, and that no page in it can take away.
BROWSER_HEADERS = frozenset({"accept-language", "origin", "sec-fetch-mode", "sec-fetch-site"})
# Headers by which a proxy says for whom it forwards a request.
FORWARDING = frozenset({"x-forwarded-for", "x-real-ip", "forwarded"})
FOR = re.compile(r'(?:\A|[;\s])for\s*=\s*"?([^;"]*)', re.IGNORECASE)  # RFC 7239 section 4
# A header of FORWARDING that has more characters counts as another machine's. To read 64 KB of
# addresses takes ninety milliseconds.
LONGEST = 1000
PORT = re.compile(r":[0-9]*\Z")

# All headers that matter here, in lower case.
HEADERS = BROWSER_HEADERS | FORWARDING | {"authorization"}

REALM = 'Bearer realm="users"'
OTHER_NAME = (
    "No USERS_TOKEN is set: a browser may use this path only if it calls this machine localhost or"
    " 127.0.0.1. Set USERS_TOKEN, or USERS_AUTH=none to let everyone in."
)
OTHER_MACHINE = (
    "No USERS_TOKEN is set: only this machine may use this path, and this request is another's,"
    " perhaps forwarded by a proxy. Set USERS_TOKEN, or USERS_AUTH=none to let everyone in."
)


class Access:
    """Lets in whoever has one of the `tokens`; without any, this machine; or `everyone`."""

    def __init__(self, tokens: Sequence[str], *, everyone: bool = False) -> None:
        self._tokens = [] if everyone else [token.encode() for token in tokens]
        self._local_only = not everyone and not tokens

    def check(self, headers: Mapping[str, Sequence[str]], host: str, peer: str = "") -> None:
        """Raises Unauthorized unless the request may go on. `headers` are its header values by name
        in lower case, of which HEADERS matter; `host` is the authority that is asked for; `peer` is
        the address that the request came from. It may be empty where no other machine can connect:
        to a Unix socket, and to Gatehouse's own server, which does not start otherwise.

        Without a token a request of a browser has to name this machine. Otherwise any page in it
        could have its own name lead to 127.0.0.1, and then read and change all users (DNS
        rebinding). And what a proxy on this machine forwards for another machine is not let in:
        that proxy would open all users to the world.
        """
        if self._local_only:
            if not BROWSER_HEADERS.isdisjoint(headers) and not is_local(host):
                raise Unauthorized(OTHER_NAME, headers=[("WWW-Authenticate", REALM)])
            if not is_of_this_machine(headers, peer):
                raise Unauthorized(OTHER_MACHINE, headers=[("WWW-Authenticate", REALM)])
        if not self._tokens:
            return
        scheme, _, token = ", ".join(headers.get("authorization", ())).partition(" ")
        bearer, token = scheme.lower() == "bearer", token.strip(" ")
        # Every token is compared, so that the time does not tell which one is right.
        matches = [hmac.compare_digest(token.encode(), known) for known in self._tokens]
        if bearer and any(matches):
            return
        # Whoever sent no token at all is told of no error (RFC 6750 section 3.1).
        error = ', error="invalid_token"' if bearer and token else ""
        raise Unauthorized(headers=[("WWW-Authenticate", REALM + error)])


def is_local(host: str) -> bool:
    """Whether a Host, with a port or without, can only be this machine, whatever a name server
    says (RFC 6761 section 6.3). An empty one counts as this machine: no browser sends it."""
    name = PORT.sub("", host).strip("[]").lower()
    if not name or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def is_of_this_machine(headers: Mapping[str, Sequence[str]], peer: str) -> bool:
    """Whether `peer`, if it is not empty, and all addresses in the headers of FORWARDING are this
    machine's own."""
    addresses = [peer] if peer not in ("", "localhost") else []  # waitress calls a Unix socket so
    for name in FORWARDING.intersection(headers):
        value = ",".join(headers[name])
        if len(value) > LONGEST:
            return False
        if name == "forwarded":
            # Each proxy adds a member, some of them without saying for whom they forward.
            for member in filter(None, map(str.strip, value.split(","))):
                addresses += FOR.findall(member) or ["unknown"]
        else:
            addresses += filter(None, map(str.strip, value.split(",")))
    try:
        return all(address_of(address).is_loopback for address in addresses)
    except ValueError:
        return False
