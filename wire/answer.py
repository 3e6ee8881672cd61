"""Taking the head of an upstream's answer apart."""

from __future__ import annotations

import re

from problems import UpstreamBroken
from wire.fields import Field

STATUS_LINE = re.compile(r"HTTP/(1\.[01]) ([1-9][0-9]{2})(?: ([^\0\r]*))?")
HEADER_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*+([^\0\r]*)")
FOLD = re.compile(r"\n[ \t]++")


def parse_head(head: str) -> tuple[str, int, str, list[Field]]:
    """Version, status, reason and header lines of an answer. Raises UpstreamBroken."""
    first, _, rest = head.replace("\r\n", "\n").partition("\n")
    match = STATUS_LINE.fullmatch(first)
    if match is None:
        raise UpstreamBroken("The status line of the upstream's answer is malformed.")
    fields: list[Field] = []
    # A line that begins with white space goes on from the one before (RFC 9112 section 5.2).
    for line in FOLD.sub(" ", rest).split("\n") if rest else ():
        field = HEADER_LINE.fullmatch(line)
        if field is None:
            raise UpstreamBroken("A header line of the upstream's answer is malformed.")
        fields.append((field[1], field[2].rstrip(" \t")))
    return match[1], int(match[2]), match[3] or "", fields
