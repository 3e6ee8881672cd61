"""JupyterLab: a cell of a notebook is run in the browser, its output comes as it is written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx
from browser import browsing, shows
from program import run
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By

CODE = """import pathlib
print("six times seven")
input("ready? ")
print(6 * 7)"""
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def serve(port: int) -> None:
    cell = {"cell_type": "code", "id": "one", "metadata": {}, "outputs": [], "source": CODE}
    book = {"cells": [cell | {"execution_count": None}], "nbformat": 4, "nbformat_minor": 5}
    Path("book.ipynb").write_text(json.dumps(book | {"metadata": {"kernelspec": KERNEL}}))
    flags = ["--no-browser", "--allow-root", "--IdentityProvider.token=open", "--ip=127.0.0.1"]
    flags += [f"--port={port}", "--ServerApp.port_retries=0", "--LabApp.news_url=None"]
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *flags])


def use(base: str) -> Any:
    with browsing(f"{base}/lab/tree/book.ipynb?token=open&reset") as browser:
        shows(browser, "six times seven", ".jp-Notebook .jp-Cell")
        shows(browser, "Idle", ".jp-StatusBar-Middle, .jp-StatusBar-Left, #jp-main-statusbar")
        browser.find_element(By.CSS_SELECTOR, ".jp-Notebook .cm-content").click()
        ActionChains(browser).key_down(Keys.CONTROL).send_keys(Keys.ENTER).perform()
        ActionChains(browser).key_up(Keys.CONTROL).perform()
        # The cell waits here for what is typed: the kernel is asked while it runs.
        shows(browser, "ready?", ".jp-OutputArea")
        browser.find_element(By.CSS_SELECTOR, ".jp-Stdin-input").send_keys("yes", Keys.ENTER)
        output = shows(browser, "42", ".jp-OutputArea")
        prompt = shows(browser, "[1]:", ".jp-InputPrompt")
    # Without a kernel the next visit is like this one.
    with httpx.Client(base_url=base, headers={"Authorization": "token open"}) as client:
        [kernel] = client.get("/api/kernels").json()
        ended = client.delete(f"/api/kernels/{kernel['id']}").status_code
    return {"output": output.split(), "prompt": prompt, "ended": ended}


if __name__ == "__main__":
    run(serve, use)
