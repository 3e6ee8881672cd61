"""Conversations with PostgreSQL: connecting, pooling, deadlines, statements, the schema.

Nothing here knows HTTP. Every conversation has a deadline on this side, and no lock is held
while one goes on. Its doors: `table` and `statements` for the service, `connect`, `schema` and
`migrating` for the command line.
"""
