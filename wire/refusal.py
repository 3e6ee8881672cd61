"""What Gatehouse itself answers: the header lines of every such answer, and problems as answers."""

from __future__ import annotations

from http import HTTPStatus

from problems import Problem
from wire.fields import Field

STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


def own_fields(request_id: str) -> list[Field]:
    """The header lines of every answer that Gatehouse itself makes."""
    return [
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Request-Id", request_id),
    ]


def refusal(problem: Problem, request_id: str) -> tuple[str, list[Field], bytes]:
    """The answer that reports a problem: a status ("404 Not Found"), header lines without those of
    `own_fields`, and the body."""
    body = problem.document(request_id)
    fields = [("Content-Type", "application/problem+json"), ("Content-Length", str(len(body)))]
    return STATUS_LINES[problem.status], [*fields, *problem.headers], body
