"""Makes Python import the compiled modules of Gatehouse instead of their sources.

compile/build.py copies this file into .venv as the package `gatehouse_compiled`, beside what it has
compiled. A line in a .pth file has Python run `install` at each start. The compiled modules are
used only if all sources that they were made of are the same, byte for byte, and if they are whole
and can be loaded. Otherwise Python imports the sources, as if this file were not there.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

# The library that has the code of all compiled modules.
LIBRARY = "gatehouse__mypyc"
# The digests of what the modules were made of, in the project's folder, and of what was made, in
# this one, as `sha256sum --check` reads them there. Python crashes if it loads a library that a
# disk or a copy has damaged.
SOURCES, BUILT = "sources.sha256", "built.sha256"
# Their last line: a machine that loses its power may lose the end of what was written last.
WHOLE = "# These are all.\n"


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
        try:
            changed = differing(self._folder / BUILT, str(self._folder))
            if changed is not None:
                raise OSError(f"{changed} is not as it was built")
            changed = differing(self._folder / SOURCES, root)
            if changed is not None:
                self.unusable = f"{changed} was changed after the last make install"
                return False
            __import__(LIBRARY)
        except (OSError, ValueError, ImportError) as error:
            self.unusable = f"what was compiled cannot be loaded: {error}"
            return False
        return True


def differing(sums: Path, root: str) -> str | None:
    """The first of the files in a folder that has another digest than these `sums` say, or is
    missing; None if there is none. Raises OSError or ValueError if the sums, or one of these files,
    cannot be read."""
    from hashlib import sha256  # Most programs in .venv never get here.

    text = sums.read_text()
    if not text.endswith(WHOLE):
        raise ValueError(f"{sums.name} is not whole")
    for line in text.removesuffix(WHOLE).splitlines():
        digest, path = line.split("  ")
        try:
            same = sha256(Path(root, path).read_bytes()).hexdigest() == digest
        except FileNotFoundError:
            same = False
        if not same:
            return path
    return None


finder: Finder | None = None


def install() -> None:
    """Use what was compiled in this process, unless GATEHOUSE_INTERPRETED is 1.

    In a virtual environment Python 3.11 reads each .pth file twice, and so calls this twice.
    """
    global finder
    if finder is None and os.environ.get("GATEHOUSE_INTERPRETED") != "1":
        finder = Finder(Path(__file__).parent)
        sys.meta_path.insert(0, finder)
