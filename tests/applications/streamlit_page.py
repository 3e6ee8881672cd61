"""Streamlit: its page shows its text, and goes on when a button is pressed: all by WebSocket."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from browser import browsing, console, element, shows
from program import run

SCRIPT = """
import streamlit as st
st.title("The shop")
count = st.session_state.setdefault("count", 0)
if st.button("One more"):
    st.session_state["count"] += 1
st.write(f"sold: {st.session_state['count']}")
given = st.file_uploader("A file")
if given:
    st.write(f"given: {given.name}, {given.size} bytes")
"""


def serve(port: int) -> None:
    Path("shop.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "streamlit", "run", "shop.py", "--server.headless=true"]
    command += ["--server.address=127.0.0.1", "--browser.gatherUsageStats=false"]
    os.execv(sys.executable, [*command, f"--server.port={port}"])


def use(base: str) -> Any:
    file = Path("a file.bin").absolute()
    file.write_bytes(bytes(5_000_000))
    with browsing(base) as browser:
        shows(browser, "sold: 0")
        title = element(browser, "//h1").text
        for count in (1, 2):
            element(browser, "//button[contains(., 'One more')]").click()
            shows(browser, f"sold: {count}")
        element(browser, "//input[@type='file']").send_keys(str(file))
        shows(browser, "given: a file.bin, 5000000 bytes")
        return {"title": title, "console": console(browser)}


if __name__ == "__main__":
    run(serve, use)
