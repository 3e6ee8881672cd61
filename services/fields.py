"""What a user has, and what each value of it has to be.

FIELDS is the one table of it. A check takes the value that was sent and returns the one to store.
It raises ValueError, which says what is wrong, for the caller to read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from postgres.table import TIMES
from problems import InvalidUser
from wire.objects import MOST_DIGITS, Number, Object

CANONICAL_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)

MAX_EMAIL = 254
# What nearly every address looks like. A test holds that the library changes nothing in such an
# address but the case of its domain. To ask the library would take a third of the time of a create.
# In an address of MAX_PLAIN characters no part can be too long.
PLAIN_EMAIL = re.compile(
    r"[A-Za-z0-9]+(?:[._+-][A-Za-z0-9]+)*@(?:[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*\.)+[A-Za-z]{2,}"
)
MAX_PLAIN = 64
MAX_NAME = 200
# In bytes: as it is sent, and as PostgreSQL writes it. A user with the second still fits into one
# body, so that it can be sent back as it came.
MAX_METADATA, MAX_KEPT = 16384, 61440
MAX_DEPTH = 100
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # all of Unicode's category Cc
SURROGATE = re.compile(r"[\ud800-\udfff]")
# A string of JSON, or white space between its values.
SPACES = re.compile(r'("[^"\\]*+(?:\\.[^"\\]*+)*+")|[ \t\n\r]+')
JSON_KINDS = (
    (type(None), "null"),
    (bool, "true or false"),
    (int | float, "a number"),
    (list, "an array"),
    (dict, "an object"),
)


def valid_id(value: Any) -> str:
    """An id in lower case."""
    if not isinstance(value, str) or not CANONICAL_ID.fullmatch(value):
        raise ValueError("must be a UUID")
    return value.lower()


def valid_text(value: Any) -> str:
    """Any string that PostgreSQL can keep."""
    if not isinstance(value, str):
        kind = next(words for one, words in JSON_KINDS if isinstance(value, one))
        raise ValueError(f"must be a string, not {kind}")
    # isascii() takes less time than a search, and most values are ASCII.
    if not value.isascii() and SURROGATE.search(value):
        raise ValueError("must not contain lone surrogates")
    if "\0" in value:
        raise ValueError("must not contain \\u0000")
    return value


def valid_email(value: Any) -> str:
    """An email address, normalised: one mailbox is always spelt in one way, except for the case of
    its local part, which is kept."""
    email = valid_text(value)
    if len(email) > MAX_EMAIL:
        raise ValueError(f"must have at most {MAX_EMAIL} characters")
    if len(email) <= MAX_PLAIN and PLAIN_EMAIL.fullmatch(email):
        local, _, domain = email.partition("@")
        return f"{local}@{domain.lower()}"
    # It is imported here because that takes an eighth of the time that the service needs to start.
    from email_validator import SPECIAL_USE_DOMAIN_NAMES, EmailNotValidError, validate_email

    # Internal domains such as .local and .test are allowed. The library's documentation says to
    # allow them in this way.
    SPECIAL_USE_DOMAIN_NAMES.clear()
    try:
        normalised = validate_email(email, check_deliverability=False, strict=True).normalized
    except EmailNotValidError as error:
        raise ValueError(str(error)) from None
    except UnicodeError:
        raise ValueError("must be an email address") from None
    if len(normalised) > MAX_EMAIL:
        raise ValueError(f"must have at most {MAX_EMAIL} characters")
    return normalised


def valid_name(value: Any) -> str:
    """A name without the white space around it."""
    name = valid_text(value).strip()
    if not 1 <= len(name) <= MAX_NAME:
        raise ValueError(f"must have 1 to {MAX_NAME} characters besides surrounding white space")
    if not name.isprintable() and CONTROL.search(name):
        raise ValueError("must not contain control characters")
    return name


def valid_metadata(value: Any) -> str:
    """A JSON object, as the text that was sent: PostgreSQL keeps more of a number than Python
    does."""
    if not isinstance(value, Object):
        raise ValueError("must be a JSON object")
    # How many bytes PostgreSQL makes of it, or a few more. It writes numbers without exponents (of
    # 16 KB of 0e-16000 it makes 29 MB), and no white space but one after each comma and colon.
    kept = len(SPACES.sub(r"\1", value.text).encode())
    level: list[Any] = [value]
    depth = 0  # how many objects and arrays are around the values of this level
    while level:
        # An empty object or array is a level as well, although there is nothing in it.
        if depth >= MAX_DEPTH and any(isinstance(whole, dict | list) for whole in level):
            raise ValueError(f"must not be nested deeper than {MAX_DEPTH} levels")
        kept += sum(_spaces(whole) for whole in level)
        level = [part for whole in level for part in _parts(whole)]
        kept += sum(part.digits for part in level if isinstance(part, Number))
        depth += 1
    if kept > MAX_KEPT:
        raise ValueError(f"must have at most {MAX_KEPT} bytes as PostgreSQL writes it")
    return value.text


def _check_size(value: Object) -> None:
    """Raises ValueError if an object has more than MAX_METADATA bytes as it was sent. This is apart
    from `valid_metadata` because an object that a GET gave may be sent back, and be longer."""
    size = len(value.text.encode())
    if size > MAX_METADATA:
        raise ValueError(f"must have at most {MAX_METADATA} bytes, and has {size}")


def _spaces(value: Any) -> int:
    """How many commas and colons PostgreSQL writes between the parts of a JSON value."""
    if isinstance(value, dict):
        return max(0, 2 * len(value) - 1)
    return max(0, len(value) - 1) if isinstance(value, list) else 0


def _parts(value: Any) -> list[Any]:
    """The values directly in a JSON value. Raises ValueError if `jsonb` cannot keep this one."""
    if isinstance(value, str):
        valid_text(value)
    elif isinstance(value, float) and math.isinf(value):
        # PostgreSQL would store 1e100000 with all its zeros.
        raise ValueError(
            "must not contain numbers beyond 1.8e308, nearer to 0 than 5e-324, or of more than"
            f" {MOST_DIGITS} digits"
        )
    elif isinstance(value, dict):
        return [*value.keys(), *value.values()]
    elif isinstance(value, list):
        return value
    return []


@dataclass(frozen=True)
class Field:
    """A member of a user, and the column of the same name.

    `check` takes the value that was sent and returns the one to store, or raises ValueError. A
    member that is not `required` may be absent or null, and is `default` then; a default of None is
    NULL in the table and null in JSON. `kind` is the SQL type. If `merged` is not 0, PATCH takes
    the value as a merge patch (RFC 7396), and not as the new value. The result may then have
    `merged` bytes, as PostgreSQL writes it.
    """

    name: str
    check: Callable[[Any], Any]
    required: bool = False
    default: Any = None
    kind: str = "text"
    merged: int = 0

    @property
    def nullable(self) -> bool:
        """Whether the column may be NULL."""
        return self.default is None and not self.required


FIELDS = (
    Field("email", valid_email, required=True),
    Field("name", valid_name, required=True),
    Field("metadata", valid_metadata, default="{}", kind="jsonb", merged=MAX_KEPT),
)
NAMES = {field.name: field for field in FIELDS}
UNKNOWN = f"is not a member of a user; you can set {', '.join(NAMES)}"
# A GET also gives these members. A PUT or PATCH may therefore send TIMES back, which are ignored. A
# POST is told why it should not.
NOT_SENT = dict.fromkeys(TIMES, "is set by Gatehouse; leave it out") | {
    "id": "is made by Gatehouse; leave it out, or choose one with PUT /users/{id}"
}


def valid(members: Mapping[str, Any], *, user_id: str | None = None) -> dict[str, Any]:
    """All fields of a user, checked and ready to store. A field that is absent has its default.

    With `user_id` the members may be those that a GET of that user gave. Raises InvalidUser, which
    names every error, up to MAX_ERRORS.
    """
    values, errors = checked(members, user_id)
    missing = [field.name for field in FIELDS if field.required and field.name not in members]
    errors += [(name, "is required") for name in missing]
    raise_for(errors)
    return {one.name: or_default(one, values.get(one.name)) for one in FIELDS}


def or_default(field: Field, value: Any) -> Any:
    """The value to store for a field whose checked value is this; None if it was not given."""
    return field.default if value is None else value


def raise_for(errors: list[tuple[str, str]]) -> None:
    """Raise InvalidUser if there are any errors."""
    if errors:
        # Missing and wrong members come before unknown ones, of which there may be thousands.
        errors.sort(key=lambda error: error[1] == UNKNOWN)
        raise InvalidUser(errors=errors)


def checked(
    members: Mapping[str, Any], user_id: str | None
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The fields among `members`, ready to store, and what is wrong with any of the members.

    If the user's id is given, they may be what a GET gave, which has TIMES. An object among that
    may be longer than what was sent first, because PostgreSQL writes it with more white space.
    """
    sent_back = user_id is not None and all(name in members for name in TIMES)
    values: dict[str, Any] = {}
    errors: list[tuple[str, str]] = []
    for name, value in members.items():
        field = NAMES.get(name)
        try:
            if field is not None:
                if isinstance(value, Object) and not sent_back:
                    _check_size(value)
                nothing = value is None and not field.required
                values[name] = None if nothing else field.check(value)
            elif name == "id" and user_id is not None:
                if valid_id(value) != user_id.lower():
                    raise ValueError("must be the id in the path, or be left out")
            elif name not in TIMES or user_id is None:
                raise ValueError(NOT_SENT.get(name, UNKNOWN))
        except ValueError as error:
            errors.append((name, str(error)))
    return values, errors
