"""What Gatehouse itself answers: the header lines of every such answer, and problems as answers."""

from __future__ import annotations

from http import HTTPStatus

from problems import Problem
from wire.headers import Header

STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


def own_headers(request_id: str) -> list[Header]:
    """The header lines of every answer that Gatehouse itself makes."""
    return [
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Request-Id", request_id),
    ]


def refusal(problem: Problem, request_id: str) -> tuple[str, list[Header], bytes]:
    """The answer that reports a problem: a status ("404 Not Found"), header lines without those of
    `own_headers`, and the body."""
    body = problem.document(request_id)
    headers = [("Content-Type", "application/problem+json"), ("Content-Length", str(len(body)))]
    return STATUS_LINES[problem.status], [*headers, *problem.headers], body
