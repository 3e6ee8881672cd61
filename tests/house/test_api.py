"""docs/api.md is true: its examples, in curl, Python and JavaScript, are run in their order."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from tests.harness import Databases
from tests.house.test_docs import API, DOCUMENTED_ADDRESS, Reader, dev_service, sessions

BLOCK = re.compile(r"(?ms)^```(console|python|js)\n(.*?)^```$(?:\n\nIt prints `(.+?)`$)?")
COMMANDS = {
    "python": [sys.executable, "-c"],
    "js": ["node", "--input-type=module", "--eval"],
}


def printed(kind: str, source: str, port: int) -> str:
    """What a program prints."""
    source = source.replace(DOCUMENTED_ADDRESS, f"127.0.0.1:{port}")
    done = subprocess.run([*COMMANDS[kind], source], capture_output=True, text=True, timeout=60)
    return (done.stdout + done.stderr).strip()


@pytest.mark.skipif(
    shutil.which("curl") is None or shutil.which("node") is None,
    reason="curl or node is not installed",
)
def test_every_example_is_true(databases: Databases) -> None:
    wrong: list[str] = []
    kinds: list[str] = []
    with dev_service(databases.create(migrated=False)) as port:
        reader = Reader(port)
        for kind, text, told in BLOCK.findall(API.read_text()):
            kinds.append(kind)
            if kind == "console":
                for command, documented in sessions(f"```console\n{text}```\n"):
                    wrong += filter(None, [reader.complaint(command, documented)])
            elif (said := printed(kind, text, port)) != told:
                wrong.append(f"{text}\nprints {said}\nand not {told}")
    assert not wrong, "\n\n".join(wrong)
    assert kinds.count("python") == kinds.count("js") > 3
