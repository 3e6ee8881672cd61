"""Next.js's development server: a page calls a function of the server's, and sees a changed file."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from browser import browsing, console, element, shows
from program import run

NEXT = "16.4.6"
REACT = "19.3.1"
LAYOUT = """export default function Layout({ children }) {
  return <html><head><link rel="icon" href="data:," /></head><body>{children}</body></html>
}
"""
PAGE = """import { headers } from 'next/headers'
import { Counter } from './counter'
export default async function Page() {
  const seen = await headers()
  const asked = `${seen.get('x-forwarded-proto')}://${seen.get('x-forwarded-host')}`
  return <main><p id="asked">{asked}</p><p id="told">before</p><Counter /></main>
}
"""
# Next refuses such a call where its Origin is not the host that was asked for.
ACTIONS = """'use server'
export async function next(count) { return count + 1 }
"""
COUNTER = """'use client'
import { useEffect, useState } from 'react'
import { next } from './actions'
export function Counter() {
  const [count, set] = useState(40)
  useEffect(() => { document.documentElement.dataset.ready = 'yes' }, [])
  return <button onClick={async () => set(await next(count))}>counted {count}</button>
}
"""
PAGES = Path("../served/app")


def serve(port: int) -> None:
    Path("package.json").write_text(json.dumps({"private": True}))
    flags = ["--no-audit", "--no-fund", "--no-package-lock", "--silent"]
    packages = [f"next@{NEXT}", f"react@{REACT}", f"react-dom@{REACT}"]
    subprocess.run(["npm", "install", *flags, *packages], check=True, timeout=240)
    Path("app").mkdir()
    names = ("layout", LAYOUT), ("page", PAGE), ("actions", ACTIONS), ("counter", COUNTER)
    for name, text in names:
        Path(f"app/{name}.js").write_text(text)
    os.environ["NEXT_TELEMETRY_DISABLED"] = "1"
    command = ["node", "node_modules/next/dist/bin/next", "dev", "-H", "127.0.0.1"]
    os.execvp("node", [*command, "-p", str(port)])


def use(base: str) -> Any:
    page = PAGES / "page.js"
    page.write_text(PAGE)
    with browsing(base) as browser:
        asked = shows(browser, "http", "#asked")
        shows(browser, "before", "#told")
        # Before React has taken the page over, a press does nothing.
        element(browser, "//html[@data-ready]")
        element(browser, "//button[.='counted 40']").click()
        counted = element(browser, "//button[.='counted 41']").text
        page.write_text(PAGE.replace("before", "after"))
        shows(browser, "after", "#told")
        # The page was not loaded again, or it would count from its beginning.
        kept = element(browser, "//button").text
        return {"asked": asked, "counts": [counted, kept], "console": console(browser)}


if __name__ == "__main__":
    run(serve, use)
