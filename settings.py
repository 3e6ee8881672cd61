"""Configuration: one frozen object, read once from a mapping of environment variables."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cpus import available_cpus

# How many characters a file with a secret may have. /dev/zero has no end.
LONGEST_SECRET = 65536

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# RFC 6750 section 2.1, the b64token that may follow "Bearer ".
TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")

# Labels of at most 63 characters. The last one is not a number: the whole would be an address.
HOST_NAME = re.compile(r"(?:[A-Za-z0-9_-]{1,63}\.)*(?![0-9]+\.?$)[A-Za-z0-9_-]{1,63}\.?", re.ASCII)
# A host name or an IPv6 address in brackets, and perhaps a port.
AUTHORITY = re.compile(
    r"(?:[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*\.?|\[(?P<literal>[0-9A-Fa-f:.]+)\])(?::[0-9]*)?"
)


class SettingsError(Exception):
    """Settings that are missing or wrong; `problems` has one line for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Settings:
    """What the operator chose. Times are in seconds, sizes in bytes."""

    postgres_uri: str
    upstream_url: str
    host: str
    port: int
    workers: int
    threads: int
    upstream_max_in_flight: int | None  # None is as many as descriptors allow
    upstream_connect_timeout: float
    upstream_read_timeout: float
    upstream_stream_timeout: float
    upstream_keepalive_timeout: float
    upstream_retry: float
    upstream_preserve_host: bool
    sse_keepalive: float  # 0 is never
    keepalive_timeout: float
    client_timeout: float
    db_pool_size: int
    db_pool_timeout: float
    db_connect_timeout: float
    db_statement_timeout: float
    users_token: tuple[str, ...]
    users_auth: str
    trusted_proxies: tuple[Network, ...]
    max_body_bytes: int  # 0 is no limit
    shutdown_timeout: float
    drain_delay: float
    access_log: bool

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read every setting from `environ`; an empty value counts as unset.

        Raises SettingsError that names every missing and bad variable at once, never quoting
        the value of one that may hold a secret.
        """
        values: dict[str, Any] = {}
        problems: list[str] = []
        for name, (parse, default) in VARIABLES.items():
            try:
                text = value_of(name, environ) or default
                if text is None:
                    raise ValueError("is required")
                values[name.lower()] = parse(text)
            except ValueError as error:
                problems.append(f"{name} {error}")
        if values.get("upstream_preserve_host", "") is None:
            # An https upstream has a certificate, and often a virtual host, for its own name alone.
            encrypted = values.get("upstream_url", "").lower().startswith("https:")
            values["upstream_preserve_host"] = not encrypted
        if (
            "users_auth" in values
            and "host" in values
            and not values.get("users_token", True)
            and values["users_auth"] == "token"
            and not is_loopback(values["host"])
        ):
            problems.append(
                "USERS_TOKEN is required where HOST is not loopback"
                " (or USERS_AUTH=none, to let everyone read and change users)"
            )
        if problems:
            raise SettingsError(problems)
        return cls(**values)


def value_of(name: str, environ: Mapping[str, str]) -> str:
    """The text of a setting, from `environ` or from the file that its other form NAME_FILE names;
    empty where neither is set.

    White space around it is dropped. Raises ValueError, to be read after the setting's name,
    where both forms are set, or the file cannot be read or holds nothing: an empty secret would
    leave /users open.
    """
    text = environ.get(name, "").strip()
    file = environ.get(f"{name}_FILE", "").strip() if name in FROM_FILE else ""
    if not file:
        return text
    if text:
        raise ValueError(f"and {name}_FILE are both set: unset one of them")
    try:
        with Path(file).open(encoding="utf-8") as secret:
            text = secret.read(LONGEST_SECRET + 1)
    except OSError as error:
        # The path is not told: a secret that was put there by mistake would be in the log.
        raise ValueError(f"cannot be read from {name}_FILE: {error.strerror}") from None
    except ValueError:  # no UTF-8, or a path with a NUL
        raise ValueError(f"cannot be read from {name}_FILE: it is no text in UTF-8") from None
    if len(text) > LONGEST_SECRET:
        raise ValueError(f"cannot be read from {name}_FILE: it is larger than 64 KB")
    text = text.strip()
    if not text:
        raise ValueError(f"cannot be read from {name}_FILE: the file is empty")
    if "\0" in text:  # libpq would take it for the end.
        raise ValueError(f"cannot be read from {name}_FILE: it has a NUL")
    return text


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a socket that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def address_to_ask(host: str) -> str:
    """The address at which this machine reaches a socket that listens on `host`, which may stand
    for all addresses."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


