"""Vite's development server: a browser sees a changed file without loading the page again."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from browser import browsing, console, shows
from program import run

VITE = "8.4.0"
PAGE = """<link rel="icon" href="data:,"><div id="told"></div>
<script type="module" src="/main.js"></script>"""
# The module is replaced in the page that is there, which remembers when it was loaded.
MAIN = """
import { told } from './told.js'
window.loaded ??= Math.random()
const show = (text) => { document.getElementById('told').textContent = text }
show(told)
import.meta.hot.accept('./told.js', (changed) => show(changed.told))
"""
TOLD = Path("../served/told.js")


def serve(port: int) -> None:
    Path("package.json").write_text(json.dumps({"private": True, "type": "module"}))
    flags = ["--no-audit", "--no-fund", "--no-package-lock", "--silent"]
    subprocess.run(["npm", "install", *flags, f"vite@{VITE}"], check=True, timeout=240)
    Path("index.html").write_text(PAGE)
    Path("main.js").write_text(MAIN)
    TOLD.write_text("export const told = 'before'\n")
    command = ["node", "node_modules/vite/bin/vite.js", "--host", "127.0.0.1", "--strictPort"]
    os.execvp("node", [*command, "--port", str(port)])


def use(base: str) -> Any:
    TOLD.write_text("export const told = 'before'\n")
    with browsing(base) as browser:
        before = shows(browser, "before", "#told")
        loaded = browser.execute_script("return window.loaded")
        TOLD.write_text("export const told = 'after'\n")
        after = shows(browser, "after", "#told")
        again = browser.execute_script("return window.loaded")
        return {
            "texts": [before, after],
            "kept": loaded == again,
            # Vite's own page would go to its server directly, and say so, where this way is shut.
            "console": console(browser),
        }


if __name__ == "__main__":
    run(serve, use)
