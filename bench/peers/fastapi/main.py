"""The same four calls with FastAPI, asyncpg and httpx."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated
from uuid import UUID

import asyncpg
import httpx
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, EmailStr, StringConstraints
from starlette.background import BackgroundTask

HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
FIRST = UUID(int=0)
COLUMNS = "id, email, name, created_at, updated_at"


class NewUser(BaseModel):
    model_config = ConfigDict(extra="forbid")

    email: EmailStr
    name: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]


class User(BaseModel):
    id: UUID
    email: str
    name: str
    created_at: datetime
    updated_at: datetime


class Page(BaseModel):
    users: list[User]
    next: str | None


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    size = int(os.environ["POOL_SIZE"])
    async with (
        asyncpg.create_pool(os.environ["POSTGRES_URI"], min_size=size, max_size=size) as pool,
        # The client's own limits: with more connections its pool is slower.
        httpx.AsyncClient(
            base_url=os.environ["UPSTREAM_URL"], timeout=60, trust_env=False
        ) as client,
    ):
        app.state.pool = pool
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/users/{user_id}")
async def get_user(user_id: UUID, request: Request) -> User:
    row = await request.app.state.pool.fetchrow(
        f"SELECT {COLUMNS} FROM users WHERE id = $1", user_id
    )
    if row is None:
        raise HTTPException(404, "no such user")
    return User(**row)


@app.get("/users")
async def list_users(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    after: UUID = FIRST,
) -> Page:
    rows = await request.app.state.pool.fetch(
        f"SELECT {COLUMNS} FROM users WHERE id > $1 ORDER BY id LIMIT $2", after, limit + 1
    )
    users = [User(**row) for row in rows[:limit]]
    more = f"/users?limit={limit}&after={users[-1].id}" if len(rows) > limit else None
    return Page(users=users, next=more)


@app.post("/users", status_code=201)
async def create_user(new: NewUser, request: Request, response: Response) -> User:
    try:
        row = await request.app.state.pool.fetchrow(
            "INSERT INTO users (id, email, name, created_at, updated_at)"
            f" VALUES (uuidv7(), $1, $2, now(), now()) RETURNING {COLUMNS}",
            new.email,
            new.name,
        )
    except asyncpg.UniqueViolationError:
        raise HTTPException(409, "email taken") from None
    response.headers["Location"] = f"/users/{row['id']}"
    return User(**row)


@app.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def forward(path: str, request: Request) -> StreamingResponse:
    client: httpx.AsyncClient = request.app.state.client
    headers = [
        (name, value)
        for name, value in request.headers.items()
        if name not in HOP_BY_HOP and name != "host"
    ]
    framed = "content-length" in request.headers or "transfer-encoding" in request.headers
    url = httpx.URL(path=request.url.path, query=request.url.query.encode() or None)
    answer = await client.send(
        client.build_request(
            request.method, url, headers=headers, content=request.stream() if framed else None
        ),
        stream=True,
    )
    return StreamingResponse(
        answer.aiter_raw(),
        status_code=answer.status_code,
        headers={k: v for k, v in answer.headers.items() if k not in HOP_BY_HOP},
        background=BackgroundTask(answer.aclose),
    )
