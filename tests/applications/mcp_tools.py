"""MCP over streamable HTTP: fastmcp's client calls tools, and hears of progress while one runs."""

from __future__ import annotations

import asyncio
from typing import Any

from fastmcp import Client, Context, FastMCP
from program import run


def serve(port: int) -> None:
    server = FastMCP("tools")
    went_on = asyncio.Event()

    @server.tool
    def add(a: int, b: int) -> int:
        return a + b

    @server.tool
    async def go_on() -> str:
        went_on.set()
        return "told"

    @server.tool
    async def long(context: Context) -> str:
        await context.report_progress(1, 2)
        await context.info("half")
        await went_on.wait()  # for a call that is made when the progress has been heard
        went_on.clear()
        await context.report_progress(2, 2)
        return "x" * 100_000

    @server.resource("note://{name}")
    def note(name: str) -> str:
        return f"a note of {name}"

    server.run(transport="http", host="127.0.0.1", port=port, show_banner=False)


async def visit(base: str) -> Any:
    progress, said = [], []
    heard = asyncio.Event()

    async def on_progress(now: float, total: float | None, _: str | None) -> None:
        progress.append([now, total])
        heard.set()

    async def on_log(message: Any) -> None:
        said.append(str(message.data.get("msg")))

    async with Client(f"{base}/mcp", log_handler=on_log, timeout=30) as client:
        tools = sorted(tool.name for tool in await client.list_tools())
        added = await client.call_tool("add", {"a": 20, "b": 22})
        running = asyncio.create_task(client.call_tool("long", progress_handler=on_progress))
        await asyncio.wait_for(heard.wait(), 30)
        told = await client.call_tool("go_on")
        done = await running
        read = await client.read_resource("note://ann")
    return {
        "tools": tools,
        "added": added.data,
        "told": told.data,
        "done": len(done.data),
        "progress": progress,
        "said": said,
        "read": read[0].text,
    }


def use(base: str) -> Any:
    return asyncio.run(visit(base))


if __name__ == "__main__":
    run(serve, use)
