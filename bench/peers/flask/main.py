"""The same four calls with Flask, SQLAlchemy and requests."""

from __future__ import annotations

import os
from datetime import datetime
from typing import Any
from uuid import UUID

import requests
from email_validator import EmailNotValidError, validate_email
from flask import Flask, Response, jsonify, request, stream_with_context
from requests.adapters import HTTPAdapter
from sqlalchemy import DateTime, create_engine, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
UPSTREAM = os.environ["UPSTREAM_URL"]


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[UUID] = mapped_column(primary_key=True, insert_default=func.uuidv7())
    email: Mapped[str]
    name: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), insert_default=func.now()
    )
    updated_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), insert_default=func.now()
    )

    def as_json(self) -> dict[str, str]:
        return {
            "id": str(self.id),
            "email": self.email,
            "name": self.name,
            "created_at": self.created_at.isoformat(),
            "updated_at": self.updated_at.isoformat(),
        }


engine = create_engine(
    os.environ["POSTGRES_URI"].replace("postgresql://", "postgresql+psycopg2://", 1),
    pool_size=int(os.environ["POOL_SIZE"]),
    max_overflow=0,
)
Session = sessionmaker(engine, expire_on_commit=False)

client = requests.Session()
client.trust_env = False
client.mount("http://", HTTPAdapter(pool_maxsize=int(os.environ["THREADS"])))

app = Flask(__name__)


def problem(status: int, detail: str) -> tuple[Response, int]:
    return jsonify(detail=detail), status


@app.get("/users/<uuid:user_id>")
def get_user(user_id: UUID) -> Any:
    with Session() as session:
        user = session.get(User, user_id)
    return jsonify(user.as_json()) if user else problem(404, "no such user")


@app.get("/users")
def list_users() -> Any:
    try:
        limit = int(request.args.get("limit", 50))
        after = UUID(request.args["after"]) if "after" in request.args else UUID(int=0)
    except ValueError:
        return problem(422, "limit or after is not valid")
    if not 1 <= limit <= 500:
        return problem(422, "limit is not from 1 to 500")
    with Session() as session:
        found = session.scalars(
            select(User).where(User.id > after).order_by(User.id).limit(limit + 1)
        ).all()
    users = found[:limit]
    more = f"/users?limit={limit}&after={users[-1].id}" if len(found) > limit else None
    return jsonify(users=[user.as_json() for user in users], next=more)


@app.post("/users")
def create_user() -> Any:
    body = request.get_json()
    if not isinstance(body, dict) or set(body) != {"email", "name"}:
        return problem(422, "email and name are needed, and nothing else")
    name = body["name"].strip() if isinstance(body["name"], str) else ""
    if not 1 <= len(name) <= 200:
        return problem(422, "name is not 1 to 200 characters")
    try:
        validate_email(body["email"], check_deliverability=False)
    except (EmailNotValidError, TypeError):
        return problem(422, "email is not valid")
    user = User(email=body["email"], name=name)
    with Session() as session:
        session.add(user)
        try:
            session.commit()
        except IntegrityError:
            return problem(409, "email taken")
    return jsonify(user.as_json()), 201, {"Location": f"/users/{user.id}"}


@app.route("/", defaults={"path": ""}, methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
@app.route("/<path:path>", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
def forward(path: str) -> Response:
    headers = {
        name: value
        for name, value in request.headers.items()
        if name.lower() not in HOP_BY_HOP and name.lower() != "host"
    }
    framed = request.content_length or "Transfer-Encoding" in request.headers
    answer = client.request(
        request.method,
        UPSTREAM + request.full_path.removesuffix("?"),
        headers=headers,
        data=request.stream if framed else None,
        stream=True,
        allow_redirects=False,
        timeout=60,
    )
    return Response(
        stream_with_context(answer.raw.stream(65536, decode_content=False)),
        status=answer.status_code,
        headers=[(k, v) for k, v in answer.raw.headers.items() if k.lower() not in HOP_BY_HOP],
    )
