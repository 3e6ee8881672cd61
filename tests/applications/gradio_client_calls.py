"""Gradio's client: calls that answer at once, that stream, and that take and give a file."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from program import run


def serve(port: int) -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    gate = threading.Semaphore(0)

    def greet(name: str) -> str:
        return f"Hello, {name}!"

    def count(to: float) -> Any:
        for number in range(1, int(to) + 1):
            yield number
            gate.acquire(timeout=30)  # until this one has been heard

    def go_on() -> None:
        gate.release()

    def shout(path: str) -> str:
        given = Path(path)
        loud = given.with_name("loud.txt")
        loud.write_text(given.read_text().upper())
        return str(loud)

    with gradio.Blocks() as page:
        gradio.api(greet)
        gradio.api(count)
        gradio.api(go_on)
        file, loud = gradio.File(), gradio.File()
        gradio.Button("Shout").click(shout, file, loud, api_name="shout")
    page.launch(server_name="127.0.0.1", server_port=port, quiet=True)


def use(base: str) -> Any:
    from gradio_client import Client, handle_file

    client = Client(base, verbose=False)
    counted = []
    for number in client.submit(3, api_name="/count"):
        counted.append(number)
        client.predict(api_name="/go_on")
    path = Path("quiet.txt")
    path.write_text("hello " * 200_000)
    loud = client.predict(handle_file(path), api_name="/shout")
    return {
        "greeted": client.predict("Ann", api_name="/greet"),
        "counted": counted,
        "loud": Path(loud).read_text() == "HELLO " * 200_000,
    }


if __name__ == "__main__":
    run(serve, use)
