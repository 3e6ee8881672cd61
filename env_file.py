"""The file `.env`, which stands in for the environment, and names that were probably meant for
settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from settings import FILE_VARIABLES, VARIABLES, Settings, SettingsError

# Names with POSTGRES_, DB_, MAX_ and the like are other programs' too: POSTGRES_URL, DB_POOL.
OWN_WORDS = ("UPSTREAM_", "USERS_", "TRUSTED_", "SHUTDOWN_", "DRAIN_")


def environment(
    file: Path, parse: Callable[[IO[str]], Iterable[Any]], environ: Mapping[str, str]
) -> dict[str, str]:
    """What is set: in `environ`, or else in `file` (see `contents`), of which only the settings
    count. An empty value counts as none.

    Raises SettingsError where the file, or a line of it, cannot be read.
    """
    known = {*VARIABLES, *FILE_VARIABLES}
    there = {name: value for name, value in contents(file, parse).items() if name in known}
    return {name: value for name, value in [*there.items(), *environ.items()] if value.strip()}


def contents(file: Path, parse: Callable[[IO[str]], Iterable[Any]]) -> dict[str, str]:
    """The names and values of `file`, which `parse` takes apart as python-dotenv's `parse_stream`
    does; nothing where there is no such file.

    Raises SettingsError where the file, or a line of it, cannot be read, or a line has a setting's
    name and no value: python-dotenv itself would skip the line, and a token in it.
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
    wrong = [
        f".env cannot be read at line {line.original.line}: write NAME=value"
        for line in lines
        if line.error
    ]
    wrong += [
        f".env has no = after {line.key} at line {line.original.line}"
        for line in lines
        if line.value is None and (line.key in VARIABLES or line.key in FILE_VARIABLES)
    ]
    if wrong:
        raise SettingsError(wrong)
    return {line.key: line.value or "" for line in lines if line.key}


def chosen(environ: Mapping[str, str], names: Iterable[str]) -> tuple[Settings | None, list[str]]:
    """The settings, or None if they are wrong; and all problems, with those of the `names` in the
    file."""
    settings, problems = None, []
    try:
        settings = Settings.from_env(environ)
    except SettingsError as error:
        problems += error.problems
    return settings, problems + near_misses(names)


def near_misses(names: Iterable[str]) -> list[str]:
    """A problem for each of `names` that is close to a setting's name and is not one.

    It is close if it differs from that in one letter (in a long name, two), or only in the case,
    the order or the plural of its words: WORKER, users_token, TRUSTED_PROXY. Any other name is left
    to another program that shares the file.
    """
    return [
        f"{name} in .env is no setting: write {meant}, or take the line out"
        for name in names
        if (meant := _nearest(name))
    ]


def doubtful(names: Iterable[str]) -> list[str]:
    """A warning for each of `names` that was probably meant for a setting. In the environment are
    the names of the whole system, and to refuse one of these would be worse than to overlook one.

    So only names that begin with a word that is hardly another program's count: those that are
    close to a setting's, as above, or that have only some of its words, as UPSTREAM_TIMEOUT has.
    """
    found = []
    for name in names:
        if not name.startswith(OWN_WORDS):
            continue
        nearest, words = _nearest(name), set(_words(name))
        meant = [nearest] if nearest else [one for one in VARIABLES if words < set(_words(one))]
        if meant:
            found.append(f"{name} is no setting, and has no effect. There is {', '.join(meant)}")
    return found


def _nearest(name: str) -> str | None:
    """The setting whose name is so close to `name`, which is not one, that it must be meant."""
    settings = [*VARIABLES, *FILE_VARIABLES]
    if name in settings:
        return None
    upper = name.upper().replace("-", "_")
    distance, meant = min(
        (0 if _words(upper) == _words(one) else _distance(upper, one), one) for one in settings
    )
    return meant if distance <= (1 if len(meant) <= 7 else 2) else None


def _words(name: str) -> list[str]:
    return sorted(re.sub("IES$", "Y", word).removesuffix("S") for word in name.split("_"))


def _distance(one: str, other: str) -> int:
    """How many letters have to be put in, taken out or replaced to make one name of the other."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one):
        above, row = row, [i + 1]
        for j, wanted in enumerate(other):
            row.append(min(above[j] + (letter != wanted), above[j + 1] + 1, row[j] + 1))
    return row[-1]
