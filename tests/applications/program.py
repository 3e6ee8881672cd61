"""What makes a program of an application and its client."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any


def run(serve: Callable[[int], None], use: Callable[[str], Any]) -> None:
    """`serve PORT` serves on 127.0.0.1 until it is killed; `use URL` prints what `use` has found as
    one line of JSON, in which the application's own address, wherever it is, reads BASE."""
    what, where = sys.argv[1:]
    if what == "serve":
        serve(int(where))
    else:
        found = json.dumps(use(where))
        address = where.partition("://")[2]
        print(found.replace(where, "BASE").replace(address, "HOST"), flush=True)
