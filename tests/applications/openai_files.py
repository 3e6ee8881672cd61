"""The openai client against a small FastAPI application: an answer streams word by word, and a file
of 150 MB goes up."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any

import httpx
import openai
import uvicorn
from fastapi import FastAPI, Form, Request, UploadFile
from fastapi.responses import JSONResponse, StreamingResponse
from program import run

WORDS = ["Hello", " wörld", ",", " this", " streams"]
FILE_BYTES = 150_000_000


def serve(port: int) -> None:
    app = FastAPI()
    read: asyncio.Queue[str] = asyncio.Queue()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> StreamingResponse:
        model = (await request.json())["model"]

        async def pieces() -> Any:
            for word in WORDS:
                choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
                piece = {"id": "1", "object": "chat.completion.chunk", "created": 1}
                yield f"data: {json.dumps(piece | {'model': model, 'choices': [choice]})}\n\n"
                await read.get()  # each word waits until the one before has been read
            yield "data: [DONE]\n\n"

        return StreamingResponse(pieces(), media_type="text/event-stream")

    @app.post("/read")
    async def was_read() -> None:
        read.put_nowait("")

    @app.post("/v1/files")
    async def receive(file: UploadFile, purpose: Annotated[str, Form()]) -> dict[str, Any]:
        digest, size = hashlib.sha256(), 0
        while piece := await file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
        known = {"object": "file", "created_at": 1, "status": "processed", "purpose": purpose}
        return known | {"id": digest.hexdigest(), "bytes": size, "filename": file.filename}

    @app.get("/v1/models/{name}")
    def refuse(name: str) -> JSONResponse:
        error = {"message": f"no {name}", "type": "invalid_request_error", "code": "none"}
        return JSONResponse({"error": error}, 404)

    uvicorn.run(app, host="127.0.0.1", port=port)


def use(base: str) -> Any:
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=120)
    words = []
    question = [{"role": "user", "content": "Hello?"}]
    for piece in client.chat.completions.create(model="small", messages=question, stream=True):
        words.append(piece.choices[0].delta.content)
        httpx.post(f"{base}/read").raise_for_status()
    path = Path("large.jsonl")
    data = os.urandom(1_000_000) * (FILE_BYTES // 1_000_000)
    path.write_bytes(data)
    kept = client.files.create(file=path, purpose="batch")
    try:
        client.models.retrieve("gone")
    except openai.NotFoundError as error:
        refused = [error.status_code, error.code]
    return {
        "words": words,
        "kept": [kept.bytes, kept.filename, kept.purpose],
        "whole": kept.id == hashlib.sha256(data).hexdigest(),
        "refused": refused,
    }


if __name__ == "__main__":
    run(serve, use)