# What else an upstream may be called if it is what listens on a HOST.
ALSO_CALLED: dict[str, set[str]] = {
    "0.0.0.0": {"127.0.0.1", "localhost"},
    "::": {"127.0.0.1", "::1", "localhost"},
    "127.0.0.1": {"localhost"},
    "::1": {"localhost"},
    "localhost": {"127.0.0.1", "::1"},
}


def leads_here(upstream_url: str, host: str, port: int) -> bool:
    """Whether the upstream is Gatehouse itself, which listens on `host` and `port`. No name is
    looked up for that."""
    name, upstream_port = upstream(upstream_url)
    host = host.lower()
    return upstream_port == port and name in {host, *ALSO_CALLED.get(host, ())}


def upstream(upstream_url: str) -> tuple[str, int]:
    """Host and port of an upstream."""
    url = urlsplit(upstream_url)
    return url.hostname or "", url.port or (443 if url.scheme == "https" else 80)


def host_and_port(host: str, port: int) -> str:
    """Both as a URL has them, in which an IPv6 address is in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,16}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}, not {text!r}")
        return int(text)

    return parse


def _optional(parse: Callable[[str], int]) -> Callable[[str], int | None]:
    return lambda text: parse(text) if text else None


def _seconds(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or not low <= float(text) <= high:
            raise ValueError(f"must be seconds from {low:g} to {high:g}, not {text!r}")
        return float(text)

    return parse


def _switch(text: str) -> bool:
    if text.lower() in ("on", "true", "yes", "1"):
        return True
    if text.lower() in ("off", "false", "no", "0"):
        return False
    raise ValueError(f"must be on or off, not {text!r}")


def _auto_or_switch(text: str) -> bool | None:
    if text.lower() == "auto":
        return None
    try:
        return _switch(text)
    except ValueError:
        raise ValueError(f"must be auto, on or off, not {text!r}") from None


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"must be {' or '.join(choices)}, not {text!r}")
        return text.lower()

    return parse


def _workers(text: str) -> int:
    if text.lower() == "auto":
        return available_cpus()
    try:
        return _integer(1, 256)(text)
    except ValueError:
        raise ValueError(f"must be auto or a whole number from 1 to 256, not {text!r}") from None


def _host(text: str) -> str:
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not HOST_NAME.fullmatch(host):
            raise ValueError(f"must be an address or a host name, not {text!r}") from None
    return host


def postgres_uri(text: str) -> str:
    """A URI as libpq takes it. Raises ValueError that says what is wrong."""
    # libpq takes only the lower-case `postgresql://` and `postgres://` for a URI; anything else
    # would silently become the name of a database on the local socket.
    for prefix in ("postgresql://", "postgres://"):
        if text.lower().startswith(prefix):
            rest = text[len(prefix) :]
            break
    else:
        raise ValueError("must start with postgresql:// or postgres://")
    if len(text.splitlines()) > 1:
        raise ValueError("has more than one line")
    # libpq ends the password at the first @, and would look for a host with the other one in its
    # name. It ends the hosts at / or ?, after which an @ is an ordinary mark. But if there is a
    # password, no port before the / and a port or another / after that @, the host is there.
    twice = r"[^/@]*@[^/?]*@"
    later = r"[^/@:]*:[^/@]*@[^]/?:@%[]+/[^?@]*@[^?]*[:/]"
    if re.match(f"{twice}|{later}", rest):
        raise ValueError(
            "has more than one @ before the database: in a name, password or host write %40 for @,"
            " %2F for / and %25 for %"
        )
    return f"postgresql://{rest}"


def _is_authority(text: str) -> bool:
    match = AUTHORITY.fullmatch(text)
    try:
        ipaddress.IPv6Address(match["literal"] or "::" if match else "")
    except ValueError:
        return False
    return True


def _upstream_url(text: str) -> str:
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        raise ValueError("is not a valid URL") from None
    if url.scheme not in ("http", "https"):
        raise ValueError("must start with http:// or https://")
    if url.username is not None or url.password is not None:
        raise ValueError("must not contain a user name or password")
    if not url.netloc.isascii():
        raise ValueError("must have the host in its ASCII form, xn--…")
    if port == 0 or not _is_authority(url.netloc):
        raise ValueError("must name a host, and a port from 1 to 65535 if any")
    if not re.fullmatch(r"[!-~]+", text) or set("?#") & set(text):
        raise ValueError("must be a plain base URL, without query, fragment or white space")
    return text


def _tokens(text: str) -> tuple[str, ...]:
    tokens = tuple(token.strip() for token in text.split(",")) if text else ()
    if any("\n" in token for token in tokens):  # a file with a token in each line
        raise ValueError("has more than one line: write them in one, separated by commas")
    if any(not TOKEN.fullmatch(token) for token in tokens):
        raise ValueError(
            "must be bearer tokens separated by commas: letters, digits and -._~+/ (RFC 6750)"
        )
    return tokens


def _networks(text: str) -> tuple[Network, ...]:
    networks, others = [], []
    for item in filter(None, (part.strip() for part in text.split(","))):
        try:
            networks.append(_as_ipv4(ipaddress.ip_network(item, strict=False)))
        except ValueError:
            others.append(repr(item))
    if others:
        raise ValueError(f"must be addresses or CIDRs, and not {', '.join(others)}")
    return tuple(networks)


def _as_ipv4(network: Network) -> Network:
    """A network of IPv4 addresses that are mapped into IPv6, as one of IPv4, as which the addresses
    of clients are compared; any other as it is."""
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is None or network.prefixlen < 96:
        return network
    return ipaddress.IPv4Network((mapped, network.prefixlen - 96))


# name: (how to read it, default as text; None where it is required)
VARIABLES: dict[str, tuple[Callable[[str], Any], str | None]] = {
    "POSTGRES_URI": (postgres_uri, None),
    "UPSTREAM_URL": (_upstream_url, None),
    "HOST": (_host, "127.0.0.1"),
    "PORT": (_integer(0, 65535), "8080"),
    "WORKERS": (_workers, "1"),
    "THREADS": (_integer(1, 4096), "16"),
    "UPSTREAM_MAX_IN_FLIGHT": (_optional(_integer(1, 1_000_000)), ""),
    "UPSTREAM_CONNECT_TIMEOUT": (_seconds(0.1, 3600), "5"),
    "UPSTREAM_READ_TIMEOUT": (_seconds(0.1, 86400), "300"),
    "UPSTREAM_STREAM_TIMEOUT": (_seconds(0.1, 604800), "3600"),
    "UPSTREAM_KEEPALIVE_TIMEOUT": (_seconds(0, 86400), "50"),
    "UPSTREAM_RETRY": (_seconds(0, 3600), "0"),
    "UPSTREAM_PRESERVE_HOST": (_auto_or_switch, "auto"),
    "SSE_KEEPALIVE": (_seconds(0, 86400), "0"),
    "KEEPALIVE_TIMEOUT": (_seconds(1, 86400), "120"),
    "CLIENT_TIMEOUT": (_seconds(1, 86400), "60"),
    "DB_POOL_SIZE": (_integer(1, 1000), "8"),
    "DB_POOL_TIMEOUT": (_seconds(0.01, 3600), "2"),
    "DB_CONNECT_TIMEOUT": (_seconds(1, 3600), "2"),
    "DB_STATEMENT_TIMEOUT": (_seconds(0.1, 3600), "5"),
    "USERS_TOKEN": (_tokens, ""),
    "USERS_AUTH": (_choice("token", "none"), "token"),
    "TRUSTED_PROXIES": (_networks, ""),
    "MAX_BODY_BYTES": (_integer(0, 10**15), "0"),
    "SHUTDOWN_TIMEOUT": (_seconds(0, 3600), "30"),
    "DRAIN_DELAY": (_seconds(0, 3600), "0"),
    "ACCESS_LOG": (_switch, "on"),
}

# Settings that may also be given as NAME_FILE, a file that holds the value: a container's secret,
# or systemd's.
FROM_FILE = ("POSTGRES_URI", "USERS_TOKEN")
FILE_VARIABLES = tuple(f"{name}_FILE" for name in FROM_FILE)
