"""docs/openapi.yaml is true: of the live service, case by case, and of the table of problems."""

from __future__ import annotations

import copy
import re
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import jsonschema
import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, settings
from schemathesis.config import (
    ChecksConfig,
    GenerationConfig,
    PositiveDataAcceptanceConfig,
    ProjectConfig,
    ProjectsConfig,
    SchemathesisConfig,
)

from postgres.table import TIMES
from services.fields import NAMES
from services.query import OF_A_PAGE
from services.search import DEFAULT_PAGE, MAX_PAGE
from tests.harness import ROOT, Databases, ScriptedUpstream, Service
from tests.users.test_problems import CONTRACT

PATH = ROOT / "docs" / "openapi.yaml"
DOCUMENT: dict[str, Any] = yaml.safe_load(PATH.read_text())
TOKEN = "openapi-token"
METHODS = {"get", "head", "post", "put", "patch", "delete", "options", "trace"}

# 412 is right of a valid request too: nobody knows a version that is made up.
ACCEPTED = ["2xx", "3xx", "401", "404", "409", "412"]


def described(*, made_up_tokens: bool) -> schemathesis.BaseSchema:
    """The document as schemathesis reads it, without imports: what is made up is no file of users.
    tests/users/test_transfer.py sends such."""
    document = copy.deepcopy(DOCUMENT)
    bodies = document["paths"]["/users"]["post"]["requestBody"]["content"]
    del bodies["text/csv"], bodies["application/x-ndjson"]
    # schemathesis makes headers of plain strings up by a format of its own, and where that does not
    # fit the pattern it sends `0`. Of alternatives it takes the pattern alone.
    for name in ("IfMatch", "IfNoneMatch"):
        parameter = document["components"]["parameters"][name]
        parameter["schema"] = {"anyOf": [{"const": "*"}, parameter["schema"]]}
    for name in ("WholeUser", "UserChange"):  # No schema can say that it is the id in the path.
        del document["components"]["schemas"][name]["properties"]["id"]
    document["security"].remove({})  # Where there is a token, nobody may ignore it.
    accepted = PositiveDataAcceptanceConfig(expected_statuses=ACCEPTED)
    project = ProjectConfig(
        checks=ChecksConfig(positive_data_acceptance=accepted),
        # A schema cannot say that no string in an object, at any depth, has a NUL.
        generation=GenerationConfig(
            database="none", with_security_parameters=made_up_tokens, allow_x00=False
        ),
    )
    config = SchemathesisConfig(projects=ProjectsConfig(default=project))
    return schemathesis.openapi.from_dict(document, config=config)


