"""Has Python import the compiled modules of Gatehouse in place of their source.

compile/build.py copies this file into .venv as the package `gatehouse_compiled`, with what it has
compiled, and with a line in a .pth file that has Python import it at each start. A compiled module
is used only if all sources are, byte for byte, those that were compiled: whoever changes one of
them runs what is written there, and never what was there before.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

# What all compiled modules share: mypyc puts their code into one library.
LIBRARY = "gatehouse__mypyc"
# The sources that were compiled, as `sha256sum --check` reads it.
SOURCES = "sources.sha256"


class Finder:
    """A finder for sys.meta_path. `changed` is the first source that was found to differ from what
    was compiled, as a path from the project's folder; None if there was none."""

    def __init__(self, folder: Path) -> None:
        self.changed: str | None = None
        self._folder = folder
        lines = (folder / SOURCES).read_text().splitlines()
        self._digests = {path: digest for digest, path in (line.split() for line in lines)}
        self._modules = {path[:-3].replace("/", "."): path for path in self._digests}
        self._same: dict[str, bool] = {}  # whether the sources below a folder are those

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Where to load a module from; None leaves it to the finders of Python."""
        if name == LIBRARY:
            return self._spec(name)
        if name not in self._modules:
            return None
        source = PathFinder.find_spec(name, path)
        origin = source.origin if source is not None else None
        if origin is None or not origin.endswith(self._modules[name]):
            return None
        root = origin.removesuffix(self._modules[name])
        if root not in self._same:
            self._same[root] = self._compare(Path(root))
        return self._spec(name) if self._same[root] else None

    def _spec(self, name: str) -> ModuleSpec:
        file = str(self._folder / (name.replace(".", "/") + EXTENSION_SUFFIXES[0]))
        spec = ModuleSpec(name, ExtensionFileLoader(name, file), origin=file)
        spec.has_location = True
        return spec

    def _compare(self, root: Path) -> bool:
        from hashlib import sha256  # Most that runs in .venv never gets here.

        for path, digest in self._digests.items():
            try:
                same = sha256((root / path).read_bytes()).hexdigest() == digest
            except OSError:
                same = False
            if not same:
                self.changed = path
                return False
        return True


finder: Finder | None = None


def install() -> None:
    """Use what was compiled in this process, unless GATEHOUSE_INTERPRETED is set."""
    global finder
    if not os.environ.get("GATEHOUSE_INTERPRETED"):
        finder = Finder(Path(__file__).parent)
        sys.meta_path.insert(0, finder)
