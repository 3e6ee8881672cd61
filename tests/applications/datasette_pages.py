"""Datasette: a reader follows its pages, whose links are whole URLs made from Host, and exports."""

from __future__ import annotations

import os
import sqlite3
import sys
from typing import Any

import httpx
from program import run


def serve(port: int) -> None:
    with sqlite3.connect("shop.db") as database:
        database.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, item TEXT)")
        rows = [(number, f"item {number}, ünïcode") for number in range(1, 2501)]
        database.executemany("INSERT INTO orders VALUES (?, ?)", rows)
    command = [sys.executable, "-m", "datasette", "serve", "shop.db", "--port", str(port)]
    os.execv(sys.executable, command)


def use(base: str) -> Any:
    with httpx.Client(base_url=base, timeout=30) as reader:
        page = f"{base}/shop/orders.json?_size=500&_shape=objects"
        pages, ids = [], []
        while page:
            pages.append(page)
            answer = reader.get(page).json()
            ids += [row["id"] for row in answer["rows"]]
            page = answer["next_url"]
        html = reader.get("/shop/orders?_size=500")
        moved = reader.get("/shop/orders/")
        with reader.stream("GET", "/shop/orders.csv?_stream=on") as export:
            lines = list(export.iter_lines())
        return {
            "pages": pages,
            "all": ids == list(range(1, 2501)),
            "link": html.headers.get("link"),
            "html": [
                html.status_code,
                f'href="{base}/shop/orders?_size=500&amp;_next=500"' in html.text,
            ],
            "moved": [moved.status_code, moved.headers.get("location")],
            "export": [len(lines), lines[0], lines[-1]],
        }


if __name__ == "__main__":
    run(serve, use)
