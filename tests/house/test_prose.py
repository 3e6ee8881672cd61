"""The documentation can be read once: short sentences, and words that a learner of English knows.

`make check` has proselint for what others know of prose. This is what it does not look at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import ROOT
from tests.house.test_docs import DOCUMENTS, outside_code

# A sentence of more words is read twice.
WORDS = 40
OLD_WORDS = re.compile(r"\b(save for|lest|whom|whence|thereof|hereby|shall)\b", re.IGNORECASE)


def prose(text: str) -> str:
    """A document without code, tables and the targets of links."""
    text = re.sub(r"(?m)^\|.*$", "", outside_code(text))
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"`[^`\n]*`", "code", text)


def sentences(text: str) -> Iterator[str]:
    """What ends in a full stop, a colon, a semicolon, or with its paragraph or item."""
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*] |\d+\. |#))", prose(text)):
        for sentence in re.split(r"(?<=[.?!:;])\s+", paragraph.strip()):
            yield " ".join(sentence.split())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_sentence_has_to_be_read_twice(path: Path) -> None:
    found = list(sentences(path.read_text()))
    assert found
    assert [one for one in found if len(re.findall(r"[\w'-]+", one)) > WORDS] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_there_is_no_word_that_went_out_of_use(path: Path) -> None:
    assert OLD_WORDS.findall(prose(path.read_text())) == []


def test_a_long_sentence_is_seen() -> None:
    """Guards the test above: code, a table and a link are not its words, a line's end is no end."""
    text = "# A title\n\nOne `a b` [two](three)\nfour; five.\n\n| six |\n\n- seven\n- eight"
    assert list(sentences(text)) == [
        "# A title",
        "One code two four;",
        "five.",
        "- seven",
        "- eight",
    ]
