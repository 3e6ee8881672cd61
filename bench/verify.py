"""Whether a server answers the calls of the benchmark as it should, before it is measured."""

from __future__ import annotations

import hashlib
import http.client
import json
import uuid
from typing import Any

from services.fields import NAMES


def exchange(
    port: int, method: str, target: str, body: object = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {} if body is None else {"Content-Type": "application/json"}
    content = None if body is None else json.dumps(body)
    try:
        connection.request(method, target, body=content, headers=headers)
        answer = connection.getresponse()
        names = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, names, answer.read()
    finally:
        connection.close()


def expect(what: str, got: Any, wanted: Any) -> None:
    if got != wanted:
        raise AssertionError(f"{what}: got {got!r}, not {wanted!r}")


def check_users(port: int, known: str) -> None:
    """A user by id, two pages of 50 that follow each other, and creates good and bad."""
    status, _, body = exchange(port, "GET", f"/users/{known}")
    expect("a user by id", status, 200)
    # All servers have these. Gatehouse's users may have more, which makes its work more and not less.
    shared = {"id", "email", "name", "created_at", "updated_at"}
    members = set(json.loads(body)) - (set(NAMES) - shared)
    expect("its members", members, shared)
    expect("its id", json.loads(body)["id"], known)
    expect("a user that is not there", exchange(port, "GET", f"/users/{uuid.uuid4()}")[0], 404)

    status, _, body = exchange(port, "GET", "/users?limit=50")
    expect("a page", status, 200)
    page = json.loads(body)
    expect("users in it", len(page["users"]), 50)
    status, _, body = exchange(port, "GET", page["next"])
    expect("the page after it", status, 200)
    ids = [user["id"] for user in page["users"] + json.loads(body)["users"]]
    expect("ids in order", ids, sorted(set(ids)))
    expect("a limit of 501", exchange(port, "GET", "/users?limit=501")[0], 422)

    new = {"email": f"{uuid.uuid4().hex}@example.com", "name": " Ann "}
    status, headers, body = exchange(port, "POST", "/users", new)
    expect("a create", status, 201)
    user = json.loads(body)
    expect("its answer", (user["email"], user["name"]), (new["email"], "Ann"))
    expect("its Location", headers["location"].endswith(f"/users/{user['id']}"), True)
    status, _, body = exchange(port, "GET", f"/users/{user['id']}")
    expect("the created user", (status, json.loads(body)), (200, user))
    again = {**new, "email": new["email"].upper()}
    expect("the same email in capitals", exchange(port, "POST", "/users", again)[0], 409)
    for bad in ({"email": "ann", "name": "Ann"}, {**new, "name": " "}, {**new, "more": 1}):
        expect(f"a create of {bad}", exchange(port, "POST", "/users", bad)[0], 422)


def check_proxy(port: int, upstream: int) -> None:
    """The small and the large body come through as the upstream sent them."""
    for target in ("/small?a=1&b=%2F", "/large"):
        status, _, body = exchange(port, "GET", target)
        direct = exchange(upstream, "GET", target)[2]
        expect(f"status of {target}", status, 200)
        expect(f"length of {target}", len(body), len(direct))
        same = hashlib.sha256(body).digest() == hashlib.sha256(direct).digest()
        expect(f"the bytes of {target} being the upstream's", same, True)
