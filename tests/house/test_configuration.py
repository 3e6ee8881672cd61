"""docs/configuration.md has a section for each setting, whose default, example and words are true."""

from __future__ import annotations

import re

import pytest

from settings import FROM_FILE, VARIABLES, Settings, SettingsError
from tests.harness import ROOT

TEXT = (ROOT / "docs" / "configuration.md").read_text()
NAMES = [*VARIABLES, *(f"{name}_FILE" for name in FROM_FILE)]
SECTIONS = dict(re.findall(r"(?ms)^### ([A-Z_]+)\n(.*?)(?=^##|\Z)", TEXT))
REQUIRED = {"POSTGRES_URI": "postgresql://db/people", "UPSTREAM_URL": "http://127.0.0.1:3000"}


def others(name: str) -> dict[str, str]:
    """What is required beside a setting."""
    needed = {key: value for key, value in REQUIRED.items() if key != name.removesuffix("_FILE")}
    # What a wrong HOST says must not depend on there being a token.
    return needed | ({} if name.startswith("USERS_TOKEN") else {"USERS_TOKEN": "secret"})


def complaints(name: str, value: str) -> list[str]:
    try:
        Settings.from_env(others(name) | {name: value})
    except SettingsError as error:
        return error.problems
    return []


def test_every_setting_has_a_section_and_every_section_is_of_a_setting() -> None:
    assert sorted(SECTIONS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_section_begins_with_the_default(name: str) -> None:
    default = VARIABLES[name][1] if name in VARIABLES else ""
    first = SECTIONS[name].strip()
    if default is None:
        assert first.startswith("**Required.** ")
    elif default:
        assert first.startswith(f"**Default: `{default}`.** ")
    else:
        assert re.match(r"\*\*Default: [a-z ]+\.\*\* ", first)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_taken(name: str) -> None:
    [value] = re.findall(rf"(?m)^- Example: `{name}=(.+)`$", SECTIONS[name])
    if name.endswith("_FILE"):
        assert complaints(name, value) == complaints(name, "/nowhere")  # No such file is here.
    else:
        assert complaints(name, value) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_value_says_what_is_told(name: str) -> None:
    [(value, said)] = re.findall(rf"(?m)^- `{name}=(.+?)` says: `(.+)`$", SECTIONS[name])
    assert complaints(name, value) == [said]
