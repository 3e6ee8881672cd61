"""The database, connected when first used, and what is in it."""

from __future__ import annotations

from typing import Any

from peewee import SQL, Check, Model, TextField, UUIDField
from playhouse.postgres_ext import BinaryJSONField, DateTimeTZField

from postgres.casing import lowered
from postgres.database import Database

database = Database()
statements = database.statements

NOW = SQL("DEFAULT now()")
# What an address is known by: without regard to case, and the same whatever the database's locale.
MAILBOX = lowered("email")


class User(Model):
    """A user. The migrations make the table; a test holds that both agree."""

    id = UUIDField(primary_key=True)
    email = TextField()
    name = TextField()
    created_at = DateTimeTZField(constraints=[NOW])
    updated_at = DateTimeTZField(constraints=[NOW])
    metadata = BinaryJSONField(constraints=[SQL("DEFAULT '{}'")], index=False)

    class Meta:
        database = database
        table_name = "users"
        constraints = [
            Check("char_length(email) BETWEEN 3 AND 254", name="users_email_length"),
            Check("char_length(name) BETWEEN 1 AND 200", name="users_name_length"),
            Check(r"name !~ '[\u0001-\u001F\u007F-\u009F]'", name="users_name_no_control"),
            Check("jsonb_typeof(metadata) = 'object'", name="users_metadata_object"),
        ]


# The index that keeps two users from having one address.
MAILBOXES: Any = User.index(SQL(f"({MAILBOX})"), unique=True, name="users_mailbox")
User.add_index(MAILBOXES)
statements.taken = frozenset({MAILBOXES._name})
