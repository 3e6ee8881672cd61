"""Configuration: one frozen object, read once from a mapping of environment variables."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# RFC 6750 section 2.1, the b64token that may follow "Bearer ".
TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")

# Labels of at most 63 characters, the last of them no number: that would be an address.
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
    upstream_max_in_flight: int
    upstream_connect_timeout: float
    upstream_read_timeout: float
    upstream_preserve_host: bool
    db_pool_size: int
    db_pool_timeout: float
    db_connect_timeout: float
    db_statement_timeout: float
    users_token: tuple[str, ...]
    users_auth: str
    trusted_proxies: tuple[Network, ...]
    max_body_bytes: int
    shutdown_timeout: float
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
            text = environ.get(name, "").strip() or default
            if text is None:
                problems.append(f"{name} is required")
                continue
            try:
                values[name.lower()] = parse(text)
            except ValueError as error:
                problems.append(f"{name} {error}")
        if "threads" in values and values.get("upstream_max_in_flight", "") is None:
            values["upstream_max_in_flight"] = values["threads"] - reserve(values["threads"])
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


def environment(
    file: Path, parse: Callable[[IO[str]], Iterable[Any]], environ: Mapping[str, str]
) -> dict[str, str]:
    """What is set: in `environ`, or else in `file`, which `parse` takes apart as python-dotenv's
    `parse_stream` does; an empty value is not.

    Raises SettingsError where the file, or a line of it, cannot be read: python-dotenv itself would
    skip the line, and a token in it.
    """
    lines: list[Any] = []
    try:
        with file.open(encoding="utf-8-sig") as stream:
            lines += parse(stream)
    except FileNotFoundError:
        pass
    except UnicodeDecodeError:
        raise SettingsError([".env is not in UTF-8"]) from None
    except OSError as error:
        raise SettingsError([f".env cannot be read: {error.strerror}"]) from None
    wrong = [f".env cannot be read at line {line.original.line}" for line in lines if line.error]
    if wrong:
        raise SettingsError(wrong)
    given = [*((line.key, line.value) for line in lines), *environ.items()]
    return {name: value for name, value in given if name and value and value.strip()}


def reserve(threads: int) -> int:
    """How many of `threads` are kept for /users when UPSTREAM_MAX_IN_FLIGHT is not set."""
    return min(8, max(1, threads // 4))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a socket that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def available_cpus() -> int:
    """CPUs that this process may run on (fewer than the machine's inside a container)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,15}", text) or not low <= int(text) <= high:
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
    # libpq takes only the lower-case `postgresql://` for a URI; anything else would silently
    # become the name of a database on the local socket.
    for prefix in ("postgresql://", "postgres://"):
        if text.lower().startswith(prefix):
            return "postgresql://" + text[len(prefix) :]
    raise ValueError("must start with postgresql:// or postgres://")


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
    if port == 0 or not _is_authority(url.netloc):
        raise ValueError("must name a host, and a port from 1 to 65535 if any")
    if not re.fullmatch(r"[!-~]+", text) or set("?#") & set(text):
        raise ValueError("must be a plain base URL, without query, fragment or white space")
    return text


def _tokens(text: str) -> tuple[str, ...]:
    tokens = tuple(token.strip() for token in text.split(",")) if text else ()
    if any(not TOKEN.fullmatch(token) for token in tokens):
        raise ValueError(
            "must be bearer tokens separated by commas: letters, digits and -._~+/ (RFC 6750)"
        )
    return tokens


def _networks(text: str) -> tuple[Network, ...]:
    networks, others = [], []
    for item in filter(None, (part.strip() for part in text.split(","))):
        try:
            networks.append(ipaddress.ip_network(item, strict=False))
        except ValueError:
            others.append(repr(item))
    if others:
        raise ValueError(f"must be addresses or CIDRs, and not {', '.join(others)}")
    return tuple(networks)


# name: (how to read it, default as text; None where it is required)
VARIABLES: dict[str, tuple[Callable[[str], Any], str | None]] = {
    "POSTGRES_URI": (postgres_uri, None),
    "UPSTREAM_URL": (_upstream_url, None),
    "HOST": (_host, "127.0.0.1"),
    "PORT": (_integer(0, 65535), "8080"),
    "WORKERS": (_workers, "1"),
    "THREADS": (_integer(2, 4096), "32"),
    "UPSTREAM_MAX_IN_FLIGHT": (_optional(_integer(1, 4096)), ""),
    "UPSTREAM_CONNECT_TIMEOUT": (_seconds(0.1, 3600), "5"),
    "UPSTREAM_READ_TIMEOUT": (_seconds(0.1, 86400), "60"),
    "UPSTREAM_PRESERVE_HOST": (_switch, "off"),
    "DB_POOL_SIZE": (_integer(1, 1000), "8"),
    "DB_POOL_TIMEOUT": (_seconds(0.01, 3600), "2"),
    "DB_CONNECT_TIMEOUT": (_seconds(1, 3600), "2"),
    "DB_STATEMENT_TIMEOUT": (_seconds(0.1, 3600), "5"),
    "USERS_TOKEN": (_tokens, ""),
    "USERS_AUTH": (_choice("token", "none"), "token"),
    "TRUSTED_PROXIES": (_networks, ""),
    "MAX_BODY_BYTES": (_integer(0, 10**15), "104857600"),
    "SHUTDOWN_TIMEOUT": (_seconds(0, 3600), "30"),
    "ACCESS_LOG": (_switch, "on"),
}