def test_the_parameters_of_a_page_are_those_of_the_api_page_and_of_the_service() -> None:
    listing = DOCUMENT["paths"]["/users"]["get"]["parameters"]
    schemas = {one["name"]: one["schema"] for one in listing if one.get("in") == "query"}
    assert schemas.keys() == OF_A_PAGE.keys()
    limit = {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": DEFAULT_PAGE}
    assert schemas["limit"] == limit
    page = (ROOT / "docs" / "api.md").read_text().partition("\n### `GET /users`\n")[2]
    rows = re.findall(r"(?m)^\| `(\w+)` \| (.*) \|$", page.partition("\n#")[0])
    assert [name for name, _ in rows] == list(schemas)
    assert dict(rows)["limit"].endswith(f"1 to {MAX_PAGE}, {DEFAULT_PAGE} by default")


known = described(made_up_tokens=False)
strangers = described(made_up_tokens=True)
moderate = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def guarded(database: str, upstream: ScriptedUpstream) -> Iterator[Service]:
    with Service(POSTGRES_URI=database, UPSTREAM_URL=upstream.url, USERS_TOKEN=TOKEN) as running:
        yield running


@known.parametrize()
@moderate
def test_it_is_true_of_the_service_with_a_token(
    case: schemathesis.Case[Any], guarded: Service
) -> None:
    """All of schemathesis's checks; that the token is not ignored is one of them."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    case.call_and_validate(base_url=guarded.url, headers=headers)


@strangers.parametrize()
@moderate
def test_it_is_true_of_the_service_without_a_token(
    case: schemathesis.Case[Any], guarded: Service
) -> None:
    response = case.call_and_validate(base_url=guarded.url)
    if case.operation.path.startswith("/users") and response.status_code != 401:
        # A made-up header may be malformed, which is told before anybody is asked for a token.
        assert response.json()["type"] == "urn:gatehouse:bad-request"


def test_it_is_true_of_one_call_after_another(
    guarded: Service, databases: Databases, database: str
) -> None:
    """What is created is there until it is deleted, and then it is not."""

    class Users(known.as_state_machine()):  # type: ignore[misc]
        def setup(self) -> None:
            # Hypothesis repeats scenarios: an address must not be taken by the time before.
            with databases.admin(database) as cursor:
                cursor.execute("DELETE FROM users")

        def get_call_kwargs(self, case: schemathesis.Case[Any]) -> dict[str, Any]:
            return {"base_url": guarded.url, "headers": {"Authorization": f"Bearer {TOKEN}"}}

    limits = settings(
        max_examples=15,
        stateful_step_count=8,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    Users.run(settings=limits)


def described_problems() -> set[tuple[int, str]]:
    """The status and type of every problem that a response in the document may have."""
    found = set()
    for response in DOCUMENT["components"]["responses"].values():
        content = response["content"].get("application/problem+json")
        if content is None:
            continue
        status, kind = (content["schema"]["properties"][name] for name in ("status", "type"))
        for urn in kind.get("enum", [kind.get("const")]):
            found.add((status["const"], urn.removeprefix("urn:gatehouse:")))
    return found


# Of other methods and paths, and of forwarded requests: no operation has these.
ELSEWHERE = {
    "not-found",
    "method-not-allowed",
    "upstream-unreachable",
    "upstream-broken",
    "upstream-busy",
    "upstream-timeout",
    "http-version-not-supported",
    "loop-detected",
}


def test_every_problem_is_described_and_every_described_problem_exists() -> None:
    types = DOCUMENT["components"]["schemas"]["Problem"]["properties"]["type"]["enum"]
    assert sorted(types) == sorted(f"urn:gatehouse:{name}" for name in CONTRACT)
    here = {(status, name) for name, status in CONTRACT.items() if name not in ELSEWHERE}
    assert described_problems() == here


def test_every_response_is_one_of_an_operation() -> None:
    text = PATH.read_text()
    for name in DOCUMENT["components"]["responses"]:
        assert f"'#/components/responses/{name}'" in text, f"no operation has {name}"


def test_every_example_of_a_problem_is_one_of_its_response() -> None:
    for name, response in DOCUMENT["components"]["responses"].items():
        content = response["content"].get("application/problem+json")
        if content is not None:
            wanted, example = content["schema"]["properties"], content["example"]
            kinds = wanted["type"].get("enum", [wanted["type"].get("const")])
            assert example["type"] in kinds and example["status"] == wanted["status"]["const"], name
            assert CONTRACT[example["type"].removeprefix("urn:gatehouse:")] == example["status"]


def examples(part: Any, at: str = "#") -> Iterator[tuple[str, Any]]:
    """Where in the document each schema is that has an example, or an example beside it."""
    if isinstance(part, dict):
        if "example" in part:
            yield at + ("/schema" if "schema" in part else ""), part["example"]
        for key, value in part.items():
            if key != "example":
                yield from examples(value, f"{at}/{key.replace('~', '~0').replace('/', '~1')}")
    elif isinstance(part, list):
        for number, value in enumerate(part):
            yield from examples(value, f"{at}/{number}")


@pytest.mark.parametrize(("at", "example"), list(examples(DOCUMENT)))
def test_an_example_is_what_its_schema_says(at: str, example: Any) -> None:
    jsonschema.Draft202012Validator({**DOCUMENT, "$ref": quote(at, safe="#/~")}).validate(example)


def test_every_response_is_under_its_own_status() -> None:
    for path, item in DOCUMENT["paths"].items():
        for method in METHODS & set(item):
            for status, response in item[method]["responses"].items():
                name = response.get("$ref", "").rpartition("/")[2]
                content = DOCUMENT["components"]["responses"].get(name, {}).get("content", {})
                schema = content.get("application/problem+json", {}).get("schema")
                if schema is not None:
                    assert str(schema["properties"]["status"]["const"]) == status, (path, method)


def responses() -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each response is described, and what is said of it."""
    for path, item in DOCUMENT["paths"].items():
        for method in METHODS & set(item):
            for status, response in item[method]["responses"].items():
                if "$ref" not in response:
                    yield f"{status} of {method.upper()} {path}", response
    yield from DOCUMENT["components"]["responses"].items()


def test_every_response_has_the_headers_that_each_answer_of_gatehouse_has() -> None:
    """schemathesis says nothing of a header that is sent and not described."""
    own = {"X-Request-Id", "X-Content-Type-Options", "Cache-Control"}
    for name, response in responses():
        missing = own - set(response.get("headers", {}))
        assert not missing, f"{name} does not have {', '.join(sorted(missing))} in its headers"


def test_a_user_always_has_each_of_its_members() -> None:
    """A client that is made of the document would take another one for optional."""
    user = DOCUMENT["components"]["schemas"]["User"]
    assert user["required"] == list(user["properties"])
    assert sorted(user["required"]) == sorted(["id", *NAMES, *TIMES])


def test_every_path_has_the_methods_that_are_described_and_no_others(guarded: Service) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    for path, item in DOCUMENT["paths"].items():
        target = path.format(id=uuid.uuid4())
        described = {method.upper() for method in METHODS & set(item)} | {"OPTIONS"}
        described |= {"HEAD"} & {"HEAD" if "GET" in described else ""}
        reply = guarded.call("OPTIONS", target, headers=headers)
        assert reply.status == 204
        assert set((reply.get("Allow") or "").split(", ")) == described, path
        for method in sorted(METHODS):
            status = guarded.call(method.upper(), target, headers=headers).status
            assert (status == 405) == (method.upper() not in described), (method, path, status)


@pytest.mark.parametrize(
    "path", ["/users/{id}/more", "/health/other", "/health/live/x", "/users/a/b/c"]
)
def test_no_path_that_is_not_described_exists(guarded: Service, path: str) -> None:
    reply = guarded.call("GET", path.format(id=uuid.uuid4()), headers={"Authorization": "Bearer t"})
    assert path not in DOCUMENT["paths"]
    assert reply.status == (401 if path.startswith("/users") else 404)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    reply = guarded.call("GET", path.format(id=uuid.uuid4()), headers=headers)
    assert reply.json()["type"] == "urn:gatehouse:not-found"


def test_a_head_has_the_header_lines_of_the_get(guarded: Service) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}", "X-Request-Id": "same"}
    for path, item in DOCUMENT["paths"].items():
        if "get" not in item:
            continue
        target = path.format(id=uuid.uuid4())
        get, head = (guarded.call(method, target, headers=headers) for method in ("GET", "HEAD"))
        assert (head.status, head.body) == (get.status, b"")
        changing = {"date", "content-length"}  # uptime_seconds may grow by a digit
        lines = [
            sorted((n.lower(), v) for n, v in reply.headers if n.lower() not in changing)
            for reply in (get, head)
        ]
        assert lines[0] == lines[1], path


def test_the_version_is_the_services(guarded: Service) -> None:
    assert DOCUMENT["info"]["version"] == guarded.call("GET", "/health").json()["version"]
