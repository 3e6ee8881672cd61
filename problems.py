"""What can go wrong, each with its status and problem type (RFC 9457)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

# An answer names at most this many errors.
MAX_ERRORS = 20


class Problem(Exception):
    """An error that a caller is told about, as `application/problem+json`.

    `detail` says what happened in words for the caller and never holds a stack trace, SQL, a host
    or a credential. `errors` names every invalid field, up to MAX_ERRORS; `headers` go on the
    answer, and `members` are extension members of the document.
    """

    status: ClassVar[int] = 500
    name: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "Internal error"
    detail: str = "Gatehouse failed to answer this request."
    headers: tuple[tuple[str, str], ...] = ()

    def __init__(
        self,
        detail: str | None = None,
        *,
        errors: Sequence[tuple[str, str]] = (),
        headers: Sequence[tuple[str, str]] = (),
        **members: Any,
    ) -> None:
        self.detail = detail or type(self).detail
        super().__init__(self.detail)
        self.errors = errors[:MAX_ERRORS]
        self.headers = (*type(self).headers, *headers)
        self.members = members

    def described(self, **more: str) -> dict[str, Any]:
        """The members of the problem document, and `more` of them."""
        described: dict[str, Any] = {
            "type": f"urn:gatehouse:{self.name}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            **more,
            **self.members,
        }
        if self.errors:
            described["errors"] = [{"field": f, "message": m} for f, m in self.errors]
        return described

    def document(self, request_id: str) -> bytes:
        """The problem document, encoded as JSON, with a newline at its end."""
        return json.dumps(self.described(request_id=request_id)).encode() + b"\n"


class MalformedJson(Problem):
    status, name, title = 400, "malformed-json", "Malformed JSON"
    detail = "The body is not one JSON document in UTF-8."


class BadRequest(Problem):
    status, name, title = 400, "bad-request", "Bad request"
    detail = "The request is malformed."


class Unauthorized(Problem):
    status, name, title = 401, "unauthorized", "Unauthorized"
    detail = "This path asks for a valid bearer token."


class NoSuchUser(Problem):
    status, name, title = 404, "no-such-user", "No such user"
    detail = "There is no user with this id."


class NotFound(Problem):
    status, name, title = 404, "not-found", "Not found"
    detail = "There is nothing at this path."


class MethodNotAllowed(Problem):
    status, name, title = 405, "method-not-allowed", "Method not allowed"
    detail = "This path does not have this method; Allow lists those it has."


class EmailTaken(Problem):
    status, name, title = 409, "email-taken", "Email taken"
    detail = "Another user has this email address: change that one, or use another address."


class UserInUse(Problem):
    status, name, title = 409, "user-in-use", "User in use"
    detail = "Another table of the database refers to this user."


class RefusedByDatabase(Problem):
    status, name, title = 409, "refused-by-database", "Refused by the database"
    detail = (
        "A rule of the database's own does not allow this. It was not carried out; the log of"
        " Gatehouse names the rule."
    )


class PreconditionFailed(Problem):
    status, name, title = 412, "precondition-failed", "Precondition failed"
    detail = "The user is not in the state that the request's preconditions ask for."


class BodyTooLarge(Problem):
    status, name, title = 413, "body-too-large", "Body too large"

    def __init__(self, largest: int) -> None:
        super().__init__(f"The body is larger than {largest} bytes.")


class UnsupportedMediaType(Problem):
    status, name, title = 415, "unsupported-media-type", "Unsupported media type"
    detail = "The body has a media type that this call does not take."


class InvalidUser(Problem):
    status, name, title = 422, "invalid-user", "Invalid user"
    detail = "The user is not valid; see errors."


class InvalidQuery(Problem):
    status, name, title = 422, "invalid-query", "Invalid query"
    detail = "The query is not valid; see errors."


class UpstreamUnreachable(Problem):
    status, name, title = 502, "upstream-unreachable", "Upstream unreachable"
    detail = "The upstream did not accept a connection."


class UpstreamBroken(Problem):
    status, name, title = 502, "upstream-broken", "Upstream broken"
    detail = "The upstream did not give a valid HTTP answer."


class DatabaseUnavailable(Problem):
    status, name, title = 503, "database-unavailable", "Database unavailable"
    detail = "The database is not available at the moment."
    headers = (("Retry-After", "1"),)


class SchemaNotMigrated(Problem):
    status, name, title = 503, "schema-not-migrated", "Schema not migrated"
    detail = "The database has not been migrated to what this version needs."
    headers = (("Retry-After", "10"),)


class UpstreamBusy(Problem):
    status, name, title = 503, "upstream-busy", "Upstream busy"
    detail = "As many requests as are allowed are with the upstream already."
    headers = (("Retry-After", "1"),)


class UpstreamTimeout(Problem):
    status, name, title = 504, "upstream-timeout", "Upstream timeout"
    detail = "The upstream did not answer in time."


class HttpVersionNotSupported(Problem):
    status, name, title = 505, "http-version-not-supported", "HTTP version not supported"
    detail = "Gatehouse speaks HTTP/1.1 and HTTP/1.0."


class LoopDetected(Problem):
    status, name, title = 508, "loop-detected", "Loop detected"
    detail = "This request has passed through this instance before."
