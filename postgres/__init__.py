"""Conversations with PostgreSQL: connecting, pooling, deadlines, statements, the schema.

Nothing here knows HTTP. Every conversation has a deadline on this side, except for the statements
of a migration; and no lock is held while one goes on. Its doors: `database` for the models;
`table`, `statements` and `casing` for models and services; `connect`, `schema`, `migrating` and
`deadlines` for the commands.
"""
