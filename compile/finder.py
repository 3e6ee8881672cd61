"""Makes Python import the compiled modules of Gatehouse instead of their sources.

compile/build.py copies this file into .venv as the package `gatehouse_compiled`, beside what it has
compiled. A line in a .pth file has Python run `install` at each start. The compiled modules are
used only if all sources that they were made of are the same, byte for byte, and if they can be
loaded. Otherwise Python imports the sources, as if this file were not there.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

# The library that has the code of all compiled modules.
LIBRARY = "gatehouse__mypyc"
# What the modules were made of, as `sha256sum --check` reads it.
SOURCES = "sources.sha256"


class Finder:
    """A finder for sys.meta_path. `unusable` says why nothing compiled is used, although it is
    there; otherwise it is None."""

    def __init__(self, folder: Path) -> None:
        self.unusable: str | None = None
        self._folder = folder
        self._usable: bool | None = None
        self._root = ""  # the folder of the project that it is used for, with the last slash
        # Where each compiled module is, and where its source is in the project's folder.
        self._files: dict[str, str] = {}
        self._sources: dict[str, str] = {}
        for file in folder.rglob("*" + EXTENSION_SUFFIXES[0]):
            path = file.relative_to(folder).as_posix().removesuffix(EXTENSION_SUFFIXES[0])
            self._files[path.replace("/", ".")] = str(file)
            self._sources[path.replace("/", ".")] = path + ".py"

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Where to load a module from; None leaves it to the finders of Python."""
        file = self._files.get(name)
        if file is None:
            return None
        if name != LIBRARY:
            source = PathFinder.find_spec(name, path)
            origin = source.origin if source is not None else None
            if origin is None or not origin.endswith(self._sources[name]):
                return None
            root = origin.removesuffix(self._sources[name])
            if self._usable is None:
                self._root, self._usable = root, self._can_be_used(root)
            if root != self._root or not self._usable:
                return None
        spec = ModuleSpec(name, ExtensionFileLoader(name, file), origin=file)
        spec.has_location = True
        return spec

    def _can_be_used(self, root: str) -> bool:
        from hashlib import sha256  # Most programs in .venv never get here.

        try:
            lines = (self._folder / SOURCES).read_text().splitlines()
        except OSError as error:
            self.unusable = f"what was compiled cannot be read: {error}"
            return False
        for line in lines:
            digest, path = line.split()
            try:
                same = sha256(Path(root, path).read_bytes()).hexdigest() == digest
            except OSError:
                same = False
            if not same:
                self.unusable = f"{path} was changed after the last make install"
                return False
        try:
            __import__(LIBRARY)
        except ImportError as error:
            self.unusable = f"what was compiled cannot be loaded: {error}"
            return False
        return True


finder: Finder | None = None


def install() -> None:
    """Use what was compiled in this process, unless GATEHOUSE_INTERPRETED is 1."""
    global finder
    if os.environ.get("GATEHOUSE_INTERPRETED") != "1":
        finder = Finder(Path(__file__).parent)
        sys.meta_path.insert(0, finder)
